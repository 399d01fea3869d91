"""Entropies of assignments, and the regularizer that spreads the use of the prototypes."""

from __future__ import annotations

import math

import jax.numpy as jnp

from big_ssl.core.types import Array

_TINY = 1e-37  # smallest normal float32, about


def entropy(probabilities: Array, *, axis: int = -1) -> Array:
  """-sum p log p in nats along `axis`; 0 log 0 is 0, and the gradient there is finite."""
  p = probabilities.astype(jnp.float32)
  return -jnp.sum(p * jnp.log(jnp.maximum(p, _TINY)), axis=axis)


def mean_entropy_deficit(probabilities: Array) -> Array:
  """me-max: log K - H(mean p), at least 0 (MSN, arXiv 2204.07141, eq. 1, where it is -H: the same gradient).

  Args:
    probabilities: [N, K], rows sum to 1; the mean is over the global batch.

  Returns:
    Scalar; 0 when all prototypes are used alike.
  """
  return math.log(probabilities.shape[-1]) - entropy(jnp.mean(probabilities.astype(jnp.float32), axis=0))
