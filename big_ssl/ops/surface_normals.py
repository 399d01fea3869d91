"""Surface normals as a classification of directions: decoding and scores (arXiv 1905.01235; public code)."""

from __future__ import annotations

import dataclasses

import numpy as np


def decode(probabilities: np.ndarray, *, codebook: np.ndarray) -> np.ndarray:
  """Unit normals [..., 3] float64: the mean of the codebook by the probabilities [..., K], brought to length one.

  Args:
    probabilities: [..., K].
    codebook: [K, 3] unit directions, the centroids of k-means on training normals.
  """
  mean = np.asarray(probabilities, np.float64) @ np.asarray(codebook, np.float64)
  return _unit(mean)


def encode(normals: np.ndarray, *, codebook: np.ndarray) -> np.ndarray:
  """Index [...] int32 of the nearest row, Euclidean, of the codebook [K, 3] for normals [..., 3]; ties to the first."""
  normals, codebook = np.asarray(normals, np.float64), np.asarray(codebook, np.float64)
  nearness = normals @ codebook.T - 0.5 * np.sum(codebook**2, axis=1)
  return np.argmax(nearness, axis=-1).astype(np.int32)


def angles(normals: np.ndarray, *, truth: np.ndarray, valid: np.ndarray) -> np.ndarray:
  """Degrees [n] between normals and truth, both [..., 3], where valid [...]; float64, as an arccos near 1 needs it."""
  predicted, true = (_unit(np.asarray(x, np.float64)[np.asarray(valid, bool)]) for x in (normals, truth))
  return np.degrees(np.arccos(np.clip(np.sum(predicted * true, axis=-1), -1.0, 1.0)))


@dataclasses.dataclass(frozen=True)
class Scores:
  """Over all valid pixels of all images together.

  Attributes:
    mean, median, rmse: of the angle, in degrees.
    within: percent of the pixels below each threshold.
  """

  mean: float
  median: float
  rmse: float
  within: tuple[float, ...]


def scores(degrees: np.ndarray, *, thresholds: tuple[float, ...] = (11.25, 22.5, 30.0)) -> Scores:
  """Scores of angles [n] in degrees.

  Raises:
    ValueError: no angle, or one that is not a number.
  """
  degrees = np.asarray(degrees, np.float64)
  if not degrees.size or np.isnan(degrees).any():
    raise ValueError(f"surface normals: {degrees.size} angles, {int(np.isnan(degrees).sum())} of them not a number")
  within = tuple(100.0 * float(np.mean(degrees < t)) for t in thresholds)
  return Scores(float(degrees.mean()), float(np.median(degrees)), float(np.sqrt(np.mean(degrees**2))), within)


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
