"""Power iteration clustering on a nearest-neighbor graph: clusters without k-means and without a given number of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse
from jax.sharding import Mesh

from big_ssl.ops import knn


@dataclasses.dataclass(frozen=True)
class Graph:
  """Row i holds the k nearest other rows of row i, nearest first.

  Attributes:
    index: [N, k] int32.
    distance: [N, k] float32, squared.
  """

  index: np.ndarray
  distance: np.ndarray


def power_iteration_clustering(
  x: np.ndarray,
  *,
  neighbors: int = 5,
  sigma: float = 0.2,
  alpha: float = 1e-3,
  iterations: int = 200,
  mesh: Mesh | None = None,
) -> np.ndarray:
  """Clusters the rows of x as PIC does in DeepCluster (arXiv 1807.05520, section 3; public code).

    A_ij = exp(-|x_i - x_j|^2 / sigma^2) for the k nearest j of i,   W = A + A^T
    v <- alpha W v + (1 - alpha) / N, divided by its sum,            from v = 1/N
    i points to the j with the largest W_ij (v_j - v_i) where that is positive, else to itself

  Following the pointers ends in a local maximum of v, and all that end in the same one are a cluster. A cluster of one
  row joins that of its nearest neighbor, among the k, that is not alone either.

  Args:
    x: [N, D].
    neighbors: k, at most N - 1.
    sigma, alpha, iterations: as above.
    mesh: the search of the neighbors is spread over it.

  Returns:
    [N] int32, clusters numbered from 0 without gaps.

  Raises:
    ValueError: there are not enough rows for k neighbors.
  """
  graph = nearest_neighbors(x, k=neighbors, mesh=mesh)
  return distribute_singletons(partition(graph, sigma=sigma, alpha=alpha, iterations=iterations), graph=graph)


def nearest_neighbors(x: np.ndarray, *, k: int, mesh: Mesh | None = None) -> Graph:
  """The exact k nearest other rows of every row by Euclidean distance.

  Raises:
    ValueError: k is not in 1 ... N - 1.
  """
  count = len(x)
  if not 1 <= k < count:
    raise ValueError(f"nearest neighbors: k={k} of {count} rows; at most {count - 1} are possible")
  x = np.asarray(x, np.float32)
  x = x - x.mean(axis=0)
  # -|q - b|^2 / 2 is <(q, 1), (b, -|b|^2 / 2)> up to a term that all candidates of q share.
  bank = np.concatenate([x, -0.5 * np.sum(x * x, axis=1, keepdims=True)], axis=1)
  queries = np.concatenate([x, np.ones((count, 1), np.float32)], axis=1)
  # Twice as many are compared again by their differences, whose rounding does not grow with the norms.
  wide = min(2 * k + 2, count)
  found = knn.nearest(queries, bank=bank, k=wide, mesh=mesh).index
  distance = np.empty((count, wide), np.float32)
  for start in range(0, count, 1024):
    part = slice(start, start + 1024)
    distance[part] = np.sum((x[part, None] - x[found[part]]) ** 2, axis=2)
  distance[found == np.arange(count)[:, None]] = np.inf  # a row is not its own neighbor
  order = np.argsort(distance, axis=1, kind="stable")[:, :k]
  return Graph(np.take_along_axis(found, order, axis=1), np.take_along_axis(distance, order, axis=1))


def memory(*, rows: int, dim: int, neighbors: int = 5) -> int:
  """Bytes at the peak: the rows as queries and as bank, a column more, candidates of each, edges of the graph."""
  candidates, edges = 2 * neighbors + 2, 2 * neighbors  # edges in both directions
  return 4 * rows * (2 * (dim + 1) + 4 * candidates + 8 * edges)


def partition(graph: Graph, *, sigma: float, alpha: float, iterations: int) -> np.ndarray:
  """The clusters of `power_iteration_clustering` before those of one row are distributed, [N] int32."""
  count, k = graph.index.shape
  affinity = np.exp(-graph.distance / np.float32(sigma**2)).astype(np.float32)
  rows = np.repeat(np.arange(count), k)
  directed = scipy.sparse.csr_matrix((affinity.ravel(), (rows, graph.index.ravel())), shape=(count, count))
  weights = (directed + directed.T).tocsr()
  v = np.full(count, 1 / count, np.float32)
  for _ in range(iterations):
    v = np.float32(alpha) * (weights @ v) + np.float32((1 - alpha) / count)
    v = v / np.abs(v).sum()
  return _follow(_best_neighbor(weights, v))


def _best_neighbor(weights: scipy.sparse.csr_matrix, v: np.ndarray) -> np.ndarray:
  """Where each row points to, [N]: of equally good neighbors the first; itself where none is better."""
  edges = weights.tocoo()
  gain = edges.data * (v[edges.col] - v[edges.row])
  order = np.lexsort((edges.col, -gain, edges.row))
  row, first = np.unique(edges.row[order], return_index=True)
  best = order[first]
  pointers = np.arange(len(v))
  uphill = gain[best] > 0
  pointers[row[uphill]] = edges.col[best[uphill]]
  return pointers


def _follow(pointers: np.ndarray) -> np.ndarray:
  """Numbers the ends of the pointers' paths, in the order of the rows they are; paths double in length each time."""
  end = pointers
  while not np.array_equal(end, end[end]):
    end = end[end]
  return np.unique(end, return_inverse=True)[1].astype(np.int32)


def distribute_singletons(labels: np.ndarray, *, graph: Graph) -> np.ndarray:
  """Moves every row that is alone in its cluster to that of its nearest neighbor that is not; without one it stays alone.

  Returns:
    [N] int32, numbered anew without gaps.
  """
  alone = np.bincount(labels)[labels] == 1
  company = ~alone[graph.index]  # [N, k]
  nearest = np.take_along_axis(graph.index, company.argmax(axis=1)[:, None], axis=1)[:, 0]
  moves = alone & company.any(axis=1)
  return np.unique(np.where(moves, labels[nearest], labels), return_inverse=True)[1].astype(np.int32)
