"""InfoNCE with a queue and in the batch, against the official MoCo code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import UserError
from big_ssl.losses.contrastive import batch_nce, queue_nce


def spread(devices):
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  return lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))


@pytest.mark.parametrize("devices", [1, 8])
def test_logits_and_loss_of_a_moco_step_match_the_reference(golden, devices):
  z, put = golden("moco_step"), spread(devices)
  out = jax.jit(lambda q, k, queue: queue_nce(q, k, queue=queue, temperature=z["temperature"]))(put(z["q"]), put(z["k"]), z["queue"].T)
  np.testing.assert_allclose(out.logits, z["logits"], atol=1e-5)
  np.testing.assert_allclose(out.loss, z["loss"], rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 6])
def test_the_symmetric_loss_of_moco_v3_and_its_gradients_match_the_reference(golden, devices):
  z, put = golden("mocov3_loss"), spread(devices)
  t = float(z["temperature"])

  def loss(q1, q2, k1, k2):
    first = batch_nce(q1, k2, temperature=t, loss_scale=2 * t).loss
    second = batch_nce(q2, k1, temperature=t, loss_scale=2 * t).loss
    return first + second, (first, second)

  names = ("q1", "q2", "k1", "k2")
  (total, parts), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*(put(z[n]) for n in names))
  np.testing.assert_allclose([total, *parts], [z["loss"], z["loss_q1_k2"], z["loss_q2_k1"]], rtol=1e-5)
  np.testing.assert_allclose(grads[0], z["grad_q1"], atol=1e-6)
  np.testing.assert_allclose(grads[1], z["grad_q2"], atol=1e-6)
  assert not np.any(grads[2]) and not np.any(grads[3])


def test_no_gradient_reaches_keys_and_queue():
  q, k, queue = (jax.random.normal(jax.random.key(i), (n, 5)) for i, n in enumerate((4, 4, 8)))
  grads = jax.grad(lambda k, queue: queue_nce(q, k, queue=queue, temperature=0.1).loss, argnums=(0, 1))(k, queue)
  assert not np.any(grads[0]) and not np.any(grads[1])


def test_equal_embeddings_give_the_log_of_the_number_of_candidates_and_find_nothing():
  ones = jnp.ones((6, 4))
  for out, candidates in (
    (queue_nce(ones, ones, queue=jnp.full((10, 4), 0.5), temperature=0.2), 11),
    (batch_nce(ones, ones, temperature=0.2), 6),
  ):
    assert float(out.loss) == pytest.approx(np.log(candidates), rel=1e-6) and float(out.accuracy) == 0


def test_equal_views_of_different_images_are_all_found():
  q = jax.random.normal(jax.random.key(0), (6, 16))
  queue = jax.random.normal(jax.random.key(1), (10, 16)) / 4
  assert float(queue_nce(q, 3 * q, queue=queue, temperature=0.2).accuracy) == 1
  assert float(batch_nce(q, 3 * q, temperature=0.2).accuracy) == 1
  assert float(batch_nce(q, jnp.roll(q, 1, axis=0), temperature=0.2).accuracy) == 0


def test_one_image_has_no_negatives_in_the_batch():
  with pytest.raises(UserError, match="config.batch_size=1"):
    batch_nce(jnp.ones((1, 4)), jnp.ones((1, 4)), temperature=0.1)
