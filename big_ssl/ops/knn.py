"""Exact nearest neighbors and their weighted votes, in bounded memory, with the bank spread over a mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import Array


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """similarity [Q, k] descending and index [Q, k]; of equal similarities the lower index comes first."""

  similarity: np.ndarray
  index: np.ndarray


def nearest(
  queries: np.ndarray,
  *,
  bank: np.ndarray,
  k: int,
  mesh: Mesh | None = None,
  bank_chunk: int = 16384,
  query_chunk: int = 4096,
) -> Neighbors:
  """The k rows of `bank` with the largest inner product, for each of `queries`.

  Each device holds its share of the bank, 4 N D / devices bytes, and walks through it in chunks; besides it needs about
  8 query_chunk (bank_chunk + k) bytes. The k best of every device are then merged. Similarities are float32 products of
  full precision. Every process passes the same arrays and gets the same answer.

  Args:
    queries: [Q, D].
    bank: [N, D].
    k: at most N.
    mesh: over all of whose devices the rows of the bank are spread; None is one device.
    bank_chunk, query_chunk: rows at a time.

  Raises:
    ValueError: k is outside 1 ... N.
  """
  count = len(bank)
  if not 1 <= k <= count:
    raise ValueError(f"nearest: k={k} of {count} rows")
  devices = mesh.size if mesh is not None else 1
  rows = -(-count // devices)  # per device
  chunk = min(bank_chunk, rows)
  rows = -(-rows // chunk) * chunk
  padded = np.pad(np.asarray(bank, np.float32), ((0, rows * devices - count), (0, 0)))
  resident = _put(padded, mesh, P(mesh.axis_names) if mesh is not None else P())

  query_chunk = min(query_chunk, len(queries))
  similarity, index = [], []
  for start in range(0, len(queries), max(query_chunk, 1)):
    block = np.asarray(queries[start : start + query_chunk], np.float32)
    size = len(block)
    block = _put(np.pad(block, ((0, query_chunk - size), (0, 0))), mesh, P())
    found, where = _search(
      block,
      resident,
      jnp.int32(count) if mesh is None else _put(np.int32(count), mesh, P()),
      k=k,
      chunk=chunk,
      mesh=mesh,
    )
    similarity.append(np.asarray(found)[:size])
    index.append(np.asarray(where)[:size])
  empty = np.zeros((0, k))
  return Neighbors(
    np.concatenate([empty.astype(np.float32), *similarity]), np.concatenate([empty.astype(np.int32), *index])
  )


def _put(x: np.ndarray, mesh: Mesh | None, spec: P) -> Array:
  if mesh is None:
    return jnp.asarray(x)
  return jax.make_array_from_callback(np.shape(x), NamedSharding(mesh, spec), lambda i: np.asarray(x)[i])


@functools.partial(jax.jit, static_argnames=("k", "chunk", "mesh"))
def _search(queries: Array, bank: Array, count: Array, *, k: int, chunk: int, mesh: Mesh | None) -> tuple[Array, Array]:
  if mesh is None:
    return _scan(queries, bank, count, jnp.int32(0), k=k, chunk=chunk)
  axes = mesh.axis_names

  def local(queries: Array, bank: Array, count: Array) -> tuple[Array, Array]:
    first = (jax.lax.axis_index(axes) * bank.shape[0]).astype(jnp.int32)
    best, index = _scan(queries, bank, count, first, k=k, chunk=chunk)
    # Devices are gathered in the order of their rows, so that ties still go to the lower index.
    best = jax.lax.all_gather(best, axes, axis=1, tiled=True)
    index = jax.lax.all_gather(index, axes, axis=1, tiled=True)
    best, position = jax.lax.top_k(best, k)
    return best, jnp.take_along_axis(index, position, axis=1)

  return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(axes), P()), out_specs=(P(), P()), check_vma=False)(
    queries, bank, count
  )


def _scan(queries: Array, bank: Array, count: Array, first: Array, *, k: int, chunk: int) -> tuple[Array, Array]:
  """The k best of `bank` [R, D], whose row 0 is row `first` of the whole bank; rows from `count` on are padding."""

  def body(carry: tuple[Array, Array], item: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
    best, index = carry
    part, start = item
    similarity = jnp.matmul(queries, part.T, precision=jax.lax.Precision.HIGHEST)
    rows = start + jnp.arange(chunk, dtype=jnp.int32)
    similarity = jnp.where(rows < count, similarity, -jnp.inf)
    # Earlier rows come first and top_k keeps the first of equals, so that ties go to the lower index.
    both = jnp.concatenate([best, similarity], axis=1)
    indices = jnp.concatenate([index, jnp.broadcast_to(rows, similarity.shape)], axis=1)
    best, position = jax.lax.top_k(both, k)
    return (best, jnp.take_along_axis(indices, position, axis=1)), None

  parts = bank.reshape(-1, chunk, bank.shape[1])
  starts = first + chunk * jnp.arange(parts.shape[0], dtype=jnp.int32)
  empty = jnp.full((queries.shape[0], k), -jnp.inf), jnp.zeros((queries.shape[0], k), jnp.int32)
  return jax.lax.scan(body, empty, (parts, starts))[0]


def votes(neighbors: Neighbors, *, labels: np.ndarray, k: int, temperature: float, num_classes: int) -> np.ndarray:
  """Sums of exp(similarity / T) of the k nearest, by class (arXiv 1805.01978, section 3.4; DINO's eval_knn).

  Args:
    neighbors: at least k per query.
    labels: [N] classes of the bank's rows.
    k: how many neighbors vote.
    temperature: T.
    num_classes: C.

  Returns:
    [Q, C] float64, in units of the vote of the query's nearest neighbor, so that no temperature over- or underflows.
  """
  similarity = neighbors.similarity[:, :k].astype(np.float64)
  weights = np.exp((similarity - similarity[:, :1]) / temperature)
  out = np.zeros((len(weights), num_classes))
  np.add.at(out, (np.arange(len(weights))[:, None], labels[neighbors.index[:, :k]]), weights)
  return out


def top_k_accuracy(vote: np.ndarray, *, labels: np.ndarray, k: int) -> float:
  """Percent of queries whose label has a vote among the k largest; a class without any vote is never credited."""
  order = np.argsort(-vote, axis=1, kind="stable")[:, :k]
  voted = np.take_along_axis(vote, order, axis=1) > 0
  return 100.0 * float(np.mean(np.any((order == labels[:, None]) & voted, axis=1)))
