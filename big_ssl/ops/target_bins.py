"""Classes of the structured tasks from what was measured: positions, angles, distances (arXiv 2202.08360; released code)."""

from __future__ import annotations

import numpy as np

CLEVR_DEPTHS = (8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
KITTI_METERS = (0.0, 8.0, 20.0)


def dsprites_location(x: np.ndarray) -> np.ndarray:
  """floor(31 x / 2), 0 ... 15, of positions in 0 ... 1; in float64, as float32 differs at the edges of the bins."""
  return np.floor(np.asarray(x, np.float64) * 31 / 2).astype(np.int64)


def dsprites_orientation(radians: np.ndarray) -> np.ndarray:
  """floor(16 angle / 2 pi), at most 15, of angles in 0 ... 2 pi."""
  return np.minimum(np.floor(np.asarray(radians, np.float64) / (2 * np.pi) * 16), 15).astype(np.int64)


def clevr_count(objects: np.ndarray) -> np.ndarray:
  """0 ... 7 of scenes with 3 ... 10 objects."""
  return np.asarray(objects, np.int64) - 3


def clevr_distance(depth: np.ndarray) -> np.ndarray:
  """0 ... 5 by the pixel depth of the closest object: how many of `CLEVR_DEPTHS` are smaller."""
  return np.searchsorted(CLEVR_DEPTHS, np.asarray(depth, np.float64), side="left")


def kitti_distance(meters: np.ndarray) -> np.ndarray:
  """By the closest car, van or truck: 0 none (NaN, or not above 0), 1 up to 8 m, 2 up to 20 m, 3 farther."""
  meters = np.nan_to_num(np.asarray(meters, np.float64), nan=0.0)
  return np.searchsorted(KITTI_METERS, meters, side="left")
