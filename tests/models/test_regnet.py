"""RegNetY against ClassyVision and VISSL: generator, both modes, gradients, statistics, weights, sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.config import MeshConfig
from big_ssl.core.sharding import state_shardings
from big_ssl.core.types import UserError
from big_ssl.models.heads import ProjectionHead
from big_ssl.models.regnet import LINES, Line, RegNet, expand
from big_ssl.ops.normalize import l2_normalize
from big_ssl.weights.keymap import KeyMap, Weights
from big_ssl.weights.regnet import regnet_rules, seer_head_rules, seer_parts

SEER = KeyMap("RegNetY of VISSL", regnet_rules(trunk="_feature_blocks."))
TOY = {"variant": "custom", "widths": (8, 16), "depths": (1, 3), "group_width": 4, "stem_width": 8}


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def state_of(z):
  return {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}


def variables_of(weights):
  return {"params": weights.params["backbone"], "batch_stats": weights.batch_stats["backbone"]}


def recorded(z):
  weights = SEER.load(state_of(z))
  c = {k: z[f"config/{k}"].item() for k in ("depth", "w_0", "w_a", "w_m", "group_width", "stem_width")}
  return RegNet(variant="custom", **c | {"w_m": round(c["w_m"], 4)}), weights


@pytest.mark.parametrize("variant", LINES)
def test_the_generator_gives_the_published_stages(golden, variant):
  z = golden("regnety_generator")
  name = "regnet_10b" if variant == "10b" else f"regnet_y_{variant}"
  assert dataclasses.astuple(LINES[variant]) == tuple(z[f"f64/{name}/params_depth_w0_wa_wm_gw"])
  stages = expand(LINES[variant])
  for field, key in (("width", "widths"), ("depth", "depths"), ("group_width", "group_widths")):
    assert [getattr(s, field) for s in stages] == z[f"{name}/{key}"].tolist()


@pytest.mark.parametrize("variant", ["800mf", "8gf", "32gf", "256gf", "10b"])
def test_parameter_counts_are_the_published_ones_without_allocation(golden, variant):
  name = "regnet_10b" if variant == "10b" else f"regnet_y_{variant}"
  params = abstract(RegNet(variant=variant))["params"]
  assert (
    sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params)) == golden("regnety_generator")[f"{name}/trunk_params"]
  )


def abstract(model):
  images = jnp.zeros((1, 32, 32, model.channels))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  return {k: shapes[k] for k in ("params", "batch_stats")}


def test_torchvision_rounds_two_of_them_differently():
  widths = {v: [s.width for s in expand(line, rounding="torchvision")] for v, line in LINES.items()}
  assert widths["8gf"] == [224, 448, 896, 2016] and widths["800mf"] == [64, 144, 320, 784]
  different = [v for v in widths if widths[v] != [s.width for s in expand(LINES[v])]]
  assert different == ["800mf", "8gf"]
  assert [s.width for s in RegNet(variant="8gf", rounding="torchvision").stages()] == widths["8gf"]
  assert [s.width for s in RegNet(variant="3b").stages()] == [1840, 3680, 10120, 25760]


@pytest.mark.parametrize("tag", ["even", "odd"])
def test_the_public_network_is_reproduced_in_both_modes(golden, tag):
  z = golden("regnety_forward")
  model, weights = recorded(z)
  variables, images = variables_of(weights), nhwc(z[f"{tag}/input"])

  @functools.partial(jax.jit, static_argnums=1)
  def run(images, train):
    def weighted(images):
      out, updated = model.apply(variables, images, train=train, mutable=["batch_stats"])
      return jnp.sum(out["pooled"] * z[f"{tag}/grad_weight"]), (out, updated)

    return jax.grad(weighted, has_aux=True)(images)

  grad, (out, _) = run(images, False)
  for i, name in enumerate(("conv1", "res2", "res3", "res4")):
    np.testing.assert_allclose(out["stages"][i], nhwc(z[f"{tag}/output/{name}"]), atol=2e-5, err_msg=name)
  np.testing.assert_allclose(out["pooled"], z[f"{tag}/output/flatten"], atol=2e-5)
  np.testing.assert_allclose(out["tokens"].mean(1), out["pooled"], atol=1e-5)
  wanted = nhwc(z[f"{tag}/grad/input"])
  np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
  grad, (out, updated) = run(images, True)
  np.testing.assert_allclose(out["pooled"], z[f"{tag}/output/train/flatten"], atol=2e-5)
  wanted = nhwc(z[f"{tag}/grad/train/input"])
  np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
  after = SEER.dump(Weights({}, {"backbone": updated["batch_stats"]}))
  prefix = f"{tag}/output/train/new_state/"
  new = {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}
  assert new.keys() == {k for k in after if "running" in k}
  for key, value in new.items():
    np.testing.assert_allclose(after[key], value, atol=2e-5, err_msg=key)


def test_the_naming_of_the_largest_release_with_head_and_prototypes_is_read(golden):
  z = golden("seer_regnety_10b_naming_tiny")
  state = state_of(z)
  parts = seer_parts(state)
  rules = regnet_rules(trunk="trunk._feature_blocks.", parts=parts) + seer_head_rules(batch_norms=False)
  keymap = KeyMap("SEER", rules)
  weights = keymap.load(state)
  again = keymap.dump(weights)
  assert again.keys() == state.keys()
  for key in state:
    np.testing.assert_array_equal(again[key], state[key], strict=True)
  depth, w_0, w_a, w_m, group = (round(float(x), 4) for x in z["regnet_params"])
  model = RegNet(variant="custom", depth=int(depth), w_0=int(w_0), w_a=w_a, w_m=w_m, group_width=int(group))
  assert [s.width for s in model.stages()] == z["stage_widths"].tolist()
  model = model.clone(remat="full", remat_ends=((1,), (1,), (2,), ()))
  assert parts == tuple(
    (i, b, p) for i, stage in enumerate(model._runs(model.stages()), 1) for p, r in enumerate(stage) for b in r
  )
  run = jax.jit(
    lambda train: model.apply(variables_of(weights), nhwc(z["input"]), train=train, mutable=["batch_stats"]),
    static_argnums=0,
  )
  trained, updated = run(True)
  np.testing.assert_allclose(trained["pooled"], z["output/train_flatten"], atol=1e-4)
  after = keymap.dump(Weights({}, {"backbone": updated["batch_stats"]}))
  for key in (k for k in after if "running" in k):
    np.testing.assert_allclose(after[key], z[f"new_state/{key}"], atol=1e-4, err_msg=key)
  out, _ = run(False)
  np.testing.assert_allclose(out["pooled"], z["output/eval_flatten"], atol=1e-4)
  widths = [weights.params["head"][f"fc{i}"]["bias"].shape[0] for i in (1, 2, 3)]
  head = ProjectionHead(hidden=tuple(widths[:2]), output=widths[2], activation="relu", batch_norm=False)
  embedding = l2_normalize(head.apply({"params": weights.params["head"]}, out["pooled"], train=False))
  np.testing.assert_allclose(embedding, z["output/eval_embedding"], atol=1e-4)
  scores = embedding @ weights.params["prototypes"]["head0"].T
  np.testing.assert_allclose(scores, z["output/eval_scores"], atol=1e-4)


@pytest.mark.parametrize(
  "entry,dialect,trunk",
  [
    ("vissl/seer_regnet32gf:classy_state_dict.base_model.model.trunk", "vissl", "_feature_blocks."),
    ("hf/facebook/regnet-y-320-seer (prefix regnet. in the file)", "hf", ""),
    ("timm/regnety_320.seer", "timm", ""),
  ],
)
def test_released_names_and_shapes_fill_the_full_model(golden, entry, dialect, trunk):
  z = golden("checkpoint_key_tables")
  shapes = [tuple(n for n in row.tolist() if n >= 0) for row in z[f"{entry}/shapes_pad_minus1"]]
  state = {k: np.broadcast_to(np.float32(0), s) for k, s in zip(z[f"{entry}/keys"].tolist(), shapes, strict=True)}
  keymap = KeyMap("RegNetY", regnet_rules(dialect=dialect, trunk=trunk))
  expect = Weights(*({"backbone": t} for t in abstract(RegNet(variant="32gf")).values())).flat()
  weights = keymap.load(state, expect={k: v.shape for k, v in expect.items()})
  again = keymap.dump(weights)
  assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("dialect", ["vissl", "timm", "hf", "torchvision"])
def test_weights_round_trip_bit_for_bit_through_every_dialect(golden, dialect):
  state = state_of(golden("regnety_forward"))
  weights = SEER.load(state)
  keymap = KeyMap("RegNetY", regnet_rules(dialect=dialect))
  other = keymap.dump(dataclasses.replace(weights, kept=None))
  assert len(other) == len(state)
  again = SEER.dump(dataclasses.replace(keymap.load(other), kept=weights.kept))
  assert again.keys() == state.keys()
  for key in state:
    np.testing.assert_array_equal(again[key], state[key], strict=True)


@pytest.fixture(scope="module")
def tiny():
  model = RegNet(**TOY)
  images = jax.random.normal(jax.random.key(0), (8, 20, 16, 3))
  return model, jax.jit(model.init, static_argnames="train")(jax.random.key(1), images, train=False), images


def gradients(model, variables, images):
  def loss(params):
    out, updated = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
    return jnp.sum(out["pooled"] ** 2), updated

  return jax.grad(loss, has_aux=True)(variables["params"])


@pytest.mark.parametrize("ends", [(), ((), (2,))])
def test_rematerialization_changes_neither_gradients_nor_statistics_nor_the_tree(tiny, ends):
  model, variables, images = tiny
  other = model.clone(remat="full", remat_ends=ends)
  tree = jax.eval_shape(lambda: other.init(jax.random.key(1), images, train=False))
  assert jax.tree.structure(tree) == jax.tree.structure(variables)
  run = jax.jit(gradients, static_argnums=0)
  for a, b in zip(
    jax.tree.leaves(run(model, variables, images)), jax.tree.leaves(run(other, variables, images)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_rematerialization_stores_the_inputs_of_its_runs_only(tiny):
  model, variables, images = tiny

  def stored(model):
    loss = lambda p: model.apply(variables | {"params": p}, images, train=True, mutable=["batch_stats"])[0]["pooled"]
    kept = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], variables["params"])
    return sum(x.size for x in jax.tree.leaves(kept) if x.ndim == 4 and x.shape[0] == len(images))

  blocks, runs = model.clone(remat="full"), model.clone(remat="full", remat_ends=((), ()))
  assert stored(runs) < stored(blocks) < 0.5 * stored(model)


def test_fsdp_over_eight_devices_equals_one_device_in_value_and_gradient(tiny):
  model, variables, images = tiny
  mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
  config = MeshConfig(data=2, fsdp=4, fsdp_min_size=1)
  places = state_shardings(mesh, variables, config)
  assert any("fsdp" in s.spec for s in jax.tree.leaves(places))
  run = jax.jit(gradients, static_argnums=0)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
  with jax.set_mesh(mesh):
    eight = run(model, jax.device_put(variables, places), jax.device_put(images, rows))
  for a, b in zip(jax.tree.leaves(run(model, variables, images)), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(a).max()))


def test_the_256gf_trunk_is_split_over_eight_devices_though_its_widths_are_not_multiples_of_eight():
  mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
  tree = abstract(RegNet(variant="256gf"))["params"]
  places = state_shardings(mesh, tree, MeshConfig(data=1, fsdp=8))
  for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True):
    place.shard_shape(leaf.shape)  # raises where it does not divide


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_odd_sides_are_rounded_up_and_any_channels_are_read(channels):
  model = RegNet(**TOY, channels=channels)
  out = jax.eval_shape(
    lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, 33, 17, channels)), train=False)[0]
  )
  assert [s.shape for s in out["stages"]] == [(2, 17, 9, 8), (2, 9, 5, 8), (2, 5, 3, 16)]
  assert out["tokens"].shape == (2, 15, 16)


def test_squeeze_and_excitation_is_relative_to_the_input_and_can_be_left_out(tiny):
  _, variables, _ = tiny
  hidden = [variables["params"][f"layer2_{i}"]["se"]["fc1"]["kernel"].shape[-1] for i in (0, 1)]
  assert hidden == [2, 4]
  assert "se" not in abstract(RegNet(**TOY, se_ratio=0.0))["params"]["layer2_0"]


def test_batch_statistics_per_group_and_bfloat16_have_their_effects(tiny):
  model, variables, images = tiny
  run = lambda m, train: m.apply(variables, images, train=train, mutable=["batch_stats"])[0]["pooled"]
  assert np.abs(run(model, True) - run(model.clone(bn_groups=4), True)).max() > 1e-3
  half = model.clone(dtype="bfloat16")
  np.testing.assert_allclose(run(half, False), run(model, False), atol=0.1)
  assert half.apply(variables, images, train=False)["stages"][-1].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"variant": "8GF"}, "Did you mean '8gf'"),
    ({"variant": "8gf", "w_0": 190}, "config.model.w_0=190: expected a positive multiple of 8"),
    ({"variant": "8gf", "w_m": 1.0}, "config.model.w_m=1.0: expected more than 1"),
    ({"variant": "8gf", "w_a": -1.0}, "config.model.w_a=-1.0"),
    ({"variant": "custom"}, "config.model.depth=0"),
    (TOY | {"group_width": 5}, "stage 1 of width 8 does not divide into groups of 5"),
    (TOY | {"depths": (1,)}, "expected as many"),
    (TOY | {"group_width": 0}, "config.model.group_width=0"),
    (TOY | {"channels": 4}, "config.model.channels=4"),
    (TOY | {"remat_ends": ((1,), (2,))}, "no effect without config.model.remat='full'"),
    (TOY | {"remat": "full", "remat_ends": ((1,), (4,))}, "the depths are 1, 3"),
  ],
)
def test_wrong_fields_are_clear_errors(changes, message):
  with pytest.raises(UserError, match=message):
    jax.eval_shape(lambda: RegNet(**changes).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False))


def test_a_line_that_falls_into_one_stage_is_one_stage():
  assert [s.depth for s in expand(Line(4, 16, 0.0, 2.0, 8))] == [4]
