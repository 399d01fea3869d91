"""Layer-wise decay of the learning rate: which layer a parameter belongs to, in every family of backbones, and what it does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.config import OptimConfig, build_named
from big_ssl.core.layer_decay import factors
from big_ssl.core.optim import make_optimizer, paths
from big_ssl.core.types import Rule, UserError
from big_ssl.models.layers import Backbone


def shapes_of(size=32, **model):
  network = build_named("models", model, Backbone, path="config.model")
  tree = jax.eval_shape(lambda k: network.init(k, jnp.zeros((1, size, size, 3)), train=False)["params"], jax.random.key(0))
  return {"encoder": {"backbone": tree, "head": {"fc": {"kernel": jax.ShapeDtypeStruct((4, 2), jnp.float32)}}}}


def by_module(decay=0.5, **model):
  """Exponents by module of the backbone; every tensor of a module has the same."""
  tree = shapes_of(**model)
  names, shapes = paths(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]
  found = {}
  for name, factor in zip(names, factors(names, shapes=shapes, decay=decay), strict=True):
    module = name.split("/")[2] if "backbone" in name else "head"
    found.setdefault(module, set()).add(round(np.log(factor) / np.log(decay)))
  assert all(len(v) == 1 for v in found.values()), found
  return {name: v.pop() for name, v in found.items()}


VIT = dict(name="vit", variant="custom", width=16, depth=3, heads=2, mlp_dim=16, patch=8, image_size=32)


def test_a_vit_decays_from_the_head_through_its_blocks_to_the_embeddings():
  expected = {"head": 0, "norm": 0, "block_2": 1, "block_1": 2, "block_0": 3, "patch_embed": 4, "cls_token": 4, "pos_embed": 4}
  assert by_module(**VIT) == expected
  assert by_module(**VIT, registers=2, mask_token=True, pool="map") == expected | {"registers": 4, "mask_token": 4, "map_head": 0}


def test_class_blocks_follow_the_blocks():
  found = by_module(name="xcit", variant="small12", width=16, heads=2, depth=2, class_layers=2)
  blocks = [found[name] for name in ("class_block_1", "class_block_0", "block_1", "block_0", "patch_embed")]
  assert blocks == [1, 2, 3, 4, 5] and found["norm"] == 0 and found["cls_token"] == found["pos_embed"] == 5


@pytest.mark.parametrize(
  "model", [dict(name="resnet", depth=18, stem_width=8), dict(name="regnet", variant="400mf")], ids=["resnet", "regnet"]
)
def test_convolutional_networks_decay_by_stage(model):
  found = by_module(size=64, **model)
  assert {m[:6]: e for m, e in found.items() if m.startswith("layer")} == {"layer4": 1, "layer3": 2, "layer2": 3, "layer1": 4}
  assert found["conv1"] == found["bn1"] == 5 and found["head"] == 0


def test_a_normalization_behind_the_stages_is_not_of_the_stem():
  found = by_module(name="wide_resnet", depth=10, width=2)
  assert (found["layer3_0"], found["layer1_0"], found["conv1"], found["bn1"]) == (1, 3, 4, 0)


def test_plain_networks_go_by_their_numbers_convolutions_first():
  found = by_module(size=224, name="alexnet", widths=(8, 8, 8, 8, 8), fc=8)
  assert [found[n] for n in ("fc7", "fc6", "conv5", "bn5", "conv1", "bn1")] == [1, 2, 3, 3, 7, 7]


def test_a_backbone_without_layers_is_a_clear_error_and_so_is_a_factor_out_of_range():
  with pytest.raises(UserError, match="config.optim.layer_decay=0.5: config.model has no numbered layers"):
    factors(["encoder/backbone/w", "encoder/head/fc1/kernel"], shapes=[(1,), (1,)], decay=0.5)
  for value in (0.0, 1.5, -1.0):
    with pytest.raises(UserError, match=f"config.optim.layer_decay={value}"):
      OptimConfig(layer_decay=value)


def test_updates_have_the_decayed_rate_on_top_of_the_rule():
  ones = jnp.ones((2, 2))
  params = {"backbone": {"block_0": ones, "block_1": ones, "patch_embed": ones}, "head": ones, "frozen": ones}
  rules = (Rule(pattern="head", lr_mult=10.0), Rule(pattern="frozen", lr_mult=0.0), Rule(pattern="block_1", lr_mult=2.0), Rule(pattern=".*"))
  config = OptimConfig(name="sgd", lr=0.1, schedule="constant", momentum=0.0, layer_decay=0.5)
  make = lambda c: make_optimizer(c, params=params, rules=rules, total_steps=2, batch_size=1, examples=1)
  moved = lambda opt: jax.tree.map(lambda a, b: float((a - b)[0, 0]), params, opt.apply(params, params, opt.init(params), jnp.int32(0)).params)
  found = moved(make(config))
  assert found["backbone"] == pytest.approx({"block_1": 0.1, "block_0": 0.025, "patch_embed": 0.0125})
  assert found["head"] == pytest.approx(1.0) and found["frozen"] == 0
  assert moved(make(dataclasses.replace(config, layer_decay=1.0)))["backbone"] == pytest.approx({"block_1": 0.2, "block_0": 0.1, "patch_embed": 0.1})
