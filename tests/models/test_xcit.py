"""XCiT against the public code: every block, both modes, gradients, running statistics, weights in and out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.xcit import SIZES, CrossCovarianceAttention, XCiT, fourier_positions
from big_ssl.weights.keymap import KeyMap, Weights
from big_ssl.weights.xcit import xcit_rules

RECORDED = [("xcit_p16_forward", "square"), ("xcit_p16_forward", "nonsquare"), ("xcit_p8_nano_forward", "nonsquare")]


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def tokens(x):
  return np.asarray(x).reshape(x.shape[0], -1, x.shape[-1])


def recorded(z):
  """The model of a file, its weights and its key map."""
  config = {k.removeprefix("config/"): z[k].item() for k in z if k.startswith("config/")}
  state = {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}
  keymap = KeyMap("XCiT", xcit_rules(heads=config["num_heads"]))
  model = XCiT(
    variant="custom",
    patch=config["patch_size"],
    width=config["embed_dim"],
    depth=config["depth"],
    heads=config["num_heads"],
    mlp_ratio=config["mlp_ratio"],
    tokens_norm=config["tokens_norm"],
    class_layers=config["cls_attn_layers"],
  )
  return model, keymap, keymap.load(state), state


def variables_of(weights):
  return {"params": weights.params["backbone"], "batch_stats": weights.batch_stats["backbone"]}


@pytest.mark.parametrize("name,tag", RECORDED)
def test_the_public_network_is_reproduced_block_by_block(golden, name, tag):
  z = golden(name)
  model, _, weights, _ = recorded(z)
  wanted = {k.removeprefix(f"{tag}/output/"): v for k, v in z.items() if k.startswith(f"{tag}/output/")}
  close = functools.partial(np.testing.assert_allclose, atol=3e-5)
  out, captured = model.apply(variables_of(weights), nhwc(z[f"{tag}/input"]), train=False, capture_intermediates=True)
  inner = {k: v["__call__"][0] for k, v in captured["intermediates"].items() if k != "__call__"}
  close(tokens(inner["patch_embed"]), wanted["stem"])
  close(inner["pos_embed"], nhwc(wanted["pos_encoding_BCHW"]))
  close(tokens(out["stages"][0]), wanted["stem"] + tokens(nhwc(wanted["pos_encoding_BCHW"])))
  for i in range(model.depth):
    close(tokens(out["stages"][i + 1]), wanted[f"block{i}"], err_msg=f"block {i}")
  for i in range(model.class_layers):
    close(inner[f"class_block_{i}"][0], wanted[f"cls_block{i}_all_tokens"], err_msg=f"class block {i}")
    close(out["cls_layers"][:, i], wanted[f"cls_block{i}_all_tokens"][:, 0])
  close(out["cls"], wanted["cls_features"])
  close(out["cls_layers_normed"][:, -1], wanted["cls_features"])
  head = weights.params["head"]["fc"]
  close(out["pooled"] @ head["kernel"] + head["bias"], wanted["logits"])


@pytest.mark.parametrize("name,tag", RECORDED)
def test_gradients_and_running_statistics_are_the_public_ones(golden, name, tag):
  z = golden(name)
  model, keymap, weights, _ = recorded(z)
  variables, images = variables_of(weights), nhwc(z[f"{tag}/input"])

  @functools.partial(jax.jit, static_argnums=1)
  def run(images, train):
    def weighted(images):
      out, updated = model.apply(variables, images, train=train, mutable=["batch_stats"])
      return jnp.sum(out["cls"] * z[f"{tag}/grad_weight"]), (out["cls"], updated)

    return jax.grad(weighted, has_aux=True)(images)

  for train, prefix in ((False, f"{tag}/grad/input"), (True, f"{tag}/grad/train/input")):
    grad, (cls, updated) = run(images, train)
    np.testing.assert_allclose(grad, nhwc(z[prefix]), rtol=0, atol=1e-4 * np.abs(z[prefix]).max())
  np.testing.assert_allclose(cls, z[f"{tag}/output/train/cls_features"], atol=3e-5)
  after = keymap.dump(Weights({}, {"backbone": updated["batch_stats"]}))
  new = {k: v for k, v in z.items() if k.startswith(f"{tag}/output/train/new_state/")}
  assert len(new) == 2 * sum(k.endswith("running_mean") for k in after)
  for key, value in new.items():
    np.testing.assert_allclose(after[key.removeprefix(f"{tag}/output/train/new_state/")], value, atol=3e-5, err_msg=key)


@pytest.mark.parametrize("name", ["xcit_p16_forward", "xcit_p8_nano_forward"])
def test_weights_round_trip_bit_for_bit_in_both_dialects(golden, name):
  _, keymap, weights, state = recorded(golden(name))
  again = keymap.dump(weights)
  assert again.keys() == state.keys()
  for key in state:
    np.testing.assert_array_equal(again[key], state[key], strict=True)
  heads = state["blocks.0.attn.temperature"].shape[0]
  timm = KeyMap("XCiT of timm", xcit_rules(heads=heads, dialect="timm"))
  other = timm.dump(weights)
  assert len(other) == len(state) + 2 * 4 and "cls_attn_blocks.1.attn.k.weight" in other
  for a, b in zip(jax.tree.leaves(timm.load(other).params), jax.tree.leaves(weights.params), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  "entry,variant,patch,dialect",
  [
    ("dino/dino_xcit_small_12_p16_pretrain.pth", "small12", 16, "official"),
    ("xcit/xcit_tiny_24_p8_224.pth", "tiny24", 8, "official"),
    ("timm/xcit_small_12_p16_224", "small12", 16, "timm"),
  ],
)
def test_released_names_and_shapes_fill_the_full_model(golden, entry, variant, patch, dialect):
  z = golden("checkpoint_key_tables")
  shapes = [tuple(n for n in row.tolist() if n >= 0) for row in z[f"{entry}/shapes_pad_minus1"]]
  state = {k: np.broadcast_to(np.float32(0), s) for k, s in zip(z[f"{entry}/keys"].tolist(), shapes, strict=True)}
  model = XCiT(variant=variant, patch=patch)
  expect = Weights(*({"backbone": t} for t in abstract(model).values())).flat()
  expect = {k: v.shape for k, v in expect.items()}
  if "head.weight" in state:
    expect |= {"params/head/fc/kernel": (model.size().width, 1000), "params/head/fc/bias": (1000,)}
  keymap = KeyMap("XCiT", xcit_rules(heads=model.size().heads, dialect=dialect))
  again = keymap.dump(keymap.load(state, expect=expect))
  assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


def abstract(model, side=64):
  images = jnp.zeros((1, side, side, model.channels))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  return {k: shapes[k] for k in ("params", "batch_stats")}


@pytest.mark.parametrize(
  "variant,patch,millions",
  [
    ("nano12", 16, 3.05),
    ("tiny12", 16, 6.72),
    ("tiny24", 16, 12.12),
    ("small12", 16, 26.25),
    ("small24", 16, 47.67),
    ("medium24", 16, 84.40),
    ("medium24", 8, 84.32),
    ("large24", 16, 189.10),
    ("large24", 8, 188.93),
  ],
)
def test_parameter_counts_with_a_classifier_are_the_published_ones(variant, patch, millions):
  model = XCiT(variant=variant, patch=patch)
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract(model)["params"]))
  assert round((count + 1000 * (SIZES[variant].width + 1)) / 1e6, 2) == millions


@pytest.fixture(scope="module")
def tiny():
  model = XCiT(variant="custom", patch=8, width=16, depth=2, heads=2, layer_scale=0.5)
  images = jax.random.normal(jax.random.key(0), (8, 40, 24, 3))
  variables = jax.jit(model.init, static_argnames="train")(jax.random.key(1), images, train=False)
  leaves, tree = jax.tree.flatten(variables)  # off the symmetric start, where norms of norms change nothing
  keys = jax.random.split(jax.random.key(2), len(leaves))
  moved = [x + 0.2 * jax.random.uniform(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
  return model, jax.tree.unflatten(tree, moved), images


@pytest.mark.parametrize("shape,patch,grid", [((33, 47), 8, (5, 6)), ((17, 100), 16, (2, 7)), ((5, 9), 16, (1, 1))])
@pytest.mark.parametrize("channels", [1, 4])
def test_odd_and_rectangular_sides_are_rounded_up_and_any_channels_are_read(shape, patch, grid, channels):
  model = XCiT(variant="custom", patch=patch, width=16, depth=1, heads=2, channels=channels)
  images = jnp.zeros((2, *shape, channels))
  out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False)[0])
  assert out["stages"][-1].shape == (2, *grid, 16) and out["tokens"].shape == (2, grid[0] * grid[1], 16)


def test_positions_are_relative_to_the_grid():
  table = fourier_positions((4, 6))
  assert table.shape == (4, 6, 64) and np.abs(table).max() <= 1
  np.testing.assert_allclose(table[1, 0, :32], fourier_positions((8, 6))[3, 0, :32], atol=1e-5)
  np.testing.assert_allclose(
    table[..., 0], np.broadcast_to(np.sin(np.arange(1, 5) / 4 * 2 * np.pi)[:, None], (4, 6)), atol=1e-5
  )
  np.testing.assert_allclose(
    table[..., 33], np.broadcast_to(np.cos(np.arange(1, 7) / 6 * 2 * np.pi), (4, 6)), atol=1e-5
  )


def test_attention_over_channels_is_equivariant_under_permutations_and_local_interaction_is_not(tiny):
  model, variables, images = tiny
  x, order = jax.random.normal(jax.random.key(3), (2, 15, 16)), jax.random.permutation(jax.random.key(4), 15)
  attend = CrossCovarianceAttention(2, "float32")
  params = {"params": variables["params"]["block_0"]["attention"]}
  np.testing.assert_allclose(attend.apply(params, x[:, order]), attend.apply(params, x)[:, order], atol=1e-5)
  shifted = model.apply(variables, jnp.roll(images, 8, axis=1), train=False)["stages"][1]
  assert np.abs(shifted - jnp.roll(model.apply(variables, images, train=False)["stages"][1], 1, axis=1)).max() > 1e-3


def test_attention_of_four_times_the_tokens_costs_four_times_as_much():
  attend = CrossCovarianceAttention(2, "float32")
  params = attend.init(jax.random.key(0), jnp.zeros((1, 16, 32)))

  def flops(count):
    return jax.jit(attend.apply).lower(params, jnp.zeros((1, count, 32))).compile().cost_analysis()["flops"]

  assert 3.5 < flops(1024) / flops(256) < 4.5


def test_a_channel_of_zeros_has_a_finite_gradient():
  attend = CrossCovarianceAttention(2, "float32")
  params = jax.tree.map(jnp.zeros_like, attend.init(jax.random.key(0), jnp.zeros((1, 6, 8))))
  grads = jax.grad(lambda p: jnp.sum(attend.apply(p, jnp.ones((1, 6, 8)))))(params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_stochastic_depth_is_the_same_in_all_blocks_and_acts_in_training_only(tiny, monkeypatch):
  model, variables, images = tiny
  rates = []
  monkeypatch.setattr("big_ssl.models.xcit.drop_path", lambda x, *, rate, key: rates.append((rate, key is None)) or x)
  dropping = model.clone(drop_path=0.3)
  for train in (True, False):
    dropping.apply(variables, images, train=train, rngs={"drop_path": jax.random.key(0)}, mutable=["batch_stats"])
  assert rates == [(0.3, False)] * 6 + [(0.3, True)] * 6
  monkeypatch.undo()
  run = lambda k: dropping.apply(
    variables, images, train=True, rngs={"drop_path": jax.random.key(k)}, mutable=["batch_stats"]
  )[0]["cls"]
  assert not np.allclose(run(0), run(1), atol=1e-3)


def test_layer_scale_starts_at_its_depth_and_options_have_an_effect(tiny):
  model, variables, images = tiny
  for variant, start in (("small12", 1.0), ("small24", 1e-5)):
    assert XCiT(variant=variant).size().layer_scale == start
    assert XCiT(variant=variant, layer_scale=0.5).size().layer_scale == 0.5
  fresh = model.init(jax.random.key(1), images, train=False)["params"]
  assert np.all(fresh["block_1"]["ls3"]["scale"] == 0.5)
  run = lambda m: m.apply(variables, images, train=False)["cls"]
  assert np.abs(run(model) - run(model.clone(tokens_norm=False))).max() > 1e-3
  assert np.abs(run(model) - run(model.clone(positions=False))).max() > 1e-3
  grouped = [
    m.apply(variables, images, train=True, mutable=["batch_stats"])[0]["cls"] for m in (model, model.clone(bn_groups=4))
  ]
  assert np.abs(grouped[0] - grouped[1]).max() > 1e-3


def test_rematerialization_changes_neither_gradients_nor_statistics_nor_the_tree(tiny):
  model, variables, images = tiny
  trees = [abstract(m) for m in (model, model.clone(remat="full"))]
  assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
  model = model.clone(drop_path=0.2, depth=1, class_layers=1)
  other = model.clone(remat="full")

  @functools.partial(jax.jit, static_argnums=0)
  def run(model):
    def loss(params):
      tree = variables | {"params": params}
      out, updated = model.apply(
        tree, images, train=True, mutable=["batch_stats"], rngs={"drop_path": jax.random.key(5)}
      )
      return jnp.sum(out["cls"] ** 2 * jnp.arange(16)), updated

    return jax.grad(loss, has_aux=True)(variables["params"])

  for a, b in zip(jax.tree.leaves(run(model)), jax.tree.leaves(run(other)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-6)  # gradients reach 1,500, where 1e-4 is the last bit of float32


def test_class_attention_maps_are_distributions_over_cls_and_patches(tiny):
  model, variables, images = tiny
  out = model.apply(variables, images, train=False, attention_layers=(1,))
  assert out["attention"].keys() == {1} and out["attention"][1].shape == (8, 2, 1, 16)
  np.testing.assert_allclose(out["attention"][1].sum(-1), 1, atol=1e-5)


def test_eight_devices_give_the_output_and_the_statistics_of_one(tiny, mesh8):
  model, variables, images = tiny
  run = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
  out, updated = run(variables, images)
  with jax.set_mesh(mesh8):
    rows = jax.device_put(images, jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec("data")))
    other, spread = run(
      jax.device_put(variables, jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec())), rows
    )
  np.testing.assert_allclose(out["cls"], other["cls"], atol=1e-5)
  for a, b in zip(jax.tree.leaves(updated), jax.tree.leaves(spread), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_keeps_parameters_and_the_stream_in_float32_and_is_near(tiny):
  model, variables, images = tiny
  half = model.clone(dtype="bfloat16")
  out = half.apply(variables, images, train=False)
  assert out["cls"].dtype == jnp.bfloat16 and out["stages"][-1].dtype == jnp.float32
  np.testing.assert_allclose(
    np.asarray(out["cls"], np.float32), model.apply(variables, images, train=False)["cls"], atol=0.1
  )
  assert {x.dtype for x in jax.tree.leaves(half.init(jax.random.key(1), images, train=False))} == {jnp.float32.dtype}


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"patch": 4}, "config.model.patch=4: XCiT's stem has a stride of 8 or 16"),
    ({"variant": "smal12"}, "Did you mean 'small12'"),
    ({"heads": 3}, "config.model.heads=3: must divide"),
    ({"variant": "custom", "width": 8}, "give width, depth and heads"),
    ({"width": 20, "heads": 2}, "config.model.width=20: must be a multiple of 8"),
    ({"drop_path": 1.0}, "config.model.drop_path=1.0"),
    ({"class_layers": 0}, "config.model.class_layers=0"),
    ({"channels": 4}, "config.model.channels=4: the images have 3"),
  ],
)
def test_wrong_fields_are_clear_errors(changes, message):
  model = XCiT(**({"variant": "nano12"} | changes))
  with pytest.raises(UserError, match=message):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))


@pytest.mark.parametrize(
  "kwargs,message", [({"keep": jnp.arange(3)}, "keep: XCiT reads all"), ({"attention_layers": (2,)}, "0 to 1")]
)
def test_dropped_patches_and_unknown_layers_are_clear_errors(tiny, kwargs, message):
  model, variables, images = tiny
  with pytest.raises(UserError, match=message):
    model.apply(variables, images, train=False, **kwargs)
