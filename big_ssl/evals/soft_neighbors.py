"""Soft nearest-neighbor classification, the inference of PAWS (arXiv 2104.13963, section 5; snn_eval.py of the release)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Features, Pair, Report, pairs, take
from big_ssl.losses.semi import soft_neighbors


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftNeighbors(Evaluator):
  """Accuracy in percent of softmax(cos / temperature) over ALL labeled training images, times their one-hot labels.

  Reports "top1" and, with more than five classes, "top5". Where a semi-supervised method was trained with the labels of
  some images, these are the bank; otherwise every training image with a label is.

  Attributes:
    output: "prediction" is after the prediction head, where the method has one.
    temperature: of the softmax.
    query_chunk: held-out images at a time.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  output: str = "prediction"
  temperature: float = 0.1
  query_chunk: int = 512
  baselines: bool = False

  def __post_init__(self):
    if self.temperature <= 0:
      raise UserError(f"config.evals.soft_neighbors.temperature={self.temperature}: expected a positive number.")
    if self.query_chunk < 1:
      raise UserError(f"config.evals.soft_neighbors.query_chunk={self.query_chunk}: expected at least 1.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # every process computes all of it
    metrics, protocol = {}, "soft nearest neighbors not computed: the data has no labels"
    for pair in pairs(extract, output=self.output, baselines=self.baselines):
      bank = pair.train if pair.train.used_in_training is None else take(pair.train, pair.train.used_in_training)
      metrics |= self._score(pair, bank)
      if not pair.prefix:
        protocol = self._protocol(pair, bank)
    return Report(metrics, protocol)

  def _score(self, pair: Pair, bank: Features) -> dict[str, float]:
    queries = pair.held_out
    classes = int(max(bank.labels.max(), queries.labels.max())) + 1
    chunks = range(0, len(queries.features), self.query_chunk)
    parts = [self.classify(queries.features[i : i + self.query_chunk], bank=bank, classes=classes) for i in chunks]
    order = np.argsort(-np.concatenate(parts), axis=1, kind="stable")
    hits = order == queries.labels[:, None]
    out = {f"{pair.prefix}top1": 100.0 * float(np.mean(hits[:, 0]))}
    if classes > 5:
      out[f"{pair.prefix}top5"] = 100.0 * float(np.mean(hits[:, :5].any(1)))
    return out

  def classify(self, queries: np.ndarray, *, bank: Features, classes: int) -> np.ndarray:
    """[Q, D] -> class probabilities [Q, classes]."""
    one_hot = np.eye(classes, dtype=np.float32)[bank.labels]
    return np.asarray(_soft_neighbors(queries, bank.features, one_hot, self.temperature))

  def _protocol(self, pair: Pair, bank: Features) -> str:
    source = f", {pair.held_out.source}" if pair.held_out.source else ""
    return (
      f"soft nearest neighbors, cosine, T={self.temperature:g}, output '{self.output}'"
      f" ({bank.features.shape[1]} dimensions, l2-normalized) of the evaluation view without augmentation, labels of"
      f" {len(bank.features)} of {len(pair.train.features)} training images,"
      f" {len(pair.held_out.features)} held-out queries{source}"
    )


@functools.partial(jax.jit, static_argnums=3)
def _soft_neighbors(queries: jax.Array, supports: jax.Array, labels: jax.Array, temperature: float) -> jax.Array:
  return soft_neighbors(queries, supports, labels=labels, temperature=temperature)
