"""The weights of resampling along one axis, written once for the host (numpy) and the device (jax.numpy).

A crop that is cut and resized is `rows @ crop @ columns.T`, so everything about a crop, its place, its size, the
filter and the flip, is in two small matrices. `data` and `augment` build them here, from the same box.
"""

from __future__ import annotations

from typing import Any

from big_ssl.core.types import UserError, nearest

INTERPOLATIONS = ("bilinear", "bicubic")
_SNAP = 1e-3  # pixels: a box edge this near to a pixel border lies on it, float32 being what it is


def _triangle(distance: Any, xp: Any) -> Any:
  return xp.maximum(1.0 - distance, 0.0)


def _cubic(distance: Any, xp: Any) -> Any:
  """Keys' cubic with a = -1/2, the one PIL takes."""
  near = (1.5 * distance - 2.5) * distance * distance + 1.0
  far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
  return xp.where(distance < 1.0, near, xp.where(distance < 2.0, far, 0.0))


def axis_weights(
  start: Any,
  length: Any,
  *,
  size: int,
  canvas: int,
  interpolation: str,
  xp: Any,
  flip: Any = None,
  limit: Any = None,
  antialias: bool = True,
  samples: Any = None,
) -> Any:
  """The matrix that cuts [start, start + length) out of an axis and resamples it to `size` samples.

  As PIL resizes a crop: the kernel is stretched by length / size when shrinking, it sees no pixel outside the crop,
  and its weights are normalized. Pixels that a fractional box touches in part are inside.

  Args:
    start: [...] first edge of the crop, in pixels from the edge of the canvas.
    length: [...] extent of the crop in pixels, above 0; the crop lies inside the canvas.
    size: samples to make.
    canvas: pixels along the axis.
    interpolation: "bilinear" (triangle) or "bicubic" (a = -1/2).
    xp: numpy or jax.numpy.
    flip: [...] bool, reverses the samples.
    limit: [...] pixels of the axis that belong to the image; given, the kernel sees all of them, as when the whole
      image is resized and the crop cut afterwards (evaluation), and the crop may reach beyond them: rows there are 0.
    samples: [...] how many of the `size` samples the crop becomes, from 1 on; the rest of the rows is 0. None is all.
    antialias: False never stretches the kernel: tf.image.resize without antialiasing, half-pixel centers.

  Returns:
    [..., size, canvas] float32, rows sum to 1 (those beyond `samples` to 0).
  """
  if interpolation not in INTERPOLATIONS:
    raise UserError(
      f"view.interpolation={interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}."
      + nearest(interpolation, INTERPOLATIONS)
    )
  start = xp.asarray(start, xp.float32)[..., None]
  length = xp.asarray(length, xp.float32)[..., None]
  sample = xp.arange(size, dtype=xp.float32) + 0.5
  count = size if samples is None else xp.asarray(samples, xp.float32)[..., None]
  if samples is not None:
    beyond = sample > count
    sample = xp.minimum(sample, count - 0.5)  # a place in the crop, so that no row is empty
  if flip is not None:
    sample = xp.where(xp.asarray(flip)[..., None], count - sample, sample)
  scale = length / count
  center = (start + sample * scale)[..., None]  # [..., size, 1]
  pixel = xp.arange(canvas, dtype=xp.float32)
  if limit is None:
    inside = (pixel >= xp.floor(start + _SNAP)) & (pixel < xp.ceil(start + length - _SNAP))  # [..., canvas]
  else:
    inside = pixel < xp.asarray(limit, xp.float32)[..., None]
  distance = xp.abs(pixel + 0.5 - center)
  if antialias:
    distance = distance / xp.maximum(scale, 1.0)[..., None]
  kernel = _triangle if interpolation == "bilinear" else _cubic
  weights = kernel(distance, xp) * inside[..., None, :]
  total = weights.sum(-1, keepdims=True)
  if limit is not None:
    edge = xp.asarray(limit, xp.float32)[..., None, None]
    weights = weights * ((center >= 0) & (center < edge))
    total = xp.where(total == 0, 1.0, total)  # far outside no pixel is near
  weights = weights / total
  return (weights if samples is None else xp.where(beyond[..., None], 0.0, weights)).astype(xp.float32)
