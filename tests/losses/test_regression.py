"""BYOL's loss against the released code, and what the floor of the norm does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.losses.regression import normalized_mse


@pytest.mark.parametrize("devices", [1, 7])
def test_the_two_terms_and_their_gradients_match_the_reference(golden, devices):
  z = golden("byol_loss")
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  put = lambda name: jax.device_put(z[name], NamedSharding(mesh, P("data")))

  def loss(p1, p2, t1, t2):
    return normalized_mse(p1, targets=t2) + normalized_mse(p2, targets=t1)

  names = ("prediction_view1", "prediction_view2", "target_projection_view1", "target_projection_view2")
  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*map(put, names))
  np.testing.assert_allclose(value, z["loss"], rtol=1e-6)
  for name, grad in zip(names[:2], grads, strict=False):
    np.testing.assert_allclose(grad, z[f"grad_{name}"], rtol=1e-5, atol=1e-7)
  assert not np.any(grads[2]) and not np.any(grads[3])


def test_lengths_do_not_count_and_opposite_vectors_are_four_apart():
  x = jax.random.normal(jax.random.key(0), (5, 8))
  assert float(normalized_mse(3 * x, targets=0.1 * x)) == pytest.approx(0, abs=1e-6)
  assert float(normalized_mse(x, targets=-2 * x)) == pytest.approx(4)


def test_a_vector_below_the_floor_is_not_stretched_to_length_one():
  tiny = jnp.array([[1e-7, 0.0]])
  assert float(normalized_mse(tiny, targets=jnp.array([[1.0, 0.0]]))) == pytest.approx(0.9**2, rel=1e-5)
  gradient = jax.grad(lambda x: normalized_mse(x, targets=jnp.ones((1, 2))))(jnp.zeros((1, 2)))
  assert np.isfinite(gradient).all()
