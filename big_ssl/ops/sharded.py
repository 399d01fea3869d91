"""Where intermediate arrays lie on the mesh."""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import Array

_BATCH_AXES = ("data", "fsdp")


def batch_devices() -> int:
  """Devices over which the rows of a batch are spread on the mesh in use; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[a] for a in _BATCH_AXES if a in mesh.axis_names)


def over_devices(x: Array) -> Array:
  """The same array, its rows spread evenly over the data and fsdp axes of the mesh in use.

  For batches put together from several: after a concatenation along a split axis, or once it is merged into another, the
  compiler may keep all rows on every device and repeat the work of the network there. Without a mesh, or where the
  rows do not divide, nothing is asked of it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(a for a in _BATCH_AXES if a in mesh.axis_names)
  devices = batch_devices()
  if devices == 1 or x.shape[0] % devices:
    return x
  return jax.lax.with_sharding_constraint(x, P(axes))
