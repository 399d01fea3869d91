"""Equal partitions: the public solver's labels, on any number of devices and with any scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import UserError
from big_ssl.ops.transport import equipartition


def float64_solver(log_p, *, power, tolerance, max_iterations=5000):
  """The iteration as the paper writes it, in float64 logarithms: r = (1/K)/(M c), c = (1/N)/(M^T r)."""
  lse = np.logaddexp.reduce
  log_m = power * np.asarray(log_p, np.float64)
  rows, clusters = log_m.shape
  log_c = np.full(rows, -np.log(rows))
  for sweep in range(max_iterations):
    log_r = -np.log(clusters) - lse(log_m + log_c[:, None], axis=0)
    new = -np.log(rows) - lse(log_m + log_r, axis=1)
    error = np.sum(np.abs(np.expm1(log_c - new)))
    log_c = new
    if sweep % 10 == 0 and error <= tolerance:
      break
  plan = np.sort(log_m + log_r, axis=1)
  return np.argmax(log_m + log_r, axis=1), plan[:, -1] - plan[:, -2], sweep + 1


@pytest.mark.parametrize("prefix,power,tolerance", [("", 25.0, 0.1), ("cifar_", 10.0, 0.01)])
def test_labels_sweeps_and_errors_are_those_of_the_public_solver(golden, prefix, power, tolerance):
  z = golden("sela_sinkhorn")
  log_p = jax.nn.log_softmax(jnp.asarray(z["logits"]))
  out = equipartition(log_p, power=power, tolerance=tolerance, max_iterations=2000)
  clear = z["log_margin"] > 1e-4 if not prefix else slice(None)
  np.testing.assert_array_equal(out.labels[clear], z[f"{prefix}labels"][clear])
  assert out.iterations == z[f"{prefix}iterations"] and out.labels.dtype == np.int32
  if prefix:
    np.testing.assert_allclose(out.cost, z["cifar_cost"], rtol=1e-5)
    return
  np.testing.assert_allclose(out.errors, z["err_trace"], rtol=1e-4)
  assert np.abs(out.sizes - z["cluster_sizes"]).max() <= 1
  log_plan = power * log_p + out.log_r
  plan = jax.nn.softmax(log_plan, axis=1).T / len(log_p)
  np.testing.assert_allclose(plan, z["transport"], atol=1e-4 / len(log_p))


def scores(rows, clusters, scale, seed=0):
  rng = np.random.default_rng(seed)
  skew = rng.normal(size=clusters)  # some clusters are everyone's favorite
  return np.asarray(jax.nn.log_softmax(jnp.asarray(scale * (rng.normal(size=(rows, clusters)) + skew), jnp.float32)))


@pytest.mark.parametrize("rows,clusters,scale", [(600, 7, 0.3), (1000, 30, 2.0), (400, 12, 20.0)])
def test_sharp_and_flat_scores_agree_with_float64(rows, clusters, scale):
  log_p = scores(rows, clusters, scale)
  labels, margin, sweeps = float64_solver(log_p, power=25.0, tolerance=0.1)
  out = equipartition(jnp.asarray(log_p), power=25.0, tolerance=0.1, max_iterations=5000)
  wrong = (out.labels != labels) & (margin > 1e-3)
  assert abs(out.iterations - sweeps) <= 10 and not wrong.any(), (out.iterations, sweeps, wrong.sum())


def test_a_preference_of_all_images_for_one_cluster_is_balanced_away():
  log_p = scores(960, 8, 1.0).copy()
  log_p[:, 3] += 40.0
  out = equipartition(jnp.asarray(log_p), power=25.0, tolerance=0.1, max_iterations=2000)
  assert np.bincount(np.argmax(log_p, axis=1), minlength=8)[3] == 960
  np.testing.assert_allclose(out.sizes, 120, rtol=0.1)


def test_padded_rows_on_eight_devices_give_the_labels_of_one(mesh8):
  log_p = scores(301, 10, 1.5)
  one = equipartition(jnp.asarray(log_p), power=25.0, tolerance=0.1, max_iterations=2000)
  padded = np.concatenate([log_p, np.full((3, 10), np.nan, np.float32)])  # what a padding holds does not matter
  split = jax.device_put(padded, NamedSharding(mesh8, P(("data", "fsdp"))))
  eight = equipartition(split, power=25.0, tolerance=0.1, max_iterations=2000, num_rows=301)
  np.testing.assert_array_equal(eight.labels, one.labels)
  assert len(eight.labels) == 301 and abs(eight.iterations - one.iterations) <= 10
  np.testing.assert_allclose(eight.cost, one.cost, rtol=1e-5)


def test_only_numbers_per_cluster_travel_between_devices_in_the_sweeps(mesh8):
  from big_ssl.ops import transport

  split = jax.device_put(scores(64, 5, 1.0), NamedSharding(mesh8, P(("data", "fsdp"))))
  solve = transport._compiled(transport._solve, mesh8)
  text = solve.lower(split, jnp.float32(25), jnp.float32(0.1), jnp.int32(64), max_iterations=50).compile().as_text()
  gathered = [line for line in text.splitlines() if "all-gather" in line and "f32[64" in line]
  assert not gathered, gathered


def test_the_cap_ends_the_sweeps_and_is_reported():
  out = equipartition(jnp.asarray(scores(200, 20, 3.0)), power=25.0, tolerance=1e-9, max_iterations=25)
  assert out.iterations == 25 and len(out.errors) == 3 and out.error == out.errors[-1] > 1e-9


@pytest.mark.parametrize(
  "change,message",
  [
    ({"power": 0.0}, "lambda=0.0"),
    ({"max_iterations": 0}, "max_iterations=0"),
    ({"num_rows": 4}, "5 clusters of 4 images"),
  ],
)
def test_impossible_problems_are_clear_errors(change, message):
  options = {"power": 25.0, "tolerance": 0.1, "max_iterations": 100} | change
  with pytest.raises(UserError, match=message):
    equipartition(jnp.zeros((8, 5)), **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_name_the_image(value):
  log_p = scores(50, 4, 1.0).copy()
  log_p[17, 2] = value
  with pytest.raises(UserError, match="image 17"):
    equipartition(jnp.asarray(log_p), power=25.0, tolerance=0.1, max_iterations=100)
