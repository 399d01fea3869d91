"""NaViT against three public codes, and: an image packed or alone has the same features."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import patches as cutting
from big_ssl.augment.patches import Sequences
from big_ssl.core.packing import first_fit, layout
from big_ssl.core.types import UserError
from big_ssl.models import navit
from big_ssl.models.navit import NaViT
from big_ssl.weights import navit as keys
from big_ssl.weights.names import flatten

TINY = dict(variant="custom", width=16, depth=2, heads=2, mlp_dim=24, patch=4, image_size=32)


def state_of(z):
  return {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}


def one_grid_each(z, valid, y, x):
  """Padded sequences of one image each, as NaFlex has them."""
  as_int = lambda a: jnp.asarray(a, jnp.int32)
  return Sequences(
    patches=jnp.asarray(z["input/patches"]),
    segment=jnp.where(jnp.asarray(valid), 0, -1).astype(jnp.int32),
    y=as_int(y),
    x=as_int(x),
    grid=as_int(z["grids"])[:, None],
  )


def pack(images, *, patch, rows, capacity, slots, kept=None):
  """Images [H, W, C] of any size in sequences; also returns the layout."""
  grids = np.array([[i.shape[0] // patch, i.shape[1] // patch] for i in images])
  lengths = grids.prod(axis=1) if kept is None else [len(k) for k in kept]
  placed = first_fit(lengths, capacity=capacity, rows=rows, max_images=slots)
  made = layout(placed, grids, rows=rows, capacity=capacity, slots=slots, kept=kept)
  flat = [cutting.patchify(i, patch).reshape(-1, patch**2 * i.shape[-1]) for i in images]
  starts = np.cumsum([0, *(len(f) for f in flat)])[:-1]
  index = starts[np.maximum(made.image, 0)] + made.y * grids[np.maximum(made.image, 0), 1] + made.x
  patches = jnp.where((made.image >= 0)[..., None], jnp.concatenate(flat)[index], 0)
  return Sequences(patches, *(jnp.asarray(a) for a in (made.segment, made.y, made.x, made.grid))), made


def round_trip(keymap, z):
  state = state_of(z)
  weights = keymap.load(state)
  back = keymap.dump(weights)
  assert set(back) == set(state)
  for name, value in state.items():
    np.testing.assert_array_equal(back[name], value, err_msg=name)
  return jax.tree.map(jnp.asarray, weights.params)


# 1. Public codes


def exact_attention(q, k, v, *, mask):
  logits = jnp.einsum("btnd,bsnd->bnts", q, k) / q.shape[-1] ** 0.5
  shares = jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -1e300), axis=-1)
  return jnp.einsum("bnts,bsnd->btnd", shares, v)


def vit_pytorch_model(dtype):
  return NaViT(
    **(TINY | dict(width=32, mlp_dim=64, patch=8, image_size=64)),
    qk_norm="l2",
    patch_norm=True,
    pos_coordinates="absolute",
    pool_norm=True,
    layernorm_eps=1e-5,
    dtype=dtype,
  )


@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-9), ("float32", 1e-4)])
def test_packed_sequences_of_vit_pytorch(golden, monkeypatch, dtype, tolerance):
  z = golden("navit_packing")
  if dtype == "float64":  # the library's attention computes in float32 whatever it is given
    monkeypatch.setattr(navit, "attention", exact_attention)
  params = round_trip(keys.vit_pytorch(heads=2, patch=8), z)
  names = ["seq0_img0", "seq0_img1", "seq0_img2", "seq1_img0", "seq1_img1"]
  where = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
  with jax.enable_x64(dtype == "float64"):
    images = [jnp.asarray(np.moveaxis(z[f"input/{n}"], 0, -1), dtype) for n in names]
    model, kernel = vit_pytorch_model(dtype), params["head"]["fc"]["kernel"]

    @jax.jit
    def run(images):
      sequences, made = pack(images, patch=8, rows=2, capacity=19, slots=3)
      np.testing.assert_array_equal(made.segment, z["segment_ids_pad_minus1"])
      out = model.apply({"params": params["backbone"]}, sequences, train=False)
      return jnp.stack([out["pooled"][w] for w in where]) @ kernel, out["tokens"]

    logits, tokens = run(images)
    valid = z["segment_ids_pad_minus1"] >= 0
    np.testing.assert_allclose(logits, z["f64/output/logits_packed"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(tokens[valid], z["f64/output/tokens_packed"][valid], rtol=0, atol=tolerance)
    single = jax.jit(lambda image: model.apply({"params": params["backbone"]}, image[None], train=False))
    for name, image, wanted in zip(names, images, z["f64/output/logits_alone"], strict=True):
      alone = single(image)
      np.testing.assert_allclose(alone["tokens"][0], z[f"f64/output/tokens_alone_{name}"], rtol=0, atol=tolerance)
      np.testing.assert_allclose(alone["pooled"][0] @ kernel, wanted, rtol=0, atol=tolerance)
    grads = jax.jit(jax.grad(lambda images: jnp.sum(run(images)[0] * z["grad_weight"])))(images)
    for name, grad in zip(names, grads, strict=True):
      np.testing.assert_allclose(np.moveaxis(grad, -1, 0), z[f"grad/input_{name}"], rtol=0, atol=max(tolerance, 1e-6), err_msg=name)


def test_factorized_positions_of_timm(golden):
  z = golden("navit_factorised_timm")
  params = round_trip(keys.timm_factorized(heads=4), z)
  model = NaViT(
    **(TINY | dict(width=32, heads=4, mlp_dim=64, patch=4, image_size=20)), qk_norm="none", attention_bias=True, norm_bias=True, pool="mean"
  )
  valid = z["input/valid"]
  sequences = one_grid_each(z, valid, *np.moveaxis(z["input/coord_row_col"], -1, 0))
  out = forward(model, params["backbone"], sequences)
  np.testing.assert_allclose(out["tokens"][valid], z["output/features_valid_only"][valid], rtol=0, atol=2e-5)
  logits = out["pooled"][:, 0] @ params["head"]["fc"]["kernel"] + params["head"]["fc"]["bias"]
  np.testing.assert_allclose(logits, z["output/logits"], rtol=0, atol=2e-5)
  np.testing.assert_allclose(out["embedded"][valid], z["output/embeds_valid_only"][valid], rtol=0, atol=2e-5)


def test_naflex_of_big_vision(golden):
  z = golden("navit_naflex_bigvision")
  params = round_trip(keys.big_vision_naflex(), z)
  model = NaViT(
    **(TINY | dict(width=32, heads=4, mlp_dim=64, patch=4, image_size=16)),
    qk_norm="none",
    attention_bias=True,
    norm_bias=True,
    pool="mean",
    gelu="tanh",
    pos_kind="table",
  )
  valid = z["input/patch_type_1_is_patch"] == 1
  sequences = one_grid_each(z, valid, z["input/row"], z["input/col"])
  out = forward(model, params["backbone"], sequences)
  np.testing.assert_allclose(out["pooled"][:, 0], z["output/head_input"], rtol=0, atol=2e-5)
  np.testing.assert_allclose(out["tokens"][valid], z["output/encoded_valid_only"][valid], rtol=0, atol=2e-5)
  logits = out["pooled"][:, 0] @ params["head"]["fc"]["kernel"] + params["head"]["fc"]["bias"]
  np.testing.assert_allclose(logits, z["output/logits"], rtol=0, atol=2e-5)
  np.testing.assert_allclose(out["embedded"][valid], z["output/with_posemb"][valid], rtol=0, atol=2e-5)


def forward(model, params, sequences):
  """Its outputs, and what the first block reads as "embedded"."""

  @jax.jit
  def run(params):
    seen = []

    def catch(next_fun, args, kwargs, context):
      if context.module.name == "block_0" and context.method_name == "__call__":
        seen.append(args[0])
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(catch):
      out = model.apply({"params": params}, sequences, train=False)
    return out | {"embedded": seen[0]}

  return run(params)


# 2. Packed or alone


def some_images(seed=0, sides=((8, 16), (12, 12), (20, 4), (16, 16), (4, 4), (12, 8))):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(h, w, 3)), jnp.float32) for h, w in sides]


@functools.cache
def initialized(model):
  init = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), init["params"])


def apply(model):
  return jax.jit(lambda images, **kwargs: model.apply({"params": initialized(model)}, images, train=False, **kwargs))


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"qk_norm": "l2", "pool": "mean", "pos_coordinates": "absolute"},
    {"qk_norm": "none", "pool": "max", "pos_kind": "fourier", "pos_combine": "product"},
    {"pos_kind": "sincos", "pos_combine": "stack", "pos_coordinates": "fractional_aspect", "pool_norm": True},
    {"pos_kind": "table", "patch_norm": True, "attention_bias": True, "norm_bias": True, "remat": "full"},
  ],
)
def test_an_image_packed_or_alone_has_the_same_features(options):
  model, images = NaViT(**TINY, **options), some_images()
  run = apply(model)
  sequences, made = pack(images, patch=4, rows=3, capacity=24, slots=4)
  out = run(sequences)
  assert made.padding > 0
  for i, image in enumerate(images[:3]):
    alone = run(image[None])
    np.testing.assert_allclose(out["pooled"][made.row[i], made.slot[i]], alone["pooled"][0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(out["tokens"][made.image == i], alone["tokens"][0], rtol=0, atol=1e-5)
  empty = np.ones(out["pooled"].shape[:2], bool)
  empty[made.row, made.slot] = False
  assert empty.any() and not np.any(out["pooled"][empty])


def test_kept_tokens_packed_or_alone_have_the_same_features():
  model, images = NaViT(**TINY), some_images()
  run = apply(model)
  kept = [np.sort(np.random.default_rng(i).permutation(h * w)[: max(1, h * w // 2)]) for i, (h, w) in enumerate((i.shape[0] // 4, i.shape[1] // 4) for i in images)]
  sequences, made = pack(images, patch=4, rows=2, capacity=24, slots=6, kept=kept)
  out = run(sequences)
  for i, image in enumerate(images[:2]):
    alone = run(image[None], keep=jnp.asarray(kept[i], jnp.int32))
    np.testing.assert_allclose(out["pooled"][made.row[i], made.slot[i]], alone["pooled"][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["map", "mean", "max"])
def test_images_of_a_sequence_do_not_see_each_other(pool):
  model, images = NaViT(**TINY, pool=pool), some_images()
  params = initialized(model)

  def pooled(images):
    sequences, made = pack(images, patch=4, rows=3, capacity=24, slots=4)
    return model.apply({"params": params}, sequences, train=False)["pooled"][made.row, made.slot]

  pooled = jax.jit(pooled)
  before = pooled(images)
  after = pooled([images[0] + 100, *images[1:]])
  np.testing.assert_array_equal(after[1:], before[1:])
  assert np.abs(after[0] - before[0]).max() > 1e-3
  grads = jax.jit(jax.grad(lambda images: jnp.sum(jnp.square(pooled(images)[1]))))(images)
  assert all(not np.any(g) for i, g in enumerate(grads) if i != 1) and np.any(grads[1])


def test_the_place_in_a_sequence_and_more_padding_change_nothing():
  model, images = NaViT(**TINY), some_images()
  run = apply(model)
  order = [3, 0, 5, 1, 4, 2]
  outs = []
  for some, size in ((images, (3, 24, 4)), ([images[i] for i in order], (4, 40, 5))):
    sequences, made = pack(some, patch=4, rows=size[0], capacity=size[1], slots=size[2])
    outs.append(run(sequences)["pooled"][made.row, made.slot])
  np.testing.assert_allclose(outs[1], outs[0][jnp.array(order)], rtol=0, atol=1e-5)


def test_a_sequence_of_padding_alone_is_finite_with_gradients():
  model = NaViT(**TINY)
  params = initialized(model)
  empty = Sequences(
    patches=jnp.zeros((2, 8, 48)), segment=jnp.full((2, 8), -1), y=jnp.zeros((2, 8), jnp.int32), x=jnp.zeros((2, 8), jnp.int32), grid=jnp.ones((2, 3, 2), jnp.int32)
  )
  loss = lambda p: jnp.sum(model.apply({"params": p}, empty, train=False)["pooled"] ** 2)
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert value == 0 and all(not np.any(g) for g in jax.tree.leaves(grads))


def test_drop_path_is_drawn_per_image():
  model, images = NaViT(**TINY, drop_path=0.5), some_images(sides=((8, 8),)) * 12
  params = initialized(model)
  sequences, made = pack(images, patch=4, rows=4, capacity=12, slots=3)
  run = jax.jit(lambda key: model.apply({"params": params}, sequences, train=True, rngs={"drop_path": key})["pooled"])
  drawn = run(jax.random.key(1))  # equal images in four sequences; the first block drops nothing, the second two branches
  np.testing.assert_array_equal(drawn, run(jax.random.key(1)))
  outcomes = {tuple(np.round(row, 4)) for row in np.asarray(drawn).reshape(12, -1)}
  assert 2 <= len(outcomes) <= 4
  assert any(np.abs(row - row[:1]).max() > 1e-3 for row in np.asarray(drawn)), "images of a sequence share a draw"


def test_bfloat16_is_close():
  images = some_images()
  params = initialized(NaViT(**TINY))
  sequences, made = pack(images, patch=4, rows=3, capacity=24, slots=4)
  run = lambda dtype: jax.jit(lambda p: NaViT(**TINY, dtype=dtype).apply({"params": p}, sequences, train=False))(params)["pooled"]
  outs = [run(dtype)[made.row, made.slot] for dtype in ("float32", "bfloat16")]
  assert np.abs(outs[1] - outs[0]).max() < 0.15 * np.abs(outs[0]).max()


def test_attention_of_a_layer_stays_inside_the_images():
  model, images = NaViT(**TINY), some_images()
  sequences, made = pack(images, patch=4, rows=3, capacity=24, slots=4)
  run = jax.jit(lambda p: model.apply({"params": p}, sequences, train=False, attention_layers=(1,)))
  weights = run(initialized(model))["attention"][1]
  same = made.segment[:, :, None] == made.segment[:, None, :]
  assert weights.shape == (3, 2, 24, 24) and not np.any(np.where(same[:, None], 0, weights))
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


# 3. Mistakes


@pytest.mark.parametrize(
  "fields,message",
  [
    ({"qk_norm": "layernrm"}, "Did you mean 'layernorm'"),
    ({"pool": "cls"}, "config.model.pool='cls'"),
    ({"pos_kind": "learnt"}, "Did you mean 'learned'"),
    ({"pos_coordinates": "relative"}, "config.model.pos_coordinates='relative'"),
    ({"heads": 3}, "config.model.heads=3"),
    ({"variant": "X"}, "config.model.variant='X'"),
    ({"pos_coordinates": "absolute", "image_size": 8}, "positions of 2x2 patches; the images have 4x4"),
    ({"channels": 4}, "config.model.channels=4"),
    ({"patch": 17}, "patch=17"),
  ],
)
def test_a_mistake_names_its_field(fields, message):
  with pytest.raises(UserError, match=message):
    NaViT(**(TINY | fields)).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)


@pytest.mark.parametrize(
  "change,message",
  [
    (dict(segment=jnp.zeros((1, 3), jnp.int32)), "packed sequences: segment"),
    (dict(y=jnp.zeros((1, 4))), "packed sequences: y is float32"),
    (dict(grid=jnp.ones((1, 2), jnp.int32)), "packed sequences: grid"),
    (dict(patches=jnp.zeros((1, 4, 12))), "patches of 48 values; the packed sequences hold 12"),
  ],
)
def test_sequences_that_do_not_fit_are_refused(change, message):
  zeros = jnp.zeros((1, 4), jnp.int32)
  good = Sequences(jnp.zeros((1, 4, 48)), zeros, zeros, zeros, jnp.ones((1, 2, 2), jnp.int32))
  with pytest.raises(UserError, match=message):
    NaViT(**TINY).init(jax.random.key(0), good.replace(**change), train=False)


def test_the_tree_has_the_declared_parameters():
  names = set(flatten(initialized(NaViT(**TINY)), ""))
  assert "block_0/attention/query/bias" not in names and "block_0/norm1/bias" not in names
  assert {"block_0/attention/query_norm/norm/scale", "block_1/mlp/fc1/bias", "positions/y", "probe", "pool/out/kernel"} <= names
