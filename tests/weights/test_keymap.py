"""The engine of the key maps: templates, moves, accounting."""

import dataclasses

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.weights import keymap, moves
from big_ssl.weights.keymap import Keep, KeyMap, Rule
from big_ssl.weights.names import Template

RULES = (
  *keymap.conv("stem", "backbone/stem", bias=False),
  *keymap.batch_norm("layer{i}.{j+1}.bn", "backbone/layer{i}_{j}/bn"),
  *keymap.fused_attention("blocks.{i}.qkv", "blocks.{i}.proj", "backbone/block_{i}/attention", heads=2),
  *keymap.linear("head.{2*i-2}", "head/fc{i}"),
  Keep("filter", "fixed", constant=np.arange(3.0)),
)


@pytest.fixture
def tensors():
  rng = np.random.default_rng(0)
  sizes = {"stem.weight": (4, 3, 2, 2), "blocks.0.qkv.weight": (24, 8), "blocks.0.qkv.bias": (24,), "blocks.0.proj.weight": (8, 8)}
  sizes |= {"blocks.0.proj.bias": (8,), "head.0.weight": (5, 8), "head.0.bias": (5,), "head.2.weight": (3, 5), "head.2.bias": (3,)}
  sizes |= {f"layer1.1.bn.{name}": (3,) for name in ("weight", "bias", "running_mean", "running_var")}
  return {name: rng.normal(size=size) for name, size in sizes.items()} | {
    "layer1.1.bn.num_batches_tracked": np.int64(7),
    "filter": np.arange(3.0),
  }


def test_a_load_and_a_dump_give_the_same_tensors_bit_for_bit(tensors):
  weights = KeyMap("toy", RULES).load(tensors)
  query = weights.params["backbone"]["block_0"]["attention"]["query"]["kernel"]
  np.testing.assert_array_equal(query[:, 1, 0], tensors["blocks.0.qkv.weight"][4])
  np.testing.assert_array_equal(weights.params["head"]["fc2"]["kernel"], tensors["head.2.weight"].T)
  assert weights.params["backbone"]["stem"]["kernel"].shape == (2, 2, 3, 4)
  assert set(weights.batch_stats["backbone"]["layer1_0"]["bn"]) == {"mean", "var"}
  again = KeyMap("toy", RULES).dump(weights)
  assert again.keys() == tensors.keys() and all(np.array_equal(again[k], v) for k, v in tensors.items())


def test_weights_trained_here_get_counters_and_imported_ones_only_those_they_had(tensors):
  weights = KeyMap("toy", RULES).load(tensors)
  fresh = KeyMap("toy", RULES).dump(dataclasses.replace(weights, kept=None))
  assert fresh["layer1.1.bn.num_batches_tracked"] == 0 and "filter" not in fresh
  assert "layer1.1.bn.num_batches_tracked" not in KeyMap("toy", RULES).dump(dataclasses.replace(weights, kept={}))


def test_everything_that_does_not_fit_is_named_at_once(tensors):
  weights = KeyMap("toy", RULES).load(tensors)
  expect = {path: value.shape for path, value in weights.flat().items()}
  bad = tensors | {"blocks.0.scale": np.ones(1), "stem.weight": np.ones((4, 1, 2, 2))}
  del bad["blocks.0.qkv.bias"], bad["layer1.1.bn.running_var"]
  with pytest.raises(UserError) as error:
    KeyMap("toy", RULES).load(bad, expect=expect, hint="It is something else.")
  for part in ("missing 2: layer1.1.bn.running_var, blocks.0.qkv.bias", "unexpected 1: blocks.0.scale"):
    assert part in str(error.value)
  assert "stem.weight 2x2x1x4 fits no 2x2x3x4 of params/backbone/stem/kernel" in str(error.value)
  assert str(error.value).endswith("It is something else.")


def test_a_missing_half_of_a_layer_is_named_without_a_model(tensors):
  del tensors["head.2.bias"]
  with pytest.raises(UserError, match=r"missing 1: head\.2\.bias"):
    KeyMap("toy", RULES).load(tensors)


def test_a_partial_reading_takes_what_fits_and_lists_the_rest(tensors):
  del tensors["head.2.bias"]
  reading = KeyMap("toy", RULES).read(tensors | {"other": np.ones(2)})
  assert reading.missing == ("head.2.bias",) and reading.unexpected == ("other",)
  assert list(reading.weights.params["head"]["fc2"]) == ["kernel"]


def test_a_constant_that_is_another_one_and_an_impossible_shape_are_refused(tensors):
  with pytest.raises(UserError, match="'filter' of a toy is expected to be constant"):
    KeyMap("toy", RULES).load(tensors | {"filter": np.ones(3)})
  with pytest.raises(UserError, match=r"'blocks.0.qkv.weight' 23x8 has not the layout of a toy"):
    KeyMap("toy", RULES).load(tensors | {"blocks.0.qkv.weight": np.ones((23, 8))})


def test_an_export_names_a_leaf_without_a_rule_and_leaves_out_what_it_is_told_to(tensors):
  weights = KeyMap("toy", RULES).load(tensors)
  more = dataclasses.replace(weights, params=weights.params | {"predictor": {"w": np.ones(1)}})
  with pytest.raises(UserError, match="unexpected 1: params/predictor/w"):
    KeyMap("toy", RULES).dump(more)
  assert KeyMap("toy", RULES).dump(more, leave="^params/predictor/").keys() == tensors.keys()


@pytest.mark.parametrize(
  "template,name,values",
  [
    ("res{i+1}.block{i}-{j}.w", "res3.block2-0.w", (("i", 2), ("j", 0))),
    ("res{i+1}.block{i}-{j}.w", "res3.block1-0.w", None),
    ("mlp.{2*i-2}.w", "mlp.4.w", (("i", 3),)),
    ("mlp.{2*i-2}.w", "mlp.3.w", None),
    ("a.{i}.b", "a.x.b", None),
    ("a*", "a.b/c", ()),
  ],
)
def test_templates_solve_for_their_integers(template, name, values):
  assert Template(template).match(name) == values
  if values:
    assert Template(template).fill(values) == name


def test_stacked_layers_and_joined_heads_are_moves_too():
  stacked = Rule("block/w", ("params/b_0/w", "params/b_1/w"), moves.STACK)
  value = np.arange(6.0).reshape(2, 3)
  weights = KeyMap("scan", (stacked,)).load({"block/w": value})
  np.testing.assert_array_equal(weights.params["b_1"]["w"], value[1])
  np.testing.assert_array_equal(KeyMap("scan", (stacked,)).dump(weights)["block/w"], value)
  ranked = Rule("alpha", "params/scale", moves.leading(2))
  assert KeyMap("rank", (ranked,)).load({"alpha": np.ones((1, 1, 4))}).params["scale"].shape == (4,)
