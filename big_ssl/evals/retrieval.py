"""Retrieval of images of the same class: each held-out image is a query, the other ones are the database."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Features, Report, held_out_only, unit
from big_ssl.ops import retrieval


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassRetrieval(Evaluator):
  """Cosine ranking: "map" in percent, and "recall_at_K", the percent of queries with one of their class among K.

  The average precision is trapezoidal over the whole ranking, that of revisited Oxford/Paris. A query is not in its own
  database; one whose class has no other held-out image is left out.

  Attributes:
    k: of the recall (arXiv 1511.06452, section 5); several values share one ranking.
    query_chunk: queries at a time; about 60 bytes for each pair of a query and a held-out image.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  k: int | tuple[int, ...] = (1, 10)
  query_chunk: int = 256
  baselines: bool = False

  def __post_init__(self):
    if not self.ks or min(self.ks) < 1:
      raise UserError(f"config.evals.retrieval.k={self.k}: expected at least 1.")
    if self.query_chunk < 1:
      raise UserError(f"config.evals.retrieval.query_chunk={self.query_chunk}: expected at least 1.")

  @property
  def ks(self) -> tuple[int, ...]:
    return (self.k,) if isinstance(self.k, int) else tuple(self.k)

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # every process ranks all of it
    metrics, protocol, queries = {}, "retrieval not computed: the data has no labels", 0
    for prefix, features in held_out_only(extract, output=self.output, baselines=self.baselines):
      with_another = np.isin(features.labels, _repeated(features.labels))
      if not with_another.any():
        return Report({}, "retrieval not computed: no class has two held-out images")
      average, recall = self._rank(features, np.flatnonzero(with_another))
      metrics[f"{prefix}map"] = 100.0 * float(np.mean(average))
      metrics |= {f"{prefix}recall_at_{k}": 100.0 * float(r) for k, r in zip(self.ks, recall.mean(0), strict=True)}
      if not prefix:
        queries = int(with_another.sum())
        protocol = self._protocol(features, queries)
    return Report(metrics, protocol, images=queries)

  def _rank(self, features: Features, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision [Q] and recall [Q, len(ks)]."""
    x, labels = unit(features.features), features.labels
    averages, recalls = [], []
    for start in range(0, len(queries), self.query_chunk):
      rows = queries[start : start + self.query_chunk]
      itself = rows[:, None] == np.arange(len(x))
      judged = retrieval.Judged(labels[rows][:, None] == labels, itself)
      scores = retrieval.score(x[rows] @ x.T, judged=judged, ks=self.ks)
      averages.append(scores.average_precision)
      recalls.append(scores.recall)
    return np.concatenate(averages), np.concatenate(recalls)

  def _protocol(self, features: Features, queries: int) -> str:
    source = f", {features.source}" if features.source else ""
    return (
      f"retrieval, cosine, output '{self.output}' ({features.features.shape[1]} dimensions, l2-normalized) of the"
      f" evaluation view without augmentation, trapezoidal mAP over the whole ranking,"
      f" recall at {','.join(map(str, self.ks))}, each of {queries} held-out images against the other"
      f" {len(features.features) - 1}{source}"
    )


def _repeated(labels: np.ndarray) -> np.ndarray:
  classes, counts = np.unique(labels, return_counts=True)
  return classes[counts > 1]
