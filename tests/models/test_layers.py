"""Layers: whose statistics, which variance, what is dropped."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from big_ssl.core.types import UserError
from big_ssl.models.layers import BatchNorm, LayerNorm, Mlp, drop_path


def batch(shape=(16, 3, 5)):
  return 2.0 + jax.random.normal(jax.random.key(0), shape)


def normalize(layer, x):
  """(output, new running statistics) in training mode from fresh statistics."""
  variables = layer.init(jax.random.key(1), x, train=False)
  return layer.apply(variables, x, train=True, mutable=["batch_stats"])


def test_layer_norm_is_exact_on_tokens_far_from_zero():
  x = 3e3 + jax.random.normal(jax.random.key(0), (4, 32))
  wanted = np.asarray(x, np.float64)
  wanted = (wanted - wanted.mean(-1, keepdims=True)) / np.sqrt(wanted.var(-1, keepdims=True) + 1e-6)
  layer = LayerNorm()
  np.testing.assert_allclose(layer.apply(layer.init(jax.random.key(0), x), x), wanted, atol=1e-3)


def test_batch_norm_normalises_by_the_biased_and_keeps_the_unbiased_variance():
  x = batch()
  y, state = normalize(BatchNorm(), x)
  flat = np.asarray(x, np.float64).reshape(-1, 5)
  np.testing.assert_allclose(y, (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), atol=2e-6)
  np.testing.assert_allclose(state["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-6)
  np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * flat.mean(0), rtol=1e-6)


def test_groups_are_as_good_as_separate_calls():
  x = batch()
  y, state = normalize(BatchNorm(groups=4), x)
  parts = [normalize(BatchNorm(), part) for part in jnp.split(x, 4)]
  np.testing.assert_allclose(y, jnp.concatenate([p[0] for p in parts]), atol=1e-6)
  for name in ("mean", "var"):
    wanted = np.mean([p[1]["batch_stats"][name] for p in parts], axis=0)
    np.testing.assert_allclose(state["batch_stats"][name], wanted, rtol=1e-5)
  assert not np.allclose(y, normalize(BatchNorm(), x)[0], atol=1e-2)


def test_a_batch_over_eight_devices_has_the_statistics_and_gradients_of_one(mesh8):
  x, layer = batch(), BatchNorm()
  variables = layer.init(jax.random.key(1), x, train=False)

  @jax.jit
  def run(x):
    def total(x):
      y, state = layer.apply(variables, x, train=True, mutable=["batch_stats"])
      return jnp.sum(y**3), (y, state)

    return jax.grad(total, has_aux=True)(x)

  spread = jax.device_put(x, NamedSharding(mesh8, PartitionSpec("data")))
  for one, eight in zip(jax.tree.leaves(run(x)), jax.tree.leaves(run(spread)), strict=True):
    np.testing.assert_allclose(one, eight, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(one).max())))


@pytest.mark.parametrize(
  "groups,shape,message", [(3, (16, 5), "bn_groups=3: 16 samples"), (1, (1, 5), "more than one value")]
)
def test_batches_without_statistics_are_clear_errors(groups, shape, message):
  with pytest.raises(UserError, match=message):
    normalize(BatchNorm(groups=groups), batch(shape))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
  x = jnp.ones((4000, 2, 3))
  y = drop_path(x, rate=0.25, key=jax.random.key(0))
  per_sample = np.asarray(y).reshape(4000, -1)
  assert np.all(per_sample == per_sample[:, :1])
  np.testing.assert_allclose(np.unique(per_sample), [0, 1 / 0.75], rtol=1e-6)
  np.testing.assert_allclose(np.mean(per_sample), 1, atol=0.04)
  np.testing.assert_array_equal(drop_path(x, rate=0.25, key=None), x)


def test_gelu_is_exact_unless_asked_for_tanh():
  x = jax.random.normal(jax.random.key(0), (8, 6))
  exact, tanh = Mlp(12), Mlp(12, gelu="tanh")
  variables = exact.init(jax.random.key(1), x * 20)
  fc1, fc2 = (variables["params"][n] for n in ("fc1", "fc2"))
  hidden = 20 * x @ fc1["kernel"] + fc1["bias"]
  for layer, approximate in ((exact, False), (tanh, True)):
    wanted = nn.gelu(hidden, approximate=approximate) @ fc2["kernel"] + fc2["bias"]
    np.testing.assert_allclose(layer.apply(variables, 20 * x), wanted, atol=1e-6)
  assert np.abs(exact.apply(variables, 20 * x) - tanh.apply(variables, 20 * x)).max() > 1e-6
