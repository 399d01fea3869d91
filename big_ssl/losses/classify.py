"""Classification on integer labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array


def cross_entropy(logits: Array, *, labels: Array, label_smoothing: float = 0.0) -> Array:
  """Mean softmax cross-entropy with label smoothing (arXiv 1512.00567, section 7).

  The target is 1 - s + s/K on the class and s/K on the others.

  Args:
    logits: [B, K], any float dtype; computed in float32.
    labels: [B] integers in 0 ... K-1.
    label_smoothing: s in [0, 1).

  Returns:
    Scalar, in nats.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  hit = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
  return -jnp.mean((1.0 - label_smoothing) * hit + label_smoothing * jnp.mean(log_p, axis=-1))


def accuracy(logits: Array, *, labels: Array) -> Array:
  """Share of rows whose largest logit is the label's, in [0, 1]; of equal logits the first counts."""
  return jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
