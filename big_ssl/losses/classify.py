"""Classification on integer labels, where -1 says that an image has none."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array


def cross_entropy(logits: Array, *, labels: Array, label_smoothing: float = 0.0) -> Array:
  """Mean softmax cross-entropy with label smoothing (arXiv 1512.00567, section 7).

  The target is 1 - s + s/K on the class and s/K on the others.

  Args:
    logits: [B, K], any float dtype; computed in float32.
    labels: [B] integers in 0 ... K-1; -1 is left out of the mean.
    label_smoothing: s in [0, 1).

  Returns:
    Scalar, in nats.
  """
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  hit = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
  return -_mean_labeled((1.0 - label_smoothing) * hit + label_smoothing * jnp.mean(log_p, axis=-1), labels)


def sigmoid_cross_entropy(logits: Array, *, labels: Array, label_smoothing: float = 0.0) -> Array:
  """Sigmoid cross-entropy summed over the classes, mean over the images (arXiv 2006.07159, section 5).

  Args:
    logits, labels, label_smoothing: as for `cross_entropy`.

  Returns:
    Scalar, in nats.
  """
  z = logits.astype(jnp.float32)
  hit = jnp.take_along_axis(z, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
  # -t log s(z) - (1 - t) log(1 - s(z)) = softplus(z) - t z
  target_z = (1.0 - label_smoothing) * hit + label_smoothing * jnp.mean(z, axis=-1)
  return _mean_labeled(jnp.sum(jax.nn.softplus(z), axis=-1) - target_z, labels)


def accuracy(logits: Array, *, labels: Array) -> Array:
  """Share of labeled rows whose largest logit is the label's, in [0, 1]; of equal logits the first counts."""
  return _mean_labeled(jnp.argmax(logits, axis=-1) == labels, labels)


def _mean_labeled(x: Array, labels: Array) -> Array:
  """Mean of x [B] over the rows that have a label; 0 where none has."""
  labeled = labels >= 0
  return jnp.sum(jnp.where(labeled, x, 0.0)) / jnp.maximum(jnp.sum(labeled), 1)
