"""Do the clusters of k-means agree with the classes? NMI, ARI, accuracy of the best matching (arXiv 2005.12320)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Pair, Report, pairs, unit
from big_ssl.evals.class_mean import nearest_mean
from big_ssl.ops import clustering_scores
from big_ssl.ops.kmeans import KMeans, kmeans


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clustering(Evaluator):
  """k-means on the l2-normalized training features; the held-out images take the nearest centroid and are scored.

  Reports "nmi" (arithmetic mean), "ari" and "accuracy" (Hungarian), all in percent. Labels only score; the matching of
  clusters to classes is made on the held-out images themselves, as in the paper.

  Attributes:
    clusters: K; 0 is the number of classes.
    restarts: runs from other random rows; the one with the smallest sum of squared distances counts.
    iterations: of Lloyd's algorithm.
    seed: of the first centroids.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  clusters: int = 0
  restarts: int = 5
  iterations: int = 50
  seed: int = 0
  baselines: bool = False

  def __post_init__(self):
    if self.clusters < 0 or self.clusters == 1:
      raise UserError(f"config.evals.clustering.clusters={self.clusters}: expected at least 2, or 0 for one per class.")
    for name in ("restarts", "iterations"):
      if getattr(self, name) < 1:
        raise UserError(f"config.evals.clustering.{name}={getattr(self, name)}: expected at least 1.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    metrics, protocol = {}, "clustering not computed: the data has no labels"
    for pair in pairs(extract, output=self.output, baselines=self.baselines):
      clusters = self._clusters(pair)
      found = self._fit(unit(pair.train.features), clusters, mesh)
      assigned, labels = nearest_mean(unit(pair.held_out.features), means=found.centroids), pair.held_out.labels
      nmi = clustering_scores.normalized_mutual_information(assigned, labels, average="arithmetic")
      metrics[f"{pair.prefix}nmi"] = 100.0 * nmi
      metrics[f"{pair.prefix}ari"] = 100.0 * clustering_scores.adjusted_rand_index(assigned, labels)
      metrics[f"{pair.prefix}accuracy"] = clustering_scores.matched_accuracy(assigned, labels=labels)
      if not pair.prefix:
        protocol = self._protocol(pair, clusters)
    return Report(metrics, protocol)

  def _clusters(self, pair: Pair) -> int:
    rows = len(pair.train.features)
    clusters = self.clusters or len(np.union1d(pair.train.labels, pair.held_out.labels))
    if not 2 <= clusters <= rows:
      raise UserError(
        f"config.evals.clustering.clusters={self.clusters}: {clusters} clusters of {rows} training images;"
        " at least 2 and at most one per image are possible."
      )
    return clusters

  def _fit(self, x: np.ndarray, clusters: int, mesh: Any) -> KMeans:
    runs = (
      kmeans(x, clusters=clusters, rng=np.random.default_rng([self.seed, i]), iterations=self.iterations, mesh=mesh)
      for i in range(self.restarts)
    )
    return min(runs, key=lambda run: run.objective[-1])

  def _protocol(self, pair: Pair, clusters: int) -> str:
    source = f", {pair.held_out.source}" if pair.held_out.source else ""
    return (
      f"k-means, Euclidean, K={clusters}, best of {self.restarts} starts of seed {self.seed} with {self.iterations}"
      f" iterations on {len(pair.train.features)} training images, output '{self.output}'"
      f" ({pair.train.features.shape[1]} dimensions, l2-normalized) of the evaluation view without augmentation;"
      f" NMI (arithmetic), ARI and accuracy (Hungarian matching on the images scored) in percent of"
      f" {len(pair.held_out.features)} held-out images{source}"
    )
