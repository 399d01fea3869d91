"""Mixup (arXiv 1710.09412) as in big_vision's recipes: one share per step, partners are neighbors in the batch.

  x'_i = a x_i + (1 - a) x_{i-1},   a = max(b, 1 - b),   b ~ Beta(alpha, alpha)

Targets are mixed alike. A loss that is linear in its targets, as all cross-entropies are, is then the same mixture of the
loss on the labels and that on the rolled labels, which needs no soft labels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array


def draw(key: Array, *, alpha: float) -> Array:
  """The share a of an image in its mixture: a float32 scalar in [0.5, 1], the same for the whole batch.

  Args:
    key: of this step.
    alpha: positive; 1 draws evenly, less keeps most images nearly whole.
  """
  beta = jax.random.beta(key, alpha, alpha)
  return jnp.maximum(beta, 1.0 - beta)


def mix(x: Array, *, share: Array) -> Array:
  """share x_i + (1 - share) x_{i-1} over the rows of x [B, ...]; row 0 is mixed with the last one."""
  return share * x + (1.0 - share) * jnp.roll(x, 1, axis=0)


def mixed_loss(loss: Callable[[Array], Array], *, labels: Array, share: Array) -> Array:
  """The loss on mixed targets: share loss(labels) + (1 - share) loss(the partners' labels).

  Args:
    loss: of integer labels [B], linear in the one-hot targets they stand for; rows without a label (-1) are its affair.
    labels: [B].
    share: as for `mix`.
  """
  return share * loss(labels) + (1.0 - share) * loss(jnp.roll(labels, 1))
