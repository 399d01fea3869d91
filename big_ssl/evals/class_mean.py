"""Nearest class mean on frozen features: one prototype per class, nothing to tune (arXiv 1611.07725, equation 2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from big_ssl.evals.base import Evaluator, Extract, Pair, Report, pairs, unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassMean(Evaluator):
  """Accuracy in percent of the class whose mean is nearest: "top1_cosine" and "top1_euclidean".

  The cosine is that of an image with the mean of the l2-normalized images of the class; the Euclidean distance is that
  of the features as they are. A class without a training image is never predicted.

  Attributes:
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  baselines: bool = False

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # one product with a mean per class
    metrics, protocol = {}, "nearest class mean not computed: the data has no labels"
    for pair in pairs(extract, output=self.output, baselines=self.baselines):
      train, test = pair.train, pair.held_out
      classes, rows = np.unique(train.labels, return_inverse=True)
      found = {
        "cosine": nearest_mean(unit(test.features), means=unit(class_means(unit(train.features), rows=rows))),
        "euclidean": nearest_mean(test.features, means=class_means(train.features, rows=rows)),
      }
      for name, index in found.items():
        metrics[f"{pair.prefix}top1_{name}"] = 100.0 * float(np.mean(classes[index] == test.labels))
      if not pair.prefix:
        protocol = self._protocol(pair, classes)
    return Report(metrics, protocol)

  def _protocol(self, pair: Pair, classes: np.ndarray) -> str:
    unseen = np.setdiff1d(pair.held_out.labels, classes)
    source = f", {pair.held_out.source}" if pair.held_out.source else ""
    source += f", classes {unseen.tolist()} without a training image" if len(unseen) else ""
    return (
      f"nearest class mean, cosine (l2-normalized) and Euclidean (as they are), output '{self.output}'"
      f" ({pair.train.features.shape[1]} dimensions) of the evaluation view without augmentation, means of"
      f" {len(classes)} classes over {len(pair.train.features)} training images,"
      f" {len(pair.held_out.features)} held-out images{source}"
    )


def class_means(x: np.ndarray, *, rows: np.ndarray) -> np.ndarray:
  """Means [C, D] float64 of x [N, D] by class; `rows` [N] are classes 0 ... C - 1, each with a member."""
  sums = np.zeros((int(rows.max()) + 1, x.shape[1]))
  np.add.at(sums, rows, x)
  return sums / np.bincount(rows)[:, None]


def nearest_mean(x: np.ndarray, *, means: np.ndarray, chunk: int = 4096) -> np.ndarray:
  """Index [N] of the row of `means` [C, D] with the smallest Euclidean distance, of equally near ones the lowest.

  Products are float64, `chunk` rows of x [N, D] at a time. For unit rows the nearest has the largest cosine.
  """
  means = np.asarray(means, np.float64)
  # Distances do not change when both are moved, and lose fewer digits near the origin.
  center = means.mean(axis=0)
  means = means - center
  half_norms = 0.5 * np.sum(means**2, axis=1)
  parts = (np.asarray(x[i : i + chunk], np.float64) - center for i in range(0, len(x), chunk))
  return np.concatenate([np.argmax(part @ means.T - half_norms, axis=1) for part in parts])
