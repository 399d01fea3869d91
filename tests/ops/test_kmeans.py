"""k-means: reference runs, empty clusters, chunks and shards."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from big_ssl.ops import kmeans


def mesh_of(devices):
  return jax.make_mesh(
    (devices, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices]
  )


def blobs(n=500, d=8, k=12, seed=0):
  rng = np.random.default_rng(seed)
  return (3 * rng.normal(size=(k, d))[rng.integers(0, k, n)] + rng.normal(size=(n, d))).astype(np.float32)


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("head", [0, 1, 2])
def test_spherical_clusters_match_the_reference_with_an_empty_one(golden, iterations, head):
  z = golden("deepclusterv2_kmeans")
  x = z["memory_embeddings"][int(z[f"head{head}/memory_bank"])]
  start = x[z[f"head{head}/initial_centroid_rows"]]
  found = kmeans.spherical_kmeans(x, centroids=start, iterations=iterations, chunk=17)
  np.testing.assert_array_equal(found.assignments, z[f"iters{iterations}/assignments"][head][z["memory_index"]])
  np.testing.assert_allclose(found.centroids, z[f"iters{iterations}/head{head}/centroids"], atol=1e-6)
  assert (found.counts == 0).sum() == z[f"iters{iterations}/head{head}/empty_clusters"]


def test_euclidean_clusters_match_the_reference(golden):
  z = golden("deepcluster_kmeans")
  rng = np.random.default_rng(0)
  for t in range(7):
    found = kmeans.kmeans(z["data"], clusters=8, rng=rng, iterations=t, start=z["init_centroids"], chunk=33)
    centroids = z["init_centroids"] if t == 0 else z["centroids_after"][t - 1]
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-5)
    np.testing.assert_array_equal(found.assignments, z["assign_init"] if t == 0 else z["assign_after"][t - 1])
    np.testing.assert_allclose(found.objective[:-1], z["objective"][:t], rtol=1e-5)
    np.testing.assert_array_equal(found.counts, np.bincount(found.assignments, minlength=8))
  np.testing.assert_allclose(found.objective[-1], z["final_sq_dist"].sum(), rtol=1e-5)


def test_two_workers_of_deeper_cluster_found_the_same(golden):
  z = golden("deepercluster_kmeans")
  mesh = mesh_of(int(z["world"]))
  found = kmeans.kmeans(
    z["data"],
    clusters=7,
    rng=None,
    iterations=int(z["niter"]),
    start=z["init_centroids"],
    chunk=int(z["batch"]),
    mesh=mesh,
  )
  np.testing.assert_array_equal(found.assignments, z["labels"])
  np.testing.assert_allclose(found.centroids, z["centroids"], atol=1e-5)


def test_an_empty_cluster_takes_half_of_its_donor_as_in_the_reference(golden, monkeypatch):
  z = golden("deepcluster_kmeans")
  split = kmeans.split_empty(z["empty_means"], empty=z["empty_ids"], donors=z["empty_donors"])
  np.testing.assert_allclose(split, z["empty_centroids_after_split"], rtol=1e-6)
  monkeypatch.setattr(kmeans, "draw_donors", lambda counts, rng: z["empty_donors"])
  found = kmeans.kmeans(z["data"], clusters=8, rng=None, iterations=1, start=z["empty_init_centroids"])
  np.testing.assert_allclose(found.centroids, z["empty_centroids_after_split"], atol=1e-5)
  clear = z["empty_next_margin"] > 1e-5
  np.testing.assert_array_equal(found.assignments[clear], z["empty_assign_next"][clear])
  assert found.repairs == 2


def test_donors_are_drawn_in_proportion_to_their_members_above_one():
  counts, rng = np.array([1, 0, 3, 5, 0, 3], float), np.random.default_rng(0)
  first = np.array([kmeans.draw_donors(counts, rng=rng)[0] for _ in range(4000)])
  # The walk from 0 takes j with p_j = (count - 1) / (12 - 6), given that none before was taken.
  p = np.maximum(counts - 1, 0) / 6
  reach = np.cumprod(np.concatenate([[1], 1 - p[:-1]])) * p
  expected = reach / reach.sum()
  observed = np.bincount(first, minlength=6) / 4000
  assert np.abs(observed - expected).max() < 4 * np.sqrt(0.25 / 4000), (observed, expected)
  assert set(first) == {2, 3, 5}


def test_donors_exist_even_when_all_rows_are_in_one_of_as_many_clusters_as_rows():
  assert len(kmeans.draw_donors(np.array([4.0, 0, 0, 0]), rng=np.random.default_rng(0))) == 3


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_any_number_of_devices_gives_the_same_clusters(devices):
  x = blobs()
  one = kmeans.kmeans(x, clusters=40, rng=np.random.default_rng(1), iterations=20, chunk=32)
  found = kmeans.kmeans(x, clusters=40, rng=np.random.default_rng(1), iterations=20, chunk=32, mesh=mesh_of(devices))
  np.testing.assert_array_equal(found.assignments, one.assignments)
  np.testing.assert_allclose(found.centroids, one.centroids, atol=1e-5)
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  one = kmeans.spherical_kmeans(unit, centroids=unit[:40], iterations=10, chunk=32)
  found = kmeans.spherical_kmeans(unit, centroids=unit[:40], iterations=10, chunk=32, mesh=mesh_of(devices))
  np.testing.assert_array_equal(found.assignments, one.assignments)
  np.testing.assert_allclose(found.centroids, one.centroids, atol=1e-5)


def test_chunks_and_the_order_of_the_rows_change_only_rounding():
  x, order = blobs(), np.random.default_rng(5).permutation(500)
  whole = kmeans.kmeans(x, clusters=12, rng=None, start=x[:12])
  for chunk in (1, 7, 500, 4096):
    found = kmeans.kmeans(x[order], clusters=12, rng=None, start=x[:12], chunk=chunk)
    np.testing.assert_array_equal(found.assignments, whole.assignments[order])
    np.testing.assert_allclose(found.centroids, whole.centroids, atol=1e-5)


def test_the_objective_falls_and_twenty_iterations_with_repairs_leave_few_clusters_empty():
  x = blobs()
  x[:100] = x[0]  # duplicates start the same cluster several times
  found = kmeans.kmeans(x, clusters=100, rng=np.random.default_rng(0))
  assert found.repairs > 0 and len(found.objective) == 21
  assert (found.counts > 0).sum() >= 90 and found.counts.sum() == 500
  calm = kmeans.kmeans(blobs(), clusters=12, rng=np.random.default_rng(0))
  assert calm.repairs == 0 and np.all(np.diff(calm.objective) <= 1e-4 * calm.objective[0])


def test_another_seed_starts_from_other_rows():
  x = blobs()
  runs = [kmeans.kmeans(x, clusters=12, rng=np.random.default_rng(s), iterations=0) for s in (0, 0, 1)]
  assert np.array_equal(runs[0].centroids, runs[1].centroids) and not np.array_equal(
    runs[0].centroids, runs[2].centroids
  )
  assert all(any(np.array_equal(c, row) for row in x) for c in runs[0].centroids)


def test_the_distance_matrix_never_exists_whole_and_the_stated_memory_is_kept():
  rows, clusters, dim, chunk = 4096, 512, 16, 64
  shape = jax.ShapeDtypeStruct
  compiled = kmeans._assign_and_sum.lower(
    shape((rows // chunk, 1, chunk, dim), np.float32),
    shape((clusters, dim), np.float32),
    shape((), np.int32),
    mesh=None,
    spherical=False,
  ).compile()
  analysis = compiled.memory_analysis()
  used = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
  assert used <= kmeans.memory(rows=rows, dim=dim, clusters=clusters, chunk=chunk) < 4 * rows * clusters


@pytest.mark.parametrize("clusters,message", [(1, "1 clusters of 20 rows"), (21, "21 clusters of 20 rows")])
def test_an_impossible_number_of_clusters_is_an_error(clusters, message):
  x = blobs(20)
  with pytest.raises(ValueError, match=message):
    kmeans.kmeans(x, clusters=clusters, rng=np.random.default_rng(0))
  with pytest.raises(ValueError, match=message):
    kmeans.spherical_kmeans(x, centroids=np.zeros((clusters, 8), np.float32), iterations=1)


def test_the_first_row_that_is_not_finite_is_named():
  x = blobs(20)
  x[13, 2], x[7, 1] = np.nan, np.inf
  with pytest.raises(ValueError, match="row 7 of the features"):
    kmeans.kmeans(x, clusters=3, rng=np.random.default_rng(0))
