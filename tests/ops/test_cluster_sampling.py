"""The sampler against the statistics of the reference, and its limit of repeats."""

import numpy as np
import pytest

from big_ssl.ops.cluster_sampling import quotas, uniform_over_clusters

RUNS = 400


def test_quota_is_that_of_the_reference(golden):
  z = golden("deepcluster_sampler")
  filled = z["cluster_sizes"] > 0
  np.testing.assert_array_equal(quotas(z["cluster_sizes"], total=int(z["N"])), np.where(filled, z["quota"], 0))


def test_draws_per_cluster_and_per_image_are_within_four_sigma_of_the_reference(golden):
  z = golden("deepcluster_sampler")
  labels, total = z["labels"], int(z["N"])
  orders = [uniform_over_clusters(labels, rng=np.random.default_rng([7, run])) for run in range(RUNS)]
  clusters = np.array([np.bincount(labels[o], minlength=9) for o in orders])
  images = np.array([np.bincount(o, minlength=total) for o in orders])
  sigma = z["per_cluster_std"] / np.sqrt(RUNS)
  assert np.all(
    np.abs(clusters.mean(0) - z["per_cluster_mean"]) <= 4 * np.sqrt(2) * sigma
  )  # both means are of 400 draws
  np.testing.assert_allclose(clusters.std(0), z["per_cluster_std"], rtol=0.2)
  # Of 300 images, some are 4 sigma away by chance: 1 in 16,000 for a normal one.
  spread = images.std(0) * np.sqrt(2 / RUNS)
  assert np.all(np.abs(images.mean(0) - z["per_image_mean"]) <= 4.5 * spread)
  assert all(len(o) == total for o in orders)


def test_large_clusters_are_drawn_without_and_small_ones_with_replacement(golden):
  z = golden("deepcluster_sampler")
  labels = z["labels"]
  orders = [uniform_over_clusters(labels, rng=np.random.default_rng(run)) for run in range(50)]
  most = np.array([[np.bincount(o, minlength=300)[labels == c].max() for c in range(7)] for o in orders]).max(0)
  np.testing.assert_array_equal(most > 1, z["with_replacement"][:7])


def test_the_order_is_a_function_of_the_generator_alone(golden):
  labels = golden("deepcluster_sampler")["labels"]
  a, b, c = (uniform_over_clusters(labels, rng=np.random.default_rng(s)) for s in ([0, 1], [0, 1], [0, 2]))
  assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_one_cluster_that_holds_nearly_all_images_gets_no_more_draws_than_the_others():
  labels = np.zeros(1000, int)
  labels[:9] = np.arange(1, 10)  # nine clusters of one image
  counts = np.bincount(labels[uniform_over_clusters(labels, rng=np.random.default_rng(0))])
  assert counts.max() - counts.min() <= 5 and counts.sum() == 1000


@pytest.mark.parametrize("limit", [1, 3])
def test_no_image_comes_oftener_than_max_repeats_and_the_epoch_keeps_its_length(limit):
  labels = np.zeros(1000, int)
  labels[:9] = np.arange(1, 10)
  order = uniform_over_clusters(labels, rng=np.random.default_rng(0), max_repeats=limit)
  assert len(order) == 1000 and np.bincount(order).max() <= limit
  free = uniform_over_clusters(labels, rng=np.random.default_rng(0))
  assert np.bincount(free).max() > 3


def test_images_without_a_cluster_are_never_drawn_and_none_at_all_is_an_error():
  labels = np.array([-100, 0, 1, 1, -100, 0])
  order = uniform_over_clusters(labels, rng=np.random.default_rng(0))
  assert len(order) == 6 and not {0, 4} & set(order.tolist())
  with pytest.raises(ValueError, match="no image has a cluster"):
    uniform_over_clusters(np.full(5, -100), rng=np.random.default_rng(0))
  # Six draws of four images take two of some, whatever the limit.
  assert np.bincount(uniform_over_clusters(labels, rng=np.random.default_rng(0), max_repeats=1)).max() == 2
