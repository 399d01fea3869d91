"""The wide ResNet of PAWS, its heads and those on a ResNet, against the release: both modes and the running statistics."""

import dataclasses

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.methods.paws import PAWS, embed
from big_ssl.models.resnet import ResNet
from big_ssl.models.wide_resnet import WideResNet
from big_ssl.weights.families import dump, load

LAYOUTS = {"wideresnet": "paws_wide_resnet", "resnet": "paws"}
NETWORKS = {
  "wideresnet": (WideResNet(depth=10, width=1), False, (32, 18)),
  "resnet": (ResNet(depth=50, blocks=(1, 1, 1, 1), stem_width=8, width_per_group=8), True, (48, 32)),
}


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def state_of(z, prefix="state/"):
  return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix) and "num_batches" not in k}


def recorded(z, name):
  """The method, its trees and the two BN batches."""
  model, predictor, sizes = NETWORKS[name]
  weights = load(LAYOUTS[name], state_of(z)).weights
  method = PAWS(model=model, output_dim=16, prediction_head=predictor)
  return method, weights, [nhwc(z[f"input/{s}"]).reshape(-1, s, s, 3) for s in sizes]


def run(method, weights, batches, *, train):
  params, stats, outs = engine.nested(weights.params), engine.nested(weights.batch_stats), []
  for images in batches:
    out, stats = embed(method, params, stats, images, train=train)
    outs.append(out)
  return {k: np.concatenate([o[k] for o in outs]) for k in ("projection", "prediction")}, outs[0]["pooled"], stats


@pytest.mark.parametrize("name", NETWORKS)
def test_released_networks_are_reproduced_with_their_heads(golden, name):
  z = golden(f"paws_{name}_tiny")
  method, weights, batches = recorded(z, name)
  out, pooled, _ = run(method, weights, batches, train=False)
  np.testing.assert_allclose(pooled, z["output/eval/pooled_first_resolution"], atol=1e-4)
  np.testing.assert_allclose(out["projection"], z["output/eval/h"], atol=1e-4)
  np.testing.assert_allclose(out["prediction"], z["output/eval/z"], atol=1e-4)
  out, _, stats = run(method, weights, batches, train=True)
  np.testing.assert_allclose(out["projection"], z["output/train/h"], atol=1e-4)
  np.testing.assert_allclose(out["prediction"], z["output/train/z"], atol=1e-4)
  after = dump(LAYOUTS[name], dataclasses.replace(weights, batch_stats=engine.unnested(stats)))
  wanted = state_of(z, "state_after_train/")
  assert wanted.keys() <= after.keys()
  for key, value in wanted.items():
    np.testing.assert_allclose(after[key], value, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_round_trip_bit_for_bit(golden, name):
  state = state_of(golden(f"paws_{name}_tiny"))
  again = dump(LAYOUTS[name], load(LAYOUTS[name], {f"module.{k}": v for k, v in state.items()}).weights)
  assert again.keys() == state.keys() and all(np.array_equal(again[k], state[k]) for k in state)


def test_a_tensor_of_no_head_is_named(golden):
  with pytest.raises(UserError, match="fc.fc1.gain"):
    load("paws_wide_resnet", state_of(golden("paws_wideresnet_tiny")) | {"fc.fc1.gain": np.ones(3)})


def test_wrn_28_2_has_its_published_size_and_a_feature_of_128():
  shapes = jax.eval_shape(lambda: WideResNet().init_with_output(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
  out, variables = shapes
  assert out["pooled"].shape == (1, 128) and out["stages"][-1].shape == (1, 8, 8, 128)
  millions = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables["params"])) / 1e6
  assert 1.46 < millions < 1.48, millions  # 1.47 M with the biases of the convolutions


def test_only_the_last_batch_norm_replaces_its_statistics_at_once():
  model = WideResNet(depth=10, width=1)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  variables = model.init(jax.random.key(1), images, train=False)
  after = model.apply(variables, images, train=True, mutable=["batch_stats"])[1]["batch_stats"]
  share = lambda stats: float(np.mean(stats["var"]))
  assert share(after["bn1"]) < 0.9 and share(after["layer1_0"]["bn1"]) > 0.9 - 1e-6


@pytest.mark.parametrize("depth", [4, 11, 27])
def test_impossible_depths_are_errors(depth):
  with pytest.raises(UserError, match=f"config.model.depth={depth}"):
    WideResNet(depth=depth).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
