"""Weighted k-NN on frozen features, DINO's protocol (arXiv 2104.14294, section 4; eval_knn.py of the released code)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Features, Report
from big_ssl.ops import knn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn(Evaluator):
  """Top-1 accuracy in percent of the weighted vote of the k nearest training images.

  Attributes:
    k: neighbours; several values share one search.
    temperature: T of the weights exp(cosine / T).
    max_bank: use only the first so many training images; 0 is all.
    baselines: also report the same protocol on standardised raw pixels and on the random initialisation.
  """

  k: int | tuple[int, ...] = 20
  temperature: float = 0.07
  max_bank: int = 0
  baselines: bool = False

  def __post_init__(self):
    if min(self.ks) < 1:
      raise UserError(f"config.evals.knn.k={self.k}: expected at least 1.")
    if self.temperature <= 0:
      raise UserError(f"config.evals.knn.temperature={self.temperature}: expected a positive number.")

  @property
  def ks(self) -> tuple[int, ...]:
    return (self.k,) if isinstance(self.k, int) else tuple(self.k)

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh
    bank, queries = extract("train", output=self.output), extract("eval", output=self.output)
    if bank.labels is None or queries.labels is None:
      return Report({}, "k-NN not computed: the data has no labels")
    size = min(len(bank.features), self.max_bank or len(bank.features))
    if max(self.ks) > size:
      raise UserError(f"config.evals.knn.k={max(self.ks)}: more neighbours than the {size} images of the bank.")
    metrics = self._score(bank, queries, "")
    if self.baselines:
      random = {"output": self.output, "weights": "random"}
      metrics |= self._score(extract("train", **random), extract("eval", **random), "random_init/")
      metrics |= self._score(*_standardize(extract("train", output="pixels"), extract("eval", output="pixels")), "raw_pixels/")
    protocol = (
      f"weighted k-NN, cosine, k={','.join(map(str, self.ks))}, T={self.temperature:g}, output '{self.output}' l2-normalised,"
      f" center crop, bank {size} training images, {len(queries.features)} held-out queries"
    )
    return Report(metrics, protocol)

  def _score(self, bank: Features, queries: Features, prefix: str) -> dict[str, float]:
    limit = self.max_bank or len(bank.features)
    labels = bank.labels[:limit]
    classes = int(max(labels.max(), queries.labels.max())) + 1
    found = knn.nearest(_unit(queries.features), bank=_unit(bank.features[:limit]), k=max(self.ks))
    out = {}
    for k in self.ks:
      vote = knn.votes(found, labels=labels, k=k, temperature=self.temperature, num_classes=classes)
      out[f"{prefix}top1_k{k}"] = knn.top_k_accuracy(vote, labels=queries.labels, k=1)
      if classes > 5:
        out[f"{prefix}top5_k{k}"] = knn.top_k_accuracy(vote, labels=queries.labels, k=5)
    return out


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _standardize(bank: Features, queries: Features) -> tuple[Features, Features]:
  """Raw pixels with the mean and deviation of the bank's every dimension taken out."""
  mean, std = bank.features.mean(0), bank.features.std(0) + 1e-6
  scaled = lambda f: dataclasses.replace(f, features=(f.features - mean) / std)  # noqa: E731
  return scaled(bank), scaled(queries)
