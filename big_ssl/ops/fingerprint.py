"""A short name of what a tree of arrays holds, the same for any sharding."""

from __future__ import annotations

import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import Array, PyTree

_SEEDS = (0x9E3779B9, 0x85EBCA6B)  # two sums of 32 bits each


def fingerprint(tree: PyTree, *, mesh: Mesh | None = None) -> str:
  """16 hexadecimal digits of the paths, shapes, dtypes and bits of all leaves.

  The bits are summed on the devices, in integers, so that no array is gathered and the order of the sum does not matter.
  Meant to tell checkpoints apart, not to withstand forgery.

  Args:
    tree: of arrays; every process passes its part of the same one.
    mesh: over which the arrays are spread; None for arrays of one process.
  """
  leaves = [(jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in jax.tree_util.tree_leaves_with_path(tree)]
  digest = hashlib.sha256(str([(path, x.shape, str(x.dtype)) for path, x in leaves]).encode())
  if leaves:
    place = None if mesh is None else NamedSharding(mesh, P())
    digest.update(np.asarray(_sums(place)([x for _, x in leaves])).tobytes())
  return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def _sums(place: NamedSharding | None) -> jax.stages.Wrapped:
  return jax.jit(lambda leaves: jnp.stack([_sum(x) for x in leaves]), out_shardings=place)


def _sum(x: Array) -> Array:
  """[2] uint32 sums of a hash of each element and its position."""
  bits = _bits(x)
  position = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):  # instead of a reshape, which would gather what is spread
    stride = math.prod(bits.shape[axis + 1 :]) % 2**32
    position += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
  return jnp.stack([jnp.sum(_mix(bits ^ _mix(position + jnp.uint32(s))), dtype=jnp.uint32) for s in _SEEDS])


def _bits(x: Array) -> Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  if jnp.issubdtype(x.dtype, jnp.floating):
    x = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
  return x.astype(jnp.uint32)


def _mix(x: Array) -> Array:
  """A bijection of 32 bits in which each input bit flips about half of the output bits (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
