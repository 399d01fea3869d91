"""Unit vectors."""

from __future__ import annotations

import jax.numpy as jnp

from big_ssl.core.types import Array

_SMALLEST = 1e-24  # of the squared norm


def l2_normalize(x: Array, *, axis: int = -1) -> Array:
  """`x` in float32, divided by its Euclidean norm along `axis`.

  Vectors shorter than 1e-12 stay as they are, with a gradient of 1 (own choice): dividing them by 1e-12, as is common,
  turns a dead unit into a gradient of 1e12.
  """
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
  return x / jnp.sqrt(jnp.where(square > _SMALLEST, square, 1.0))
