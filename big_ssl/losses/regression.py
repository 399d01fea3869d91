"""Regression of one embedding on another."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array


def normalized_mse(predictions: Array, *, targets: Array) -> Array:
  """Squared distance of unit vectors, 2 - 2 cos (BYOL, arXiv 2006.07733, eq. 2).

    mean_b |n(p_b) - n(t_b)|^2,   n(x) = x / sqrt(max(|x|^2, 1e-12))

  The floor is the released code's: a vector shorter than 1e-6 is not stretched to length 1.

  Args:
    predictions: [B, D], any length and float dtype.
    targets: [B, D]; no gradient.

  Returns:
    Scalar in [0, 4], mean over the global batch.
  """
  difference = _unit(predictions) - _unit(jax.lax.stop_gradient(targets))
  return jnp.mean(jnp.sum(jnp.square(difference), axis=-1))


def _unit(x: Array) -> Array:
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))
