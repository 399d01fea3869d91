"""Heads: the published layouts, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.heads import Linear, ProjectionHead


def init(head, width=12, samples=6):
  x = jax.random.normal(jax.random.key(0), (samples, width))
  return x, head.init(jax.random.key(1), x, train=False)


def names(tree):
  return {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_msn_has_two_batch_norms_and_biases():
  _, variables = init(ProjectionHead(hidden=(8, 8), output=4))
  fc, bn = ("fc1", "fc2", "fc3"), ("bn1", "bn2")
  assert names(variables["params"]) == {f"{n}/{k}" for n in fc for k in ("kernel", "bias")} | {
    f"{n}/{k}" for n in bn for k in ("scale", "bias")
  }
  assert names(variables["batch_stats"]) == {f"{n}/{k}" for n in bn for k in ("mean", "var")}


def test_simclr_has_no_biases_and_ends_in_a_batch_norm_without_bias():
  head = ProjectionHead(hidden=(8,), output=4, activation="relu", final_batch_norm=True, use_bias=False)
  x, variables = init(head)
  assert names(variables["params"]) == {"fc1/kernel", "bn1/scale", "bn1/bias", "fc2/kernel", "bn2/scale"}
  y, _ = head.apply(variables, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(np.mean(y, 0), 0, atol=1e-5)


def test_torch_initialization_is_uniform_within_the_fan_in_bound():
  _, variables = init(ProjectionHead(hidden=(64,), output=64, init_std=None), width=100)
  fc1 = variables["params"]["fc1"]
  for leaf in (fc1["kernel"], fc1["bias"]):
    assert 0.08 < np.abs(leaf).max() <= 0.1
  np.testing.assert_allclose(np.std(fc1["kernel"]), 0.1 / np.sqrt(3), rtol=0.05)


@pytest.mark.parametrize("std", [0.02, 0.01])
def test_normal_initialization_has_the_asked_deviation_and_zero_biases(std):
  _, variables = init(ProjectionHead(hidden=(64,), output=64, init_std=std), width=100)
  fc1 = variables["params"]["fc1"]
  np.testing.assert_allclose(np.std(fc1["kernel"]), std, rtol=0.05)
  assert not np.any(fc1["bias"])


def test_outputs_are_float32_from_half_precision_features():
  for head in (ProjectionHead(hidden=(8,), output=4, dtype="bfloat16"), Linear(4)):
    x, variables = init(head)
    assert head.apply(variables, x.astype(jnp.bfloat16), train=False).dtype == jnp.float32


def test_an_unknown_activation_is_named():
  with pytest.raises(UserError, match="activation='gelo'.*Did you mean 'gelu'"):
    init(ProjectionHead(hidden=(8,), output=4, activation="gelo"))


def test_moco_v3_ends_in_a_batch_norm_without_parameters_and_byol_in_a_linear_without_bias():
  moco = ProjectionHead(hidden=(8, 8), output=4, activation="relu", use_bias=False, final_batch_norm=True, final_scale=False)
  _, variables = init(moco)
  bn = {f"bn{i}/{k}" for i in (1, 2) for k in ("scale", "bias")}
  assert names(variables["params"]) == {"fc1/kernel", "fc2/kernel", "fc3/kernel"} | bn
  assert "bn3" in variables["batch_stats"]
  _, variables = init(ProjectionHead(hidden=(8,), output=4, activation="relu", final_bias=False))
  assert names(variables["params"]) == {"fc1/kernel", "fc1/bias", "bn1/scale", "bn1/bias", "fc2/kernel"}


def test_lecun_initialization_is_a_normal_of_the_fan_in_cut_at_two_deviations():
  _, variables = init(ProjectionHead(hidden=(64,), output=64, init_std="lecun"), width=100)
  kernel = variables["params"]["fc1"]["kernel"]
  assert 0.19 < np.abs(kernel).max() <= 0.2 and not np.any(variables["params"]["fc1"]["bias"])
  np.testing.assert_allclose(np.std(kernel), 0.1 * 0.8796, rtol=0.05)
