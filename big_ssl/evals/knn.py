"""Weighted k-NN on frozen features, DINO's protocol (arXiv 2104.14294, section 4; eval_knn.py of the released code)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Pair, Report, pairs, unit
from big_ssl.ops import knn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn(Evaluator):
  """Accuracy in percent of the weighted vote of the k nearest training images, by cosine.

  Reports "top1_k20" and, with more than five classes, "top5_k20", which credits only classes that got a vote (DINO's
  script credits others in the order of a sort). The published settings are k=(10, 20, 100, 200), temperature=0.07
  (DINO), and k=200, temperature=0.1 (lightly, solo-learn and arXiv 1805.01978's CIFAR-10); the vote is the same.

  Attributes:
    k: neighbors; several values share one search.
    temperature: T of the weights exp(cosine / T).
    max_bank: use only so many training images, drawn once and for all; 0 is all.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  path: ClassVar[str] = "config.evals.knn"  # for errors

  k: int | tuple[int, ...] = 20
  temperature: float = 0.07
  max_bank: int = 0
  baselines: bool = False

  def __post_init__(self):
    if not self.ks or min(self.ks) < 1:
      raise UserError(f"{self.path}.k={self.k}: expected at least 1.")
    if self.temperature <= 0:
      raise UserError(f"{self.path}.temperature={self.temperature}: expected a positive number.")
    if self.max_bank < 0:
      raise UserError(f"{self.path}.max_bank={self.max_bank}: expected a number of images, or 0 for all.")

  @property
  def ks(self) -> tuple[int, ...]:
    return (self.k,) if isinstance(self.k, int) else tuple(self.k)

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    metrics, protocol = {}, "k-NN not computed: the data has no labels"
    for pair in pairs(extract, output=self.output, baselines=self.baselines):
      bank = self._bank_rows(len(pair.train.features))
      metrics |= self._score(pair, bank, mesh)
      if not pair.prefix:
        protocol = self._protocol(pair, len(bank))
    return Report(metrics, protocol)

  def _bank_rows(self, count: int) -> np.ndarray:
    size = min(count, self.max_bank or count)
    if max(self.ks) > size:
      raise UserError(f"{self.path}.k={max(self.ks)}: more neighbors than the {size} images of the bank.")
    # Drawn, not the first: folders are sorted by class.
    return np.arange(count) if size == count else np.sort(np.random.default_rng(0).permutation(count)[:size])

  def _score(self, pair: Pair, bank: np.ndarray, mesh: Any) -> dict[str, float]:
    labels, queries = pair.train.labels[bank], pair.held_out
    classes = int(max(labels.max(), queries.labels.max())) + 1
    found = knn.nearest(unit(queries.features), bank=unit(pair.train.features[bank]), k=max(self.ks), mesh=mesh)
    out = {}
    tops = (1, 5) if classes > 5 else (1,)
    for k in self.ks:
      settings = {"k": k, "temperature": self.temperature, "num_classes": classes, "tops": tops}
      scores = knn.accuracies(found, labels=labels, query_labels=queries.labels, **settings)
      out |= {f"{pair.prefix}top{top}_k{k}": score for top, score in scores.items()}
    return out

  def _protocol(self, pair: Pair, bank: int) -> str:
    source = f", {pair.held_out.source}" if pair.held_out.source else ""
    return (
      f"weighted k-NN, cosine, k={','.join(map(str, self.ks))}, T={self.temperature:g}, output '{self.output}'"
      f" ({pair.train.features.shape[1]} dimensions, l2-normalized) of the evaluation view without augmentation,"
      f" bank {bank} of {len(pair.train.features)} training images,"
      f" {len(pair.held_out.features)} held-out queries{source}"
    )
