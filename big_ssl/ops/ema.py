"""Exponential moving average of a tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, PyTree


def ema(old: PyTree, new: PyTree, momentum: float | Array) -> PyTree:
  """Returns momentum * old + (1 - momentum) * new, leaf by leaf, computed and kept in float32.

  Written as old + (1 - momentum) (new - old), so that a leaf that does not change stays bit-equal. Float32 is not an
  option: in bfloat16 a teacher at momentum .9996 never moves, the increment is under half a unit in the last place.

  Args:
    old: the average so far.
    new: tree of the same structure.
    momentum: scalar in [0, 1]; may be traced.

  Raises:
    ValueError: the trees differ in structure.
  """
  share = 1.0 - jnp.asarray(momentum, jnp.float32)

  def update(a: Array, b: Array) -> Array:
    a = a.astype(jnp.float32)
    return a + share * (b.astype(jnp.float32) - a)

  return jax.tree.map(update, old, new)
