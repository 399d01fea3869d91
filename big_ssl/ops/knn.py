"""Exact nearest neighbors and their weighted votes, in bounded memory, with the bank spread over a mesh."""

from __future__ import annotations

import dataclasses
import functools
import math

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


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a bank is laid over devices.

  Attributes:
    rows: of the bank on each device, with the padding.
    bank_chunk, query_chunk: rows at a time.
    bytes_per_device: of the bank's share and of what a chunk needs beside it.
  """

  rows: int
  bank_chunk: int
  query_chunk: int
  bytes_per_device: int


def plan(
  queries: int, *, bank: int, dim: int, k: int, devices: int = 1, bank_chunk: int = 16384, query_chunk: int = 4096
) -> Plan:
  """The layout that `nearest` uses for so many queries and rows of the bank, each of `dim` numbers."""
  rows = -(-bank // devices)
  chunk = min(bank_chunk, rows)
  rows = -(-rows // chunk) * chunk
  block = max(min(query_chunk, queries), 1)
  # Similarities, once more for their groups' maxima and the merge, and the k best with their index.
  working = 4 * block * (dim + 2 * (chunk + 4 * k))
  return Plan(rows, chunk, block, 4 * rows * dim + working)


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

  Each device holds its share of the bank and walks through it in chunks, in the memory that `plan` tells. The k best of
  every device are then merged. Similarities are float32 products of full precision. Every process passes the same arrays
  and gets the same answer.

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
  chunks = {"bank_chunk": bank_chunk, "query_chunk": query_chunk}
  layout = plan(len(queries), bank=count, dim=bank.shape[1], k=k, devices=devices, **chunks)
  resident = _put_rows(bank, mesh, count=layout.rows * devices)
  total = _put(np.int32(count), mesh)
  similarity, index = [np.zeros((0, k), np.float32)], [np.zeros((0, k), np.int32)]
  for start in range(0, len(queries), layout.query_chunk):
    block = np.asarray(queries[start : start + layout.query_chunk], np.float32)
    size = len(block)
    block = _put(np.pad(block, ((0, layout.query_chunk - size), (0, 0))), mesh)
    found, where = _search(block, resident, total, k=k, chunk=layout.bank_chunk, mesh=mesh)
    similarity.append(np.asarray(found)[:size])
    index.append(np.asarray(where)[:size])
  return Neighbors(np.concatenate(similarity), np.concatenate(index))


def _put(x: np.ndarray, mesh: Mesh | None) -> Array:
  """The same array on every device."""
  if mesh is None:
    return jnp.asarray(x)
  return jax.make_array_from_callback(np.shape(x), NamedSharding(mesh, P()), lambda i: np.asarray(x)[i])


def _put_rows(x: np.ndarray, mesh: Mesh | None, *, count: int) -> Array:
  """Rows spread over the devices, with zeros up to `count`; on the host only the rows of one device are copied at a time."""

  def rows(index: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = index[0].indices(count)
    part = np.asarray(x[start:stop], np.float32)
    return np.pad(part, ((0, stop - start - len(part)), (0, 0)))

  if mesh is None:
    return jnp.asarray(rows((slice(None),)))
  return jax.make_array_from_callback((count, x.shape[1]), NamedSharding(mesh, P(mesh.axis_names)), rows)


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
    found, position = _top(similarity, k=min(k, chunk))
    # Earlier rows come first and top_k keeps the first of equals, so that ties go to the lower index.
    both = jnp.concatenate([best, found], axis=1)
    indices = jnp.concatenate([index, start + position], axis=1)
    best, position = jax.lax.top_k(both, k)
    return (best, jnp.take_along_axis(indices, position, axis=1)), None

  parts = bank.reshape(-1, chunk, bank.shape[1])
  starts = first + chunk * jnp.arange(parts.shape[0], dtype=jnp.int32)
  empty = jnp.full((queries.shape[0], k), -jnp.inf), jnp.zeros((queries.shape[0], k), jnp.int32)
  return jax.lax.scan(body, empty, (parts, starts))[0]


def _top(x: Array, *, k: int) -> tuple[Array, Array]:
  """`lax.top_k` of rows [Q, N], of wide ones sooner: the k largest lie in the k groups of columns of the largest maxima.

  That holds with ties too: an element outside of these groups has k elements before it, the first maximum of each.
  """
  width = x.shape[1]
  size = 2 ** round(math.log2(max(width / k, 1)) / 2)  # the maxima and the elements of k groups are about equally many
  groups = width // size
  if width % size or groups + k * size > width / 8:  # no gain
    return jax.lax.top_k(x, k)
  grouped = x.reshape(x.shape[0], groups, size)
  chosen = jnp.sort(jax.lax.top_k(grouped.max(axis=2), k)[1], axis=1)  # in the order of the columns, for ties
  inside = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1).reshape(x.shape[0], k * size)
  best, position = jax.lax.top_k(inside, k)
  column = jnp.take_along_axis(chosen, position // size, axis=1) * size + position % size
  return best, column.astype(jnp.int32)


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


def accuracies(
  neighbors: Neighbors,
  *,
  labels: np.ndarray,
  query_labels: np.ndarray,
  k: int,
  temperature: float,
  num_classes: int,
  tops: tuple[int, ...] = (1, 5),
  chunk: int = 4096,
) -> dict[int, float]:
  """`top_k_accuracy` of `votes` for each of `tops`, with the votes of `chunk` queries at a time, 24 chunk C bytes."""
  hits = dict.fromkeys(tops, 0.0)
  for start in range(0, len(query_labels), chunk):
    rows = slice(start, start + chunk)
    part = Neighbors(neighbors.similarity[rows], neighbors.index[rows])
    vote = votes(part, labels=labels, k=k, temperature=temperature, num_classes=num_classes)
    for top in tops:
      hits[top] += top_k_accuracy(vote, labels=query_labels[rows], k=top) * len(vote)
  return {top: total / len(query_labels) for top, total in hits.items()}
