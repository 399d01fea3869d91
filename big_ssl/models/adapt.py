"""Weights of a network for other channels, patches or image sizes as the start of a new one (own choices, but for PI-resize)."""

from __future__ import annotations

import math

import numpy as np

from big_ssl.models import positions
from big_ssl.models.layers import Backbone
from big_ssl.models.patch_resize import resize_kernel


def adapt(path: str, value: np.ndarray, *, shape: tuple[int, ...], model: Backbone) -> np.ndarray | None:
  """`value` of the tensor `path` as `model` has it, in `shape`; None where there is no meaning in that.

  A patch embedding is PI-resized (arXiv 2212.08013, section 3.4). A first convolution for one channel is the sum over the
  old ones, which answers to gray images as before; for more, the old ones are repeated and scaled by old / new. A
  position table goes linearly from corner to corner, as big_vision loads it; that of CLS stays.
  """
  if path.endswith("pos_embed") and value.ndim == 3 and value.shape[2] == shape[2]:
    return _positions(value, count=shape[1], model=model)
  if not path.endswith("kernel") or value.ndim != 4 or value.shape[3] != shape[3]:
    return None
  if value.shape[:2] != shape[:2]:
    if "/patch_embed/" not in path or getattr(model, "stem_channels", ()):
      return None
    value = resize_kernel(value, size=shape[:2])
  return _channels(value, count=shape[2])


def _channels(kernel: np.ndarray, *, count: int) -> np.ndarray:
  old = kernel.shape[2]
  if old == count:
    return kernel
  if count == 1:
    return kernel.sum(axis=2, keepdims=True)
  return kernel[:, :, np.arange(count) % old] * (old / count)


def _positions(table: np.ndarray, *, count: int, model: Backbone) -> np.ndarray | None:
  if not hasattr(model, "table"):
    return None
  grid = model.table()
  first = count - grid[0] * grid[1]  # 1 where CLS has a position
  old = table.shape[1] - first
  if first < 0 or math.isqrt(max(old, 0)) ** 2 != old or old < 1:
    return None
  patches = positions.resample(table[0, first:], rule="corners", grid=grid, image=(0, 0), table_shape=None)
  return np.concatenate([table[:, :first], patches[None]], axis=1)
