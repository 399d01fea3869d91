"""Cuts views out of a canvas on the device: crop, flip and antialiased resize in two matrix products."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from big_ssl.core.resampling import axis_weights
from big_ssl.core.types import Array


def cut(
  canvas: Array,
  box: Array,
  flip: Array,
  *,
  size: tuple[int, int] | int,
  interpolation: str = "bilinear",
  antialias: bool = True,
  sizes: Array | None = None,
  extent: Array | None = None,
) -> Array:
  """Crops `box`, resizes it to `size` with the antialiasing of PIL, flips it left-right where asked.

  PIL rounds and clips to 8 bits between the two axes; here nothing is rounded and only the result is clipped, which
  is within 1 gray level of it for "bilinear" and 3 for "bicubic".

  Args:
    canvas: [B, Hc, Wc, C] uint8, uint16 (full scale is 1), or float in [0, 1]; the image is at the top left.
    box: [B, V, 4] float32: y0, x0, height, width in pixels of the canvas, inside the image (with `sizes` it may reach
      beyond, where the view is black). Without `sizes`, no pixel
      outside the box is read, so the padding of the canvas never is.
    flip: [B, V] bool.
    size: output side, or (height, width).
    interpolation: "bilinear" or "bicubic".
    antialias: False reads the nearest pixels only, as tf.image.resize does by default.
    sizes: [B, 2] height and width of the image on the canvas. None resizes the crop (training, `crop` other than
      "center"); given, the filter reads the image around the box too, as resizing the image and then cutting the
      crop does (`crop="center"`; without it the outermost pixels are up to 5 gray levels off, inside 1).
    extent: [B, V, 2] height and width in pixels that each crop gets, in the top left of `size`; None is all of it. Elsewhere
      is the mean color of the crop, so that contrast is about its own mean, and blur brings in no black (own choice).

  Returns:
    [B, V, h, w, C] float32 in [0, 1].
  """
  height, width = (size, size) if isinstance(size, int) else size
  image = canvas.astype(jnp.float32)
  if jnp.issubdtype(canvas.dtype, jnp.integer):
    image = image / jnp.iinfo(canvas.dtype).max
  image = jnp.moveaxis(image, -1, 1)  # [B, C, Hc, Wc]: with the channels last the products take 1.4 times as long
  limits = (None, None) if sizes is None else (sizes[:, None, 0], sizes[:, None, 1])
  samples = (None, None) if extent is None else (extent[..., 0], extent[..., 1])
  options = {"interpolation": interpolation, "antialias": antialias, "xp": jnp}
  weights_y = axis_weights(box[..., 0], box[..., 2], size=height, canvas=canvas.shape[1], limit=limits[0], samples=samples[0], **options)
  weights_x = axis_weights(
    box[..., 1], box[..., 3], size=width, canvas=canvas.shape[2], limit=limits[1], flip=flip, samples=samples[1], **options
  )
  precision = jax.lax.Precision.HIGHEST  # TF32 and bf16 products lose gray levels
  rows = jnp.einsum("bvyh,bchw->bvycw", weights_y, image, precision=precision)
  views = jnp.einsum("bvycw,bvxw->bvycx", rows, weights_x, precision=precision)
  views = jnp.clip(jnp.moveaxis(views, -2, -1), 0.0, 1.0)
  return views if extent is None else _filled(views, extent)


def _filled(views: Array, extent: Array) -> Array:
  """Views [B, V, h, w, C] that are 0 beyond `extent` [B, V, 2], with the mean color of the rest there."""
  rows, columns = (jnp.arange(n) < extent[..., i, None] for i, n in enumerate(views.shape[2:4]))
  inside = rows[..., :, None] & columns[..., None, :]
  mean = jnp.sum(views, axis=(2, 3), keepdims=True) / jnp.prod(extent, axis=-1)[..., None, None, None]
  return jnp.where(inside[..., None], views, mean)
