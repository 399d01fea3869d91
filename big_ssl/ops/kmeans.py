"""k-means in bounded memory, the rows spread over a mesh: Euclidean (DeepCluster) and spherical (DeepCluster-v2).

Rows are cut into chunks whose size does not depend on the devices, dealt out in turn, and the sums of the chunks are added
in the order of the rows. Every device count therefore gives the same sums, and with them the same assignments.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import Array

SPLIT = 1 / 1024  # share by which the two halves of a split cluster are moved apart


@dataclasses.dataclass(frozen=True)
class KMeans:
  """A clustering of N rows.

  Attributes:
    centroids: [K, D] float32.
    assignments: [N] int32, the nearest of `centroids`; of equally near ones the lowest.
    counts: [K] int32, members by `assignments`; a cluster may be empty.
    objective: [iterations + 1] float64, what every E step found, the last one with `centroids`: the sum of squared
      distances, or of cosines.
    repairs: empty clusters that were split off another one, over all iterations.
  """

  centroids: np.ndarray
  assignments: np.ndarray
  counts: np.ndarray
  objective: np.ndarray
  repairs: int = 0


def kmeans(
  x: np.ndarray,
  *,
  clusters: int,
  rng: np.random.Generator,
  iterations: int = 20,
  start: np.ndarray | None = None,
  mesh: Mesh | None = None,
  chunk: int = 4096,
) -> KMeans:
  """Lloyd's algorithm on squared distances, from random rows, then a last E step (arXiv 1807.05520; rules of faiss).

  After every M step each empty cluster takes half of another one, see `split_empty`. Products are float32 of full
  precision. Every process passes the same arrays and gets the same answer.

  Args:
    x: [N, D].
    clusters: K, from 2 to N.
    rng: draws the first centroids and the donors of empty clusters.
    iterations: E and M steps.
    start: [K, D] first centroids instead of random rows.
    mesh: over all of whose devices the rows are spread; None is one device.
    chunk: rows at a time; see `memory`.

  Raises:
    ValueError: K is out of range, or a row is not finite (the first one is named).
  """
  check(x, clusters=clusters)
  if start is None:
    start = x[rng.choice(len(x), clusters, replace=False)]
  centroids = np.array(start, np.float32)
  rows = _place(x, mesh=mesh, chunk=chunk)
  objective, repairs = [], 0
  for _ in range(iterations):
    found = _step(rows, centroids, len(x), mesh=mesh, spherical=False)
    objective.append(found.objective)
    counts = found.counts.astype(np.float32)
    centroids = found.sums / np.maximum(counts, 1)[:, None]
    empty = np.flatnonzero(counts == 0)
    repairs += len(empty)
    if len(empty):
      donors = draw_donors(counts, rng=rng)
      centroids = split_empty(centroids, empty=empty, donors=donors)
  found = _step(rows, centroids, len(x), mesh=mesh, spherical=False)
  assignments = np.asarray(found.assignments).reshape(-1)[: len(x)]
  return KMeans(centroids, assignments, found.counts, np.array([*objective, found.objective]), repairs)


def spherical_kmeans(
  x: np.ndarray, *, centroids: np.ndarray, iterations: int, mesh: Mesh | None = None, chunk: int = 4096
) -> KMeans:
  """k-means on inner products, from given centroids, then a last E step (arXiv 2006.09882, appendix D.2; public code).

  E: the largest inner product. M: the mean of the members; an EMPTY cluster keeps its centroid; all are l2-normalized.

  Args:
    x: [N, D], l2-normalized.
    centroids: [K, D], the first ones, used as they are.
    iterations: E and M steps; 0 only assigns.
    mesh, chunk: as in `kmeans`.

  Raises:
    ValueError: K is not in 2 ... N, or a row is not finite (the first one is named).
  """
  check(x, clusters=len(centroids))
  centroids = np.array(centroids, np.float32)
  rows = _place(x, mesh=mesh, chunk=chunk)
  objective = []
  for _ in range(iterations):
    found = _step(rows, centroids, len(x), mesh=mesh, spherical=True)
    objective.append(found.objective)
    counts = found.counts.astype(np.float32)[:, None]
    centroids = np.where(counts > 0, found.sums / np.maximum(counts, 1), centroids)
    centroids = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
  found = _step(rows, centroids, len(x), mesh=mesh, spherical=True)
  assignments = np.asarray(found.assignments).reshape(-1)[: len(x)]
  return KMeans(centroids, assignments, found.counts, np.array([*objective, found.objective]))


def current_mesh() -> Mesh | None:
  """The mesh that `jax.set_mesh` has made current, as it is inside `Method.refresh`; None outside."""
  mesh = jax.sharding.get_mesh()
  return None if mesh.empty else mesh


def check(x: np.ndarray, *, clusters: int) -> None:
  """Raises ValueError where `x` [N, D] cannot be cut into `clusters`: too few or too many, or a row with a NaN or an infinity."""
  if not 2 <= clusters <= len(x):
    raise ValueError(f"k-means: {clusters} clusters of {len(x)} rows; at least 2 and at most one per row are possible")
  row = first_nonfinite_row(x)
  if row is not None:
    raise ValueError(f"k-means: row {row} of the features is not finite")


def first_nonfinite_row(x: np.ndarray, *, chunk: int = 4096) -> int | None:
  """Index of the first row of `x` [N, D] with a NaN or an infinity; None where there is none."""
  for start in range(0, len(x), chunk):
    bad = ~np.isfinite(x[start : start + chunk]).all(axis=1)
    if bad.any():
      return start + int(np.argmax(bad))
  return None


def memory(*, rows: int, dim: int, clusters: int, devices: int = 1, chunk: int = 4096) -> int:
  """Bytes that each device holds at the peak: its rows, scores and one-hot members of a chunk, and the sums of every device."""
  chunk = min(chunk, rows)
  rounds = -(-rows // (chunk * devices))
  return 4 * (rounds * chunk * dim + 2 * chunk * clusters + (devices + 3) * clusters * dim + rounds * chunk * devices)


def draw_donors(counts: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
  """Which cluster each empty one is split off, in ascending order of the empty ones; faiss' rule.

  Walking over the clusters from 0, cluster j is taken with probability (count_j - 1) / (N - K); its count is then halved.

  Args:
    counts: [K] members.

  Returns:
    [E] indices.
  """
  counts = np.array(counts, np.float64)
  spare = max(counts.sum() - len(counts), 1)
  donors = []
  for empty in np.flatnonzero(counts == 0):
    taken = np.zeros(0, int)
    while not len(taken):  # one walk over all clusters; some count is above 1 as long as one is 0
      taken = np.flatnonzero(rng.random(len(counts)) < (counts - 1) / spare)
    counts[empty] = counts[taken[0]] / 2
    counts[taken[0]] -= counts[empty]
    donors.append(taken[0])
  return np.array(donors, int)


def split_empty(centroids: np.ndarray, *, empty: np.ndarray, donors: np.ndarray) -> np.ndarray:
  """Gives empty cluster e the centroid of its donor m: c_e = c_m (1 + s/1024), c_m = c_m (1 - s/1024), s = 1, -1, 1, ... by dimension."""
  centroids = np.array(centroids, np.float32)
  sign = np.where(np.arange(centroids.shape[1]) % 2 == 0, 1, -1)
  up, down = (1 + sign * SPLIT).astype(np.float32), (1 - sign * SPLIT).astype(np.float32)
  for e, m in zip(empty, donors, strict=True):
    centroids[e], centroids[m] = centroids[m] * up, centroids[m] * down
  return centroids


@dataclasses.dataclass(frozen=True)
class _Found:
  assignments: Array
  sums: np.ndarray
  counts: np.ndarray
  objective: float


def _place(x: np.ndarray, *, mesh: Mesh | None, chunk: int) -> Array:
  """x [N, D] as [rounds, devices, chunk, D], split over the devices: chunk i is in round i // devices. Zeros pad the end."""
  devices = mesh.size if mesh is not None else 1
  chunk = min(chunk, len(x))
  rounds = -(-len(x) // (chunk * devices))
  shape = (rounds, devices, chunk, x.shape[1])

  def block(index: tuple[slice, ...]) -> np.ndarray:
    columns = range(devices)[index[1]]
    out = np.zeros((rounds, len(columns), chunk, x.shape[1]), np.float32)
    for i in range(rounds):
      for j, device in enumerate(columns):
        first = (i * devices + device) * chunk
        part = x[first : first + chunk]
        out[i, j, : len(part)] = part
    return out

  if mesh is None:
    return jnp.asarray(block((slice(None),) * 4))
  return jax.make_array_from_callback(shape, NamedSharding(mesh, P(None, mesh.axis_names)), block)


def _step(rows: Array, centroids: np.ndarray, count: int, *, mesh: Mesh | None, spherical: bool) -> _Found:
  centroids, count = np.asarray(centroids, np.float32), np.int32(count)
  if mesh is not None:
    replicated = NamedSharding(mesh, P())
    centroids = jax.make_array_from_callback(centroids.shape, replicated, lambda i, c=centroids: c[i])
    count = jax.make_array_from_callback((), replicated, lambda i, c=count: c)
  found = _assign_and_sum(rows, jnp.asarray(centroids), jnp.asarray(count), mesh=mesh, spherical=spherical)
  objective = float(np.asarray(found["objective"], np.float64).sum())
  return _Found(found["assignments"], np.asarray(found["sums"]), np.asarray(found["counts"]), objective)


@functools.partial(jax.jit, static_argnames=("mesh", "spherical"))
def _assign_and_sum(
  rows: Array, centroids: Array, count: Array, *, mesh: Mesh | None, spherical: bool
) -> dict[str, Array]:
  """One E step and the sums of its M step.

  Returns:
    assignments [rounds, devices, chunk], sums [K, D], counts [K], objective [rounds, devices]; on every device.
  """
  if mesh is None:
    return _scan(rows, centroids, count, spherical=spherical, devices=1, axes=None)
  scan = functools.partial(_scan, spherical=spherical, devices=mesh.size, axes=mesh.axis_names)
  spec = P(None, mesh.axis_names)
  return jax.shard_map(scan, mesh=mesh, in_specs=(spec, P(), P()), out_specs=P(), check_vma=False)(
    rows, centroids, count
  )


def _scan(
  rows: Array, centroids: Array, count: Array, *, spherical: bool, devices: int, axes: tuple[str, ...] | None
) -> dict[str, Array]:
  """The chunks of this device, rows [rounds, 1, chunk, D], one per round; after each round all devices' sums are added in order."""
  clusters, chunk = centroids.shape[0], rows.shape[2]
  half_norms = jnp.zeros(clusters) if spherical else 0.5 * jnp.sum(centroids * centroids, axis=1)
  device = jnp.int32(0) if axes is None else jax.lax.axis_index(axes).astype(jnp.int32)
  gather = (lambda a: a[None]) if axes is None else functools.partial(jax.lax.all_gather, axis_name=axes)

  def body(carry: tuple[Array, Array], item: tuple[Array, Array]) -> tuple[tuple[Array, Array], dict[str, Array]]:
    sums, counts = carry
    part, turn = item
    scores = jnp.matmul(part, centroids.T, precision=jax.lax.Precision.HIGHEST) - half_norms
    valid = (turn * devices + device) * chunk + jnp.arange(chunk, dtype=jnp.int32) < count
    # No row of a one-hot matrix for the padding. A product, since a scatter adds in another order each time on a GPU.
    assigned = jnp.where(valid, jnp.argmax(scores, axis=1).astype(jnp.int32), clusters)
    members = jax.nn.one_hot(assigned, clusters)
    own = centroids[jnp.minimum(assigned, clusters - 1)]
    gain = jnp.sum(part * own if spherical else (part - own) ** 2, axis=1)
    every = gather(jnp.matmul(members.T, part, precision=jax.lax.Precision.HIGHEST))
    for i in range(devices):
      sums = sums + every[i]
    counts = counts + jnp.sum(gather(jnp.sum(members, axis=0)).astype(jnp.int32), axis=0)
    out = {"assignments": gather(assigned), "objective": gather(jnp.sum(jnp.where(valid, gain, 0.0)))}
    return (sums, counts), out

  start = jnp.zeros_like(centroids), jnp.zeros(clusters, jnp.int32)
  turns = jnp.arange(rows.shape[0], dtype=jnp.int32)
  (sums, counts), out = jax.lax.scan(body, start, (rows[:, 0], turns))
  return out | {"sums": sums, "counts": counts}
