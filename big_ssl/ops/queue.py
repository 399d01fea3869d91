"""First-in-first-out queues of embeddings with a fixed size, as pure functions on arrays.

A queue is a plain array that lives in `extra`. Two layouts hold the same rows: `push` keeps the newest rows first and
moves all others (SwAV, arXiv 2006.09882); `write` keeps rows where they are and replaces the oldest at a pointer
(MoCo, arXiv 1911.05722, Algorithm 1). Under jit over a mesh the rows are those of the global batch.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError


def push(queue: Array, rows: Array) -> Array:
  """The queue with `rows` in front; the oldest rows fall out at the end.

  Args:
    queue: [K, D], newest first.
    rows: [B, D], B <= K; detached here.

  Returns:
    [K, D]: rows, then queue[: K - B].

  Raises:
    ValueError: more rows than places.
  """
  if rows.shape[0] > queue.shape[0]:
    raise ValueError(f"push: {rows.shape[0]} rows do not fit into a queue of {queue.shape[0]}")
  rows = jax.lax.stop_gradient(rows).astype(queue.dtype)
  return jnp.concatenate([rows, queue[: queue.shape[0] - rows.shape[0]]])


@flax.struct.dataclass
class Ring:
  """A queue whose rows stay in place.

  Attributes:
    rows: [K, D].
    pointer: int32 scalar, the place of the next write, in 0 ... K - 1.
  """

  rows: Array
  pointer: Array


def ring(rows: Array) -> Ring:
  """A ring that starts with `rows` [K, D] and is overwritten from place 0."""
  return Ring(rows=rows, pointer=jnp.int32(0))


def write(queue: Ring, rows: Array) -> Ring:
  """Replaces the oldest rows by `rows` and moves the pointer behind them, wrapping at K.

  Args:
    queue: K rows.
    rows: [B, D] with K % B == 0, so that a write never straddles the end; detached here.

  Raises:
    ValueError: K is not a multiple of B.
  """
  places, count = queue.rows.shape[0], rows.shape[0]
  if places % count:
    raise ValueError(f"write: a ring of {places} rows is not a multiple of the {count} rows written")
  rows = jax.lax.stop_gradient(rows).astype(queue.rows.dtype)
  start = (queue.pointer,) + (0,) * (rows.ndim - 1)
  return Ring(rows=jax.lax.dynamic_update_slice(queue.rows, rows, start), pointer=(queue.pointer + count) % places)


def filled(queue: Array) -> Array:
  """Whether a queue that began as zeros has been pushed full once: its last, oldest row is not zero. Boolean scalar."""
  return jnp.any(queue[-1] != 0)


def check_length(length: int, *, batch_size: int, path: str) -> None:
  """A queue takes whole batches.

  Raises:
    UserError: naming `path` (such as "config.method.queue_length"), where the length is not a positive multiple of the batch.
  """
  if length < batch_size or length % batch_size:
    below = length - length % batch_size
    near = " or ".join(str(n) for n in (below, below + batch_size) if n)
    raise UserError(f"{path}={length}: must be a multiple of config.batch_size={batch_size}; nearest: {near}.")
