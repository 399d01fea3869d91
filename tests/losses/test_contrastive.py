"""NT-Xent against reference numbers, its exact values and invariances, and shardings."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import UserError
from big_ssl.losses.contrastive import nt_xent

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "simclr_ntxent.npz")
T = float(GOLDEN["temperature"])


@pytest.mark.parametrize(("scale", "name"), [(1.0, "loss_mean"), (2.0, "loss_sum")])
def test_both_conventions_and_gradients_match_the_reference(scale, name):
  fn = jax.value_and_grad(lambda z: ((o := nt_xent(z, temperature=T, loss_scale=scale)).loss, o), has_aux=True)
  (loss, out), gradient = fn(jnp.asarray(GOLDEN["z"]))
  np.testing.assert_allclose(loss, GOLDEN[name], rtol=1e-5)
  np.testing.assert_allclose(out.per_anchor, GOLDEN["per_anchor"], atol=1e-5)
  np.testing.assert_allclose(gradient, GOLDEN[f"grad_z_{name}"], atol=1e-5)


def test_accuracy_counts_anchors_whose_positive_is_nearest():
  out = nt_xent(jnp.asarray(GOLDEN["z"]), temperature=T)
  z = GOLDEN["z"] / np.linalg.norm(GOLDEN["z"], axis=1, keepdims=True)
  s = z @ z.T - 10 * np.eye(16)
  hits = s.argmax(1) == GOLDEN["positive_index"]
  assert float(out.accuracy) == pytest.approx(hits.mean())
  # The reference looks for the positive of view-1 anchors among view 2 only; on the golden's numbers both shares are 1/8.
  assert float(out.cross_accuracy) == float(GOLDEN["contrastive_accuracy"])
  z = np.random.default_rng(1).normal(size=(24, 3))
  out, z = nt_xent(jnp.asarray(z, jnp.float32), temperature=T), z / np.linalg.norm(z, axis=1, keepdims=True)
  cross = (z[:12] @ z[12:].T).argmax(1) == np.arange(12)
  assert float(out.cross_accuracy) == pytest.approx(cross.mean()) and out.cross_accuracy != out.accuracy


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_value_and_gradient_are_the_same_when_the_batch_is_split(devices):
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  fn = jax.jit(jax.value_and_grad(lambda z: nt_xent(z, temperature=T).loss))
  loss, gradient = fn(jax.device_put(GOLDEN["z"], NamedSharding(mesh, P("data"))))
  np.testing.assert_allclose(loss, GOLDEN["loss_mean"], rtol=1e-5)
  np.testing.assert_allclose(gradient, GOLDEN["grad_z_loss_mean"], atol=1e-5)


def test_invariant_to_lengths_to_the_order_of_images_and_to_swapping_the_views():
  z = GOLDEN["z"]
  base = float(nt_xent(jnp.asarray(z), temperature=T).loss)
  order = np.random.default_rng(0).permutation(8)
  for other in (
    z * np.linspace(0.01, 30, 16)[:, None],
    np.roll(z, 8, axis=0),
    z.reshape(2, 8, -1)[:, order].reshape(16, -1),
  ):
    assert float(nt_xent(jnp.asarray(other, jnp.float32), temperature=T).loss) == pytest.approx(base, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_equal_embeddings_give_exactly_the_log_of_the_number_of_candidates(temperature):
  assert float(nt_xent(jnp.ones((12, 5)), temperature=temperature).loss) == pytest.approx(np.log(11), rel=1e-5)


def test_half_precision_at_a_low_temperature_stays_finite():
  loss, gradient = jax.value_and_grad(lambda z: nt_xent(z, temperature=0.005).loss)(
    jnp.asarray(GOLDEN["z"], jnp.bfloat16) * 100
  )
  assert bool(jnp.isfinite(loss)) and bool(jnp.isfinite(gradient).all())


def test_one_image_or_an_odd_number_of_rows_is_an_error():
  with pytest.raises(UserError, match="config.batch_size=1"):
    nt_xent(jnp.ones((2, 4)), temperature=0.1)
  with pytest.raises(ValueError, match="5 rows"):
    nt_xent(jnp.ones((5, 4)), temperature=0.1)
