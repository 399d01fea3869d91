"""Which patch of a reference crop lies under each patch of another crop of the same image (LOCA, arXiv 2212.02400)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array

# Quotients of sides are read from tables: where the center of a patch falls on a border of two samples (one lookup in
# ten thousand), float32 rounding decides which one TensorFlow shows, and compiled divisions do not round as IEEE's.
_SIDES = np.arange(8193, dtype=np.float32)


def patch_positions(
  reference: Array, query: Array, flip: Array, *, grid: tuple[int, int], size: tuple[int, int], patch: int
) -> Array:
  """The position in the reference of every patch of a query, from the two crop boxes alone.

  The public code numbers the reference grid, enlarges it to the reference crop, pastes it on a canvas of -1 of the
  image's size, cuts the query crop from it, resizes that to the query's pixels and then to its patches, and flips; all
  resizing is to the nearest. Here the same lookups are composed from the back, in indices, and no canvas is made.

  Args:
    reference: [B, 4] y0, x0, height, width in whole pixels of the image, at most 8192 long.
    query: [B, V, 4], as `reference`.
    flip: [B, V] bool, whether the query is flipped left-right after the cut.
    grid: patches of the reference, (rows, columns).
    size: height and width of the query in pixels after the resize.
    patch: side of a patch in pixels.

  Returns:
    [B, V, (height // patch) * (width // patch)] int32: row-major index into the reference grid, -1 outside of it.
  """
  rows, columns = (
    _along_axis(reference[:, None, axis::2], query[..., axis::2], cells=grid[axis], size=size[axis], patch=patch)
    for axis in (0, 1)
  )
  columns = jnp.where(flip[..., None], columns[..., ::-1], columns)
  rows, columns = rows[..., :, None], columns[..., None, :]
  position = jnp.where((rows < 0) | (columns < 0), -1, rows * grid[1] + columns)
  return position.reshape(*position.shape[:2], -1)


def pixel_boxes(shares: Array, *, sides: Array) -> Array:
  """Boxes y0, x0, y1, x1 as shares of the image [..., 4] as y0, x0, height, width in whole pixels; sides [..., 2]."""
  edges = jnp.round(shares * jnp.concatenate([sides, sides], axis=-1))
  return jnp.concatenate([edges[..., :2], edges[..., 2:] - edges[..., :2]], axis=-1)


def _along_axis(reference: Array, query: Array, *, cells: int, size: int, patch: int) -> Array:
  """Start and length [B, 1, 2], [B, V, 2] -> [B, V, size // patch] int32 cell of the reference, -1 outside."""
  start, length = jnp.split(reference.astype(jnp.int32), 2, axis=-1)
  query_start, query_length = jnp.split(query.astype(jnp.int32), 2, axis=-1)
  patches = size // patch
  pixel = _nearest(jnp.arange(patches), np.float32(size) / np.float32(patches), last=size - 1)  # of the query
  shrink = jnp.take(_SIDES / np.float32(size), query_length)  # image pixels per query pixel
  pixel = query_start + _nearest(pixel, shrink, last=query_length - 1)  # of the image
  inside = pixel - start  # of the reference crop
  cell = _nearest(inside, jnp.take(np.float32(cells) / np.maximum(_SIDES, 1.0), length), last=cells - 1)
  return jnp.where((inside >= 0) & (inside < length), cell, -1)


def _nearest(index: Array, scale: Array | np.float32, *, last: Array | int) -> Array:
  """The sample that nearest resizing shows at `index`, `scale` samples per index, half-pixel centers, float32."""
  return jnp.clip(jnp.floor((index.astype(jnp.float32) + 0.5) * scale), 0, last).astype(jnp.int32)
