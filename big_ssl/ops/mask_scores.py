"""Scores of masks: region and boundary measure of DAVIS (CVPR 2016), Jaccard index of attention masks."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage


def region_iou(predicted: np.ndarray, *, truth: np.ndarray, void: np.ndarray | None = None) -> float:
  """J: intersection over union of two masks [h, w] bool; 1 where both are empty (DAVIS, section 4.1).

  Args:
    void: [h, w] bool, pixels that do not count.
  """
  counts = True if void is None else ~void
  union = np.count_nonzero((predicted | truth) & counts)
  return np.count_nonzero(predicted & truth & counts) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
  """[h, w] bool: pixels unlike their right, lower or lower right neighbor: the upper left side of an edge.

  The border of the picture is no edge: the last row and column are compared along themselves (released code of DAVIS).
  """
  mask = np.asarray(mask, bool)
  after = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
  return (mask != after[:-1, 1:]) | (mask != after[1:, :-1]) | (mask != after[1:, 1:])


def boundary_f(
  predicted: np.ndarray, *, truth: np.ndarray, tolerance: float = 0.008, void: np.ndarray | None = None
) -> float:
  """F: harmonic mean of the shares of boundary pixels of either mask that have one of the other nearby (DAVIS, section 4.2).

  Two empty boundaries score 1, one empty one 0.

  Args:
    predicted, truth: [h, w] bool.
    tolerance: how far away a match may be, in diagonals of the picture, rounded up to whole pixels.
    void: [h, w] bool, pixels that are in neither mask.
  """
  if void is not None:
    predicted, truth = predicted & ~void, truth & ~void
  found, wanted = boundary(predicted), boundary(truth)
  if not found.any() or not wanted.any():
    return float(found.any() == wanted.any())
  radius = math.ceil(tolerance * math.hypot(*truth.shape))
  window = ndimage.find_objects((found | wanted).astype(np.int8))[0]  # no distance between boundaries leaves it
  found, wanted = found[window], wanted[window]
  precision = np.mean(ndimage.distance_transform_edt(~wanted)[found] <= radius)
  recall = np.mean(ndimage.distance_transform_edt(~found)[wanted] <= radius)
  return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def mass_masks(attention: np.ndarray, *, keep: float = 0.6) -> np.ndarray:
  """[..., h, w] bool: the patches that hold the largest share `keep` of each map's attention (DINO, arXiv 2104.14294, appendix).

  In ascending order, a patch stays where the cumulative share is above 1 - keep. Maps [..., h, w] need not sum to 1.
  """
  flat = np.asarray(attention, np.float64).reshape(*attention.shape[:-2], -1)
  order = np.argsort(flat, axis=-1, kind="stable")
  ascending = np.take_along_axis(flat, order, axis=-1)
  share = np.cumsum(ascending, axis=-1) / ascending.sum(axis=-1, keepdims=True)
  kept = np.empty(flat.shape, bool)
  np.put_along_axis(kept, order, share > 1 - keep, axis=-1)
  return kept.reshape(attention.shape)


def object_labels(labels: np.ndarray, *, void: int = 255) -> np.ndarray:
  """The labels of the objects in a mask: all that occur but 0, the background, and `void`."""
  found = np.unique(labels)
  return found[(found > 0) & (found != void)]


def jaccard(masks: np.ndarray, *, labels: np.ndarray, void: int = 255) -> np.ndarray:
  """[objects, heads]: Jaccard index of the mask of every head with every object, in the order of `object_labels`.

  A pixel that is `void` is no part of an object, and counts against a mask that covers it (dino issue 54).

  Args:
    masks: [heads, h, w] bool.
    labels: [h, w] integers.
  """
  objects = labels == object_labels(labels, void=void)[:, None, None]
  flat = lambda x: x.reshape(len(x), -1).astype(np.float64)
  common = flat(objects) @ flat(masks).T
  union = objects.sum(axis=(1, 2))[:, None] + masks.sum(axis=(1, 2)) - common
  return common / np.maximum(union, 1)
