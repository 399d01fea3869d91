"""Power iteration clustering against the reference, and its graph against brute force."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from big_ssl.ops import power_iteration as pic


def same_partition(a, b):
  pairs = set(zip(a.tolist(), b.tolist(), strict=True))
  return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def test_the_graph_and_both_partitions_match_the_reference(golden):
  z = golden("deepcluster_pic")
  graph = pic.nearest_neighbors(z["data"], k=5)
  np.testing.assert_array_equal(graph.index, z["knn_idx"][:, 1:])
  np.testing.assert_allclose(graph.distance, z["knn_sq_dist"][:, 1:], rtol=1e-4)
  raw = pic.partition(graph, sigma=0.2, alpha=1e-3, iterations=200)
  assert raw.max() + 1 == z["n_clusters_raw"] and same_partition(raw, z["labels_raw"])
  labels = pic.power_iteration_clustering(z["data"])
  assert same_partition(labels, z["labels_final"])
  assert sorted(set(labels.tolist())) == list(range(labels.max() + 1))


def test_the_search_spread_over_devices_gives_the_same_partition(golden):
  x = golden("deepcluster_pic")["data"]
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  np.testing.assert_array_equal(pic.power_iteration_clustering(x, mesh=mesh), pic.power_iteration_clustering(x))


def test_the_graph_is_exact_far_from_the_origin_and_skips_the_row_itself_among_duplicates():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(60, 4)).astype(np.float32) + 50
  x[10:17] = x[10]
  graph = pic.nearest_neighbors(x, k=5)
  distance = ((x[:, None].astype(np.float64) - x) ** 2).sum(-1)
  np.fill_diagonal(distance, np.inf)
  assert not np.any(graph.index == np.arange(60)[:, None])
  np.testing.assert_allclose(graph.distance, np.sort(distance, axis=1)[:, :5], rtol=1e-3, atol=1e-6)


def test_separate_groups_are_separate_clusters():
  rng = np.random.default_rng(0)
  groups = np.repeat(np.arange(4), 25)
  x = (10 * np.eye(4)[groups] + 0.05 * rng.normal(size=(100, 4))).astype(np.float32)
  labels = pic.power_iteration_clustering(x)
  assert all(len(set(groups[labels == c])) == 1 for c in range(labels.max() + 1)) and labels.max() + 1 >= 4


def test_a_row_alone_joins_its_nearest_neighbor_that_is_not_alone_and_else_stays():
  labels = np.array([0, 1, 1, 2, 3])
  index = np.array([[3, 1], [2, 0], [1, 0], [0, 4], [3, 0]])
  graph = pic.Graph(index, np.ones((5, 2), np.float32))
  np.testing.assert_array_equal(pic.distribute_singletons(labels, graph=graph), [0, 0, 0, 1, 2])


@pytest.mark.parametrize("k", [0, 6])
def test_more_neighbors_than_other_rows_are_an_error(k):
  with pytest.raises(ValueError, match=f"k={k} of 6 rows; at most 5"):
    pic.nearest_neighbors(np.eye(6, dtype=np.float32), k=k)
