"""Swapped prediction and cluster labels: the official loops, and what codes keep."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.losses import cluster
from big_ssl.losses.sinkhorn import sinkhorn
from big_ssl.ops import queue as queue_lib
from big_ssl.ops.normalize import l2_normalize


@pytest.mark.parametrize("epsilon", [0.05, 0.03])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_codes_are_the_official_ones(golden, epsilon, iterations):
  z = golden("swav_sinkhorn")
  codes = cluster.codes(jnp.asarray(z["scores"]), epsilon=epsilon, iterations=iterations)
  np.testing.assert_allclose(codes, z[f"eps{epsilon}/iters{iterations}/assignments"], atol=1e-6)


@pytest.mark.parametrize("name", ["swav_loss", "swav_queue"])
def test_the_official_loop_is_reproduced(golden, name):
  """Losses, gradients, codes, queue, and the iteration from which the queue takes part."""
  z = golden(name)
  c = ast.literal_eval(str(z["config"]))
  crops, assign = sum(c["crops"]), len(c["crops_for_assign"])
  prototypes = l2_normalize(jnp.asarray(z["prototypes_raw"]))
  np.testing.assert_allclose(prototypes, z["prototypes_normalised"], atol=1e-6)
  queue = jnp.zeros((assign, c["queue_length"], c["dim"])) if c["queue_length"] else None

  def objective(scores, prototypes, queue):
    kwargs = {"num_crops": crops, "assign_crops": assign, "epsilon": c["epsilon"], "iterations": c["sinkhorn_iterations"]}
    if queue is not None:
      kwargs |= {"queue_scores": queue @ prototypes.T, "use_queue": queue_lib.filled(queue[0])}
    out = cluster.swapped_prediction(scores, temperature=c["temperature"], **kwargs)
    return out.loss, out.codes

  for epoch in range(c["epochs"]):
    for i in range(c["iters_per_epoch"]):
      key = f"epoch{epoch}/iter{i}"
      features = l2_normalize(jnp.asarray(z[f"{key}/features"]))
      scores = features.reshape(-1, c["dim"]) @ prototypes.T
      (loss, codes), grad = jax.value_and_grad(objective, has_aux=True)(scores, prototypes, queue)
      np.testing.assert_allclose(loss, z[f"{key}/loss"], rtol=1e-5, err_msg=key)
      np.testing.assert_allclose(codes, z[f"{key}/assignments"], atol=1e-5, err_msg=key)
      np.testing.assert_allclose(grad, z[f"{key}/grad_scores"], atol=1e-5, err_msg=key)
      if f"{key}/grad_prototypes" in z:
        through = jax.grad(lambda p, f=features, q=queue: objective(f.reshape(-1, c["dim"]) @ p.T, p, q)[0])(prototypes)
        np.testing.assert_allclose(through, z[f"{key}/grad_prototypes"], atol=2e-5, err_msg=key)
      if queue is not None:
        used = int(queue_lib.filled(queue[0])) * c["queue_length"] + c["batch"]
        assert used == z[f"{key}/sinkhorn_rows"][0], key
        if epoch >= c["queue_starts_epoch"]:
          queue = jax.vmap(queue_lib.push)(queue, features[:assign])
          np.testing.assert_allclose(queue, z[f"{key}/queue_after"], atol=1e-6, err_msg=key)


def test_ten_iterations_at_epsilon_003_are_the_ones_of_seer(golden):
  z = golden("seer_swav_loss")

  def objective(scores):
    out = cluster.swapped_prediction(scores, num_crops=6, assign_crops=2, epsilon=0.03, iterations=10, temperature=0.1)
    return out.loss, out.codes

  (loss, codes), grad = jax.value_and_grad(objective, has_aux=True)(jnp.asarray(z["scores"]))
  np.testing.assert_allclose(loss, z["loss"], rtol=1e-5)
  np.testing.assert_allclose(codes, z["assignments"], atol=1e-5)
  np.testing.assert_allclose(grad, z["grad_scores"], atol=1e-5)


def test_codes_keep_rows_balance_prototypes_and_ignore_a_constant():
  scores = jax.random.uniform(jax.random.key(0), (24, 6), minval=-1.0)
  codes = cluster.codes(scores, epsilon=0.05, iterations=3)
  np.testing.assert_allclose(codes.sum(axis=1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(codes, cluster.codes(scores + 0.7, epsilon=0.05, iterations=3), atol=1e-5)
  many = cluster.codes(scores, epsilon=0.05, iterations=300)
  np.testing.assert_allclose(many.sum(axis=0), 24 / 6, rtol=1e-3)


@pytest.mark.parametrize("epsilon,scale", [(0.005, 1.0), (0.05, 50.0)])
def test_codes_are_finite_where_an_exponential_is_not(epsilon, scale):
  scores = scale * jax.random.uniform(jax.random.key(1), (16, 5), minval=-1.0)
  codes = cluster.codes(scores, epsilon=epsilon, iterations=3)
  assert np.isfinite(codes).all()
  np.testing.assert_allclose(codes.sum(axis=1), 1.0, rtol=1e-4)


def test_an_unused_queue_leaves_the_codes_as_they_are():
  scores = jax.random.normal(jax.random.key(2), (8, 5))
  queue = jax.random.normal(jax.random.key(3), (16, 5))
  alone = cluster.codes(scores, epsilon=0.1, iterations=3)
  np.testing.assert_array_equal(cluster.codes(scores, epsilon=0.1, iterations=3, queue_scores=queue, use_queue=jnp.bool_(False)), alone)
  joined = cluster.codes(scores, epsilon=0.1, iterations=3, queue_scores=queue, use_queue=jnp.bool_(True))
  np.testing.assert_allclose(joined, jnp.exp(sinkhorn(jnp.concatenate([queue, scores]) / 0.1))[-8:], atol=1e-6)
  assert np.abs(joined - alone).max() > 1e-2


def test_codes_of_a_split_batch_are_the_global_ones(mesh8):
  scores = jax.random.uniform(jax.random.key(4), (32, 7), minval=-1.0)
  whole = cluster.codes(scores, epsilon=0.05, iterations=3)
  split = jax.device_put(scores, NamedSharding(mesh8, P("data")))
  out = jax.jit(lambda s: cluster.codes(s, epsilon=0.05, iterations=3))(split)
  np.testing.assert_allclose(out, whole, atol=1e-6)


def test_a_crop_does_not_predict_its_own_code():
  scores = jax.random.normal(jax.random.key(5), (3 * 4, 5))
  grad = jax.grad(lambda s: cluster.swapped_prediction(s, num_crops=3, assign_crops=1).loss)(scores)
  assert not np.any(grad[:4]) and np.abs(grad[4:]).min(axis=1).all()


def test_deepcluster_v2_loss_is_the_official_one(golden):
  z = golden("deepclusterv2_loss")
  c = ast.literal_eval(str(z["config"]))
  crops = sum(c["crops"])
  for i, wanted in enumerate(z["losses"]):
    labels = z["assignments"][:, z[f"iter{i}/index"]]
    total = 0.0
    for h in range(len(c["heads"])):
      scores = jnp.asarray(z[f"iter{i}/scores{h}"])
      rows = jnp.tile(labels[h], crops)
      loss = lambda s, rows=rows: cluster.labeled_cross_entropy(s / c["temperature"], labels=rows) / len(c["heads"])
      value, grad = jax.value_and_grad(loss)(scores)
      np.testing.assert_allclose(grad, z[f"iter{i}/grad_scores{h}"], atol=1e-5)
      total += value
    np.testing.assert_allclose(total, wanted, rtol=1e-5)


def test_images_without_an_assignment_do_not_count():
  logits = jax.random.normal(jax.random.key(6), (4, 3))
  labels = jnp.array([0, cluster.IGNORE, 2, cluster.IGNORE])
  value, grad = jax.value_and_grad(lambda x: cluster.labeled_cross_entropy(x, labels=labels))(logits)
  np.testing.assert_allclose(value, cluster.labeled_cross_entropy(logits[::2], labels=labels[::2]), rtol=1e-6)
  assert not np.any(grad[1::2])
  none = jnp.full(4, cluster.IGNORE)
  assert cluster.labeled_cross_entropy(logits, labels=none) == 0


def test_rows_that_are_no_whole_crops_are_an_error():
  with pytest.raises(ValueError, match="7 rows, 2 crops of which 1"):
    cluster.swapped_prediction(jnp.zeros((7, 3)), num_crops=2, assign_crops=1)
