"""ResMLP against the public code, weights in and out, and what its token layer allows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.resmlp import ResMLP
from big_ssl.weights.keymap import KeyMap, Weights
from big_ssl.weights.resmlp import resmlp_rules

OFFICIAL = KeyMap("ResMLP", resmlp_rules())
TIMM = KeyMap("ResMLP of timm", resmlp_rules(dialect="timm"))


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def state_of(z):
  return {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}


def custom(**changes):
  return ResMLP(**({"variant": "custom", "width": 32, "depth": 3, "patch": 8, "image_size": 32} | changes))


def test_the_public_network_and_its_gradient_are_reproduced(golden):
  z = golden("resmlp_forward")
  weights = OFFICIAL.load(state_of(z))
  params = {"params": weights.params["backbone"]}
  run = jax.jit(lambda x: custom().apply(params, x, train=False))
  images = nhwc(z["input"])
  out = run(images)
  for i, name in enumerate(("patch_embed", "block0", "block1", "block2")):
    np.testing.assert_allclose(out["stages"][i].reshape(2, 16, 32), z[f"output/{name}"], atol=2e-5, err_msg=name)
  np.testing.assert_allclose(out["pooled"], z["output/features"], atol=2e-5)
  head = weights.params["head"]["fc"]
  np.testing.assert_allclose(out["pooled"] @ head["kernel"] + head["bias"], z["output/logits"], atol=2e-5)
  grad = jax.grad(lambda x: jnp.sum(run(x)["pooled"] * z["grad_weight"]))(images)
  np.testing.assert_allclose(grad, nhwc(z["grad/input"]), atol=2e-5)


def test_weights_round_trip_bit_for_bit_in_both_dialects(golden):
  state = state_of(golden("resmlp_forward"))
  weights = OFFICIAL.load(state)
  again, other = OFFICIAL.dump(weights), TIMM.dump(weights)
  assert again.keys() == state.keys() and other["blocks.0.norm1.alpha"].shape == (1, 1, 32)
  for key in state:
    np.testing.assert_array_equal(again[key], state[key], strict=True)
  for a, b in zip(jax.tree.leaves(TIMM.load(other).params), jax.tree.leaves(weights.params), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("entry,keymap", [("deit/resmlp_12_dist.pth", OFFICIAL), ("timm/resmlp_12_224", TIMM)])
def test_released_names_and_shapes_fill_the_full_model(golden, entry, keymap):
  z = golden("checkpoint_key_tables")
  shapes = [tuple(n for n in row.tolist() if n >= 0) for row in z[f"{entry}/shapes_pad_minus1"]]
  state = {k: np.broadcast_to(np.float32(0), s) for k, s in zip(z[f"{entry}/keys"].tolist(), shapes, strict=True)}
  expect = {k: v.shape for k, v in Weights({"backbone": abstract(ResMLP())}, {}).flat().items()}
  expect |= {"params/head/fc/kernel": (384, 1000), "params/head/fc/bias": (1000,)}
  again = keymap.dump(keymap.load(state, expect=expect))
  assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


def abstract(model):
  return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False))["params"]


@pytest.mark.parametrize("variant,millions", [("S12", 15.35), ("S24", 30.02), ("S36", 44.69), ("B24", 129.14)])
def test_parameter_counts_with_a_classifier_are_the_published_ones(variant, millions):
  model = ResMLP(variant=variant)
  params = abstract(model)
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
  assert round((count + 1000 * (model.size().width + 1)) / 1e6, 2) == millions
  assert params["block_0"]["mix"]["kernel"].shape == (model.table()[0] ** 2,) * 2


@pytest.fixture(scope="module")
def tiny():
  model = custom(width=16, depth=2, layer_scale=0.5)
  images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
  return model, jax.jit(model.init, static_argnames="train")(jax.random.key(1), images, train=False)["params"], images


def test_permuting_patches_and_both_axes_of_the_token_layers_leaves_the_pooled_feature(tiny):
  model, params, images = tiny
  order = np.asarray(jax.random.permutation(jax.random.key(2), 16))
  patches = images.reshape(8, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(8, 16, 8, 8, 3)[:, order]
  moved = patches.reshape(8, 4, 4, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
  mixed = dict(params)
  for i in range(2):
    mix = params[f"block_{i}"]["mix"]
    new = {"kernel": mix["kernel"][order][:, order], "bias": mix["bias"][order]}
    mixed[f"block_{i}"] = params[f"block_{i}"] | {"mix": new}
  run = lambda p, x: model.apply({"params": p}, x, train=False)["pooled"]
  np.testing.assert_allclose(run(mixed, moved), run(params, images), atol=1e-5)
  assert np.abs(run(params, moved) - run(params, images)).max() > 1e-4


def test_layer_scale_starts_at_its_depth():
  assert [ResMLP(variant=v).size().layer_scale for v in ("S12", "S24", "S36", "B24")] == [0.1, 1e-5, 1e-6, 1e-6]
  assert ResMLP(variant="S12", layer_scale=1e-3).size().layer_scale == 1e-3


def test_stochastic_depth_is_the_same_in_all_blocks_and_acts_in_training_only(tiny, monkeypatch):
  model, params, images = tiny
  rates = []
  monkeypatch.setattr("big_ssl.models.resmlp.drop_path", lambda x, *, rate, key: rates.append((rate, key is None)) or x)
  dropping = model.clone(drop_path=0.3)
  for train in (True, False):
    dropping.apply({"params": params}, images, train=train, rngs={"drop_path": jax.random.key(0)})
  assert rates == [(0.3, False)] * 4 + [(0.3, True)] * 4
  monkeypatch.undo()
  run = lambda k: dropping.apply({"params": params}, images, train=True, rngs={"drop_path": jax.random.key(k)})[
    "pooled"
  ]
  assert not np.allclose(run(0), run(1), atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (16, 40)])
def test_other_resolutions_are_an_error_or_a_resampling_that_keeps_sums(tiny, size):
  model, params, _ = tiny
  images = jnp.full((1, *size, 3), 0.7)
  with pytest.raises(UserError, match=f"image_size=32: the token layers mix 4x4 patches, found .*{size[0]}x{size[1]}"):
    model.apply({"params": params}, images, train=False)
  # A constant input of the token layer gives the sums of its columns: on another grid they are resampled as a map.
  flat = jax.tree.map(lambda x: jnp.broadcast_to(x.mean(), x.shape), params["block_0"]["mix"])
  even = {k: v | {"mix": flat} if k.startswith("block") else v for k, v in params.items()}
  other = model.clone(resample="bilinear").apply({"params": even}, images, train=False)
  same = model.apply({"params": even}, jnp.full((1, 32, 32, 3), 0.7), train=False)
  np.testing.assert_allclose(other["pooled"], same["pooled"], atol=1e-5)
  grid = (size[0] // 8, size[1] // 8)
  assert other["stages"][-1].shape == (1, *grid, 16)


def test_rectangular_models_and_other_channels():
  model = custom(image_size=(16, 40), channels=5, mlp_ratio=2.0)
  out, variables = model.init_with_output(jax.random.key(0), jnp.zeros((2, 16, 40, 5)), train=False)
  assert out["tokens"].shape == (2, 10, 32) and variables["params"]["block_0"]["mlp"]["fc1"]["kernel"].shape == (32, 64)


def test_rematerialization_changes_neither_gradients_nor_the_tree(tiny):
  model, params, images = tiny
  model = model.clone(drop_path=0.2)
  other = model.clone(remat="full")
  assert jax.tree.structure(other.init(jax.random.key(1), images, train=False)["params"]) == jax.tree.structure(params)

  @functools.partial(jax.jit, static_argnums=0)
  def run(model):
    rngs = {"drop_path": jax.random.key(5)}
    loss = lambda p: jnp.sum(model.apply({"params": p}, images, train=True, rngs=rngs)["pooled"] ** 2)
    return jax.grad(loss)(params)

  for a, b in zip(jax.tree.leaves(run(model)), jax.tree.leaves(run(other)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_small_layer_scales_survive_bfloat16(tiny):
  model, params, images = tiny
  half = model.clone(dtype="bfloat16", layer_scale=1e-6)
  faint = half.init(jax.random.key(1), images, train=False)["params"]
  assert {x.dtype for x in jax.tree.leaves(faint)} == {jnp.float32.dtype}
  stages = half.apply({"params": faint}, images, train=False)["stages"]
  assert stages[-1].dtype == jnp.float32 and np.any(stages[1] != stages[0])
  near = half.apply({"params": params}, images, train=False)["pooled"]
  np.testing.assert_allclose(near, model.apply({"params": params}, images, train=False)["pooled"], atol=0.05)


def test_eight_devices_give_the_output_of_one(tiny, mesh8):
  model, params, images = tiny
  run = jax.jit(lambda p, x: model.apply({"params": p}, x, train=False)["pooled"])
  one = run(params, images)
  with jax.set_mesh(mesh8):
    rows = jax.device_put(images, jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec("data")))
    eight = run(jax.device_put(params, jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec())), rows)
  np.testing.assert_allclose(one, eight, atol=1e-5)


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"variant": "s12"}, "Did you mean 'S12'"),
    ({"depth": 0}, "give width, depth and patch"),
    ({"patch": 7}, "config.model.patch=7: does not divide"),
    ({"drop_path": -0.1}, "config.model.drop_path=-0.1"),
    ({"channels": 1}, "config.model.channels=1: the images have 3"),
  ],
)
def test_wrong_fields_are_clear_errors(changes, message):
  with pytest.raises(UserError, match=message):
    jax.eval_shape(lambda: custom(**changes).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))


def test_dropped_patches_are_a_clear_error(tiny):
  model, params, images = tiny
  with pytest.raises(UserError, match="keep: ResMLP reads all of an image"):
    model.apply({"params": params}, images, train=False, keep=jnp.arange(3))
