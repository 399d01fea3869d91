"""A converged linear classifier on frozen features of all labeled images: no learning rate, no epochs, one answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Pair, Report, pairs, part_tenth
from big_ssl.evals.lowshot import fit_logistic


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearProbe(Evaluator):
  """Multinomial logistic regression by L-BFGS, on the host, to convergence; top-1 in percent.

  Each dimension is standardized by the training features, and a constant one is added. The penalty is chosen among
  `l2` by the accuracy on a tenth of the training images, drawn class by class, then all are fitted. Own choice; the
  published linear probes are SGD runs with augmentation, whose figures are other ones. Memory is 8 (D + 1) bytes per image.

  Attributes:
    l2: candidates of lambda; the penalty is lambda / (2 n) ||W||^2 beside the mean cross-entropy of n images. SEER's
      regression on cached features (arXiv 2202.08360, public code) is l2 = 0.025 / n.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  l2: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
  baselines: bool = False

  def __post_init__(self):
    if not self.l2 or min(self.l2) <= 0:
      raise UserError(f"config.evals.linear.l2={self.l2}: expected positive numbers.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh
    metrics, protocol = {}, "linear probe not computed: the data has no labels"
    for pair in pairs(extract, output=self.output, baselines=self.baselines):
      accuracy, l2 = self._score(pair)
      metrics[f"{pair.prefix}top1"] = accuracy
      if not pair.prefix:
        source = f", {pair.held_out.source}" if pair.held_out.source else ""
        unseen = np.setdiff1d(pair.held_out.labels, pair.train.labels)
        source += f", classes {unseen.tolist()} without a training image" if len(unseen) else ""
        edge = " (at the edge of these)" if l2 in (min(self.l2), max(self.l2)) else ""
        chosen = f" of {self.l2} by {part_tenth(pair.train.labels).words}{edge}" if len(self.l2) > 1 else ""
        protocol = (
          f"logistic regression to convergence, lambda={l2:g}{chosen}, output '{self.output}'"
          f" ({pair.train.features.shape[1]} dimensions, standardized) of the evaluation view without augmentation,"
          f" {len(pair.train.features)} training and {len(pair.held_out.features)} held-out images{source}"
        )
    return Report(metrics, protocol)

  def _score(self, pair: Pair) -> tuple[float, float]:
    """Held-out accuracy and the lambda it was reached with."""
    if len(pair.train.labels) < 2:
      raise UserError("config.evals.linear: the data has one labeled training image, at least 2 are needed.")
    mean, std = pair.train.features.mean(0), pair.train.features.std(0) + 1e-6
    with_one = lambda f: np.concatenate([(f - mean) / std, np.ones((len(f), 1))], axis=1)
    x, y, test = with_one(pair.train.features), pair.train.labels, with_one(pair.held_out.features)
    classes = int(max(y.max(), pair.held_out.labels.max())) + 1
    best, weights, tried = self.l2[0], None, {}
    if len(self.l2) > 1:
      part = part_tenth(y)
      for l2 in sorted(self.l2, reverse=True):  # each starts where the one before ended
        weights = _fit(x[part.fit], y[part.fit], classes=classes, l2=l2, start=weights)
        tried[l2] = (_accuracy(weights, x[part.judge], y[part.judge]), weights)
      best = max(self.l2, key=lambda l2: tried[l2][0])
      weights = tried[best][1]
    weights = _fit(x, y, classes=classes, l2=best, start=weights)
    return _accuracy(weights, test, pair.held_out.labels), best


def _fit(x: np.ndarray, y: np.ndarray, *, classes: int, l2: float, start: np.ndarray | None) -> np.ndarray:
  path = "config.evals.linear"
  return fit_logistic(x, labels=y, num_classes=classes, l2=l2, tolerance=1e-9, start=start, path=path).weights


def _accuracy(weights: np.ndarray, x: np.ndarray, labels: np.ndarray) -> float:
  return 100.0 * float(np.mean(np.argmax(x @ weights, axis=1) == labels))
