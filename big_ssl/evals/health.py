"""How the held-out features are spread: alignment, uniformity (arXiv 2005.10242), effective rank, use of dimensions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Features, Report, check_finite, take, unit

# A dimension with a smaller share of the root mean square deviation is not used (own choice).
UNUSED = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureHealth(Evaluator):
  """Numbers about the l2-normalized held-out features, for which no labels are needed but for "class_alignment".

  "uniformity" is between -2 t and 0, lower is more even. "effective_rank" and "participation_ratio" count directions
  of the centered features, "used_dimensions" coordinates. "class_alignment" is the mean squared distance of two images
  of a class, between 0 and 4: the paper's positives are two augmentations, which an evaluation does not draw.

  Attributes:
    max_images: use only so many held-out images, drawn once and for all; 0 is all. The cost is quadratic in them.
    t: of the uniformity; 2 in the paper.
  """

  max_images: int = 10000
  t: float = 2.0

  def __post_init__(self):
    if self.max_images < 0 or self.max_images == 1:
      raise UserError(f"config.evals.health.max_images={self.max_images}: expected at least 2, or 0 for all.")
    if self.t <= 0:
      raise UserError(f"config.evals.health.t={self.t}: expected a positive number.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh
    every = extract("eval", output=self.output)
    check_finite(every, name=self.output)
    if len(every.features) < 2:
      return Report({}, f"feature health not computed: {len(every.features)} evaluation images, at least 2 are needed")
    used = self._draw(every)
    x = unit(np.asarray(used.features, np.float64))
    values = spectrum(x)
    metrics = {
      "uniformity": uniformity(x, t=self.t),
      "effective_rank": effective_rank(values),
      "participation_ratio": participation_ratio(values),
      "used_dimensions": float(used_dimensions(x)),
    }
    pairs = "no pairs of a class: the data has no labels"
    if used.labels is not None and np.any(np.unique(used.labels[used.labels >= 0], return_counts=True)[1] > 1):
      metrics["class_alignment"] = class_alignment(x, labels=used.labels)
      pairs = "alignment over all pairs of a class"
    return Report(metrics, self._protocol(used, len(every.features), pairs), images=len(used.features))

  def _draw(self, features: Features) -> Features:
    count = len(features.features)
    if not 0 < self.max_images < count:
      return features
    # Drawn, not the first: folders are sorted by class.
    return take(features, np.sort(np.random.default_rng(0).permutation(count)[: self.max_images]))

  def _protocol(self, used: Features, count: int, pairs: str) -> str:
    source = f", {used.source}" if used.source else ""
    return (
      f"feature health, output '{self.output}' ({used.features.shape[1]} dimensions, l2-normalized) of the evaluation"
      f" view without augmentation, {len(used.features)} of {count} evaluation images; uniformity t={self.t:g} over all"
      f" pairs, {pairs}, ranks of the centered features, a dimension is used if its deviation is at least {UNUSED:g} of"
      f" the root mean square over dimensions{source}"
    )


def class_alignment(x: np.ndarray, *, labels: np.ndarray) -> float:
  """Mean of ||x_i - x_j||^2 over pairs of rows of x [N, D] with the same label (arXiv 2005.10242, section 4.1).

  The paper's alignment, alpha 2, with the images of a class as positives. A row with label -1 is in no pair.

  Raises:
    ValueError: no two rows share a label.
  """
  total, count = 0.0, 0
  for label in np.unique(labels[labels >= 0]):
    rows = np.asarray(x[labels == label], np.float64)
    # The sum over pairs of squared distances is n times the sum of squared distances to the mean.
    total += len(rows) * float(np.sum((rows - rows.mean(axis=0)) ** 2))
    count += len(rows) * (len(rows) - 1) // 2
  if not count:
    raise ValueError("no two rows share a label")
  return total / count


def uniformity(x: np.ndarray, *, t: float = 2.0, chunk: int = 1024) -> float:
  """ln of the mean of exp(-t ||x_i - x_j||^2) over pairs of different rows of x [N, D] (arXiv 2005.10242, equation 9).

  At most `chunk` times N distances are held at once.

  Raises:
    ValueError: fewer than two rows.
  """
  count = len(x)
  if count < 2:
    raise ValueError(f"uniformity: {count} rows have no pair")
  x = np.asarray(x, np.float64)
  norms = np.sum(x**2, axis=1)
  total = 0.0
  for start in range(0, count, chunk):
    part = slice(start, start + chunk)
    squared = np.maximum(norms[part, None] + norms[start:] - 2 * x[part] @ x[start:].T, 0.0)
    later = np.arange(start, count) > np.arange(start, min(start + chunk, count))[:, None]
    total += float(np.sum(np.exp(-t * squared), where=later))
  return math.log(max(total / (count * (count - 1) / 2), np.finfo(np.float64).tiny))


def spectrum(x: np.ndarray) -> np.ndarray:
  """Singular values of x [N, D] less its mean row, descending; those that are rounding are 0."""
  centered = np.asarray(x, np.float64) - np.mean(x, axis=0, dtype=np.float64)
  short = centered.T if len(centered) >= centered.shape[1] else centered
  values = np.maximum(np.linalg.eigvalsh(short @ short.T)[::-1], 0.0)
  # Rows of float32 differ by their rounding where they are equal.
  floor = max(1e-12 * values[0], 1e-13 * float(np.sum(np.square(x, dtype=np.float64))))
  return np.sqrt(np.where(values > floor, values, 0.0))


def effective_rank(singular_values: np.ndarray) -> float:
  """exp(H(p)), p the singular values over their sum (Roy and Vetterli, 2007); 0 where all are 0."""
  total = singular_values.sum()
  if total == 0:
    return 0.0
  p = singular_values[singular_values > 0] / total
  return float(np.exp(-np.sum(p * np.log(p))))


def participation_ratio(singular_values: np.ndarray) -> float:
  """(tr C)^2 / tr(C^2) of the covariance C, the rank that training logs; 0 where all values are 0."""
  squared = singular_values**2
  return float(squared.sum() ** 2 / np.sum(squared**2)) if squared.any() else 0.0


def used_dimensions(x: np.ndarray) -> int:
  """Columns of x [N, D] whose deviation is at least a tenth of the root mean square over the columns; 0 without any."""
  variance = np.var(np.asarray(x, np.float64), axis=0)
  if variance.sum() <= 1e-13 * float(np.mean(np.sum(np.square(x, dtype=np.float64), axis=1))):
    return 0
  return int(np.sum(variance >= UNUSED**2 * variance.mean()))
