"""The ViT against the official DINO and MSN networks, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models import positions
from big_ssl.models.encoder import Encoder, encode
from big_ssl.models.heads import ProjectionHead
from big_ssl.models.vit import ViT
from big_ssl.weights.heads import projection
from big_ssl.weights.keymap import KeyMap
from big_ssl.weights.vit import official


def import_vit(state, *, heads):
  """Official tensors of the backbone and, where there is one, MSN's head."""
  return KeyMap("ViT", (*official(heads=heads), *projection("fc", "head"))).load(state)


def state_of(z, prefix="state/"):
  return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def close(a, b, tolerance):
  np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=tolerance)


def custom(width, depth, heads, patch, image_size, **kwargs):
  return ViT(
    variant="custom",
    width=width,
    depth=depth,
    heads=heads,
    mlp_dim=4 * width,
    patch=patch,
    image_size=image_size,
    **kwargs,
  )


@pytest.mark.parametrize("tag", ["native", "nonsquare", "samecount_nonsquare", "small", "notmultiple"])
def test_dino_forward_and_gradients(golden, tag):
  z = golden("vit_dino_forward")
  params = import_vit(state_of(z), heads=3).params["backbone"]
  model = custom(48, 5, 3, 8, 32)
  images = nhwc(z[f"{tag}/input"])
  out = model.apply({"params": params}, images, train=False, attention_layers=(4,))
  close(out["cls"], z[f"{tag}/output/cls"], 2e-5)
  close(jnp.concatenate([out["cls"][:, None], out["tokens"]], 1), z[f"{tag}/output/tokens_last_normed"], 2e-5)
  close(out["cls_layers_normed"][:, -4:].reshape(2, -1), z[f"{tag}/output/linear_feat_4cls"], 2e-5)
  mean = jnp.mean(out["tokens"], 1)
  close(jnp.stack([out["cls"], mean], -1).reshape(2, -1), z[f"{tag}/output/linear_feat_1cls_avgpool_interleaved"], 2e-5)
  close(out["attention"][4], z[f"{tag}/output/last_attention"], 2e-5)
  grid = tuple(n // 8 for n in images.shape[1:3])
  used = positions.resample(params["pos_embed"][0, 1:], rule="dino", grid=grid, image=images.shape[1:3])
  close(used, z[f"{tag}/output/pos_embed_used"][0, 1:], 2e-5)

  def weighted(params, images):
    return jnp.sum(model.apply({"params": params}, images, train=False)["cls"] * z[f"{tag}/grad_weight"])

  grads, image_grad = jax.grad(weighted, argnums=(0, 1))(params, images)
  close(jnp.moveaxis(image_grad, -1, 1), z[f"{tag}/grad/input"], 2e-5)
  close(grads["pos_embed"], z[f"{tag}/grad/pos_embed"], 2e-5)


@pytest.mark.parametrize("tag", ["native", "small", "rect"])
def test_dino_tiny_network(golden, monkeypatch, tag):
  z = golden("dino_vit_tiny")
  params = import_vit(state_of(z), heads=3).params["backbone"]
  depth = sum(1 for k in params if k.startswith("block_"))
  model = custom(48, depth, 3, 8, 56)
  images = nhwc(z[f"input/{tag}"])
  embedded, blocks = [], ViT._blocks
  monkeypatch.setattr(ViT, "_blocks", lambda self, x, **kwargs: embedded.append(x) or blocks(self, x, **kwargs))
  out = model.apply({"params": params}, images, train=False, attention_layers=(depth - 1,))
  close(out["cls"], z[f"output/{tag}/cls"], 1e-4)
  close(embedded[0], z[f"output/{tag}/tokens_embedded"], 1e-4)
  grid = tuple(n // 8 for n in images.shape[1:3])
  used = positions.resample(params["pos_embed"][0, 1:], rule="dino", grid=grid, image=images.shape[1:3])
  close(used, z[f"output/{tag}/pos_embed"][0, 1:], 1e-4)
  if tag == "native":
    close(jnp.concatenate([out["cls"][:, None], out["tokens"]], 1), z["output/native/last2_tokens"][1], 1e-4)
    close(out["cls_layers_normed"][:, -2:].reshape(2, -1), z["output/native/linear_feature_n2"], 1e-4)
    mean = jnp.mean(out["tokens"], 1)
    close(jnp.stack([out["cls"], mean], -1).reshape(2, -1), z["output/native/linear_feature_n1_avgpool"], 1e-4)
  close(out["attention"][depth - 1], z[f"output/{tag}/last_attention"], 1e-4)


def msn_encoder(width, depth, heads, image_size, hidden, output):
  model = custom(width, depth, heads, 8, image_size, pos_rule="msn", patch_init="msn")
  return Encoder(backbone=model, head=ProjectionHead(hidden=(hidden, hidden), output=output))


def check_stats(stats, z, prefix, tolerance=1e-4):
  for name in ("bn1", "bn2"):
    close(stats["head"][name]["mean"], z[f"{prefix}fc.{name}.running_mean"], tolerance)
    close(stats["head"][name]["var"], z[f"{prefix}fc.{name}.running_var"], tolerance)


def test_msn_tiny_network_in_eval_and_train_mode(golden):
  z = golden("msn_vit_tiny")
  weights = import_vit(state_of(z), heads=4)
  encoder = msn_encoder(40, 3, 4, 56, 48, 16)
  rand, focal = (nhwc(z[f"input/{n}"]).reshape(-1, s, s, 3) for n, s in (("rand", 56), ("focal", 24)))
  run = lambda images, **kw: encode(encoder, weights.params, weights.batch_stats, images, **kw)
  a, b = run(rand, train=False), run(focal, train=False)
  close(jnp.concatenate([a.out["projection"], b.out["projection"]]), z["output/eval/projected_all_views"], 1e-4)
  close(a.out["cls"], z["output/eval/cls_after_norm"], 1e-4)
  close(a.out["cls_layers"][:, -1], z["output/eval/blocks1_no_final_norm"], 1e-4)
  close(a.out["cls_layers"][:, -2:].reshape(3, -1), z["output/eval/blocks2_no_final_norm"], 1e-4)
  close(a.out["cls_layers_normed"][:, -2:].reshape(3, -1), z["output/eval/n_last_blocks2_with_norm"], 1e-4)
  close(
    jnp.concatenate([a.out["cls"], jnp.mean(a.out["tokens"], 1)], -1),
    z["output/eval/n_last_blocks1_with_norm_avgpool"],
    1e-4,
  )
  focal_table = positions.resample(
    weights.params["backbone"]["pos_embed"][0, 1:], rule="msn", grid=(3, 3), image=(24, 24)
  )
  close(focal_table, z["output/pos_embed_focal"][0, 1:], 1e-4)
  keep = jnp.asarray(z["kept_patch_indices"])
  a = run(rand, train=True, keep=keep)
  b = encode(encoder, weights.params, a.batch_stats, focal, train=True)
  close(jnp.concatenate([a.out["projection"], b.out["projection"]]), z["output/train/projected_all_views"], 1e-4)
  check_stats(b.batch_stats, z, "state_after_train/")


def test_msn_patch_subset_network(golden):
  z = golden("vit_msn_patch_subset")
  weights = import_vit(state_of(z), heads=3)
  encoder = msn_encoder(48, 3, 3, 48, 40, 24)
  rand, focal = nhwc(z["input/rand"]), nhwc(z["input/focal"]).reshape(-1, 24, 24, 3)
  keep = jnp.asarray(z["kept_patch_index"])
  run = lambda images, stats=weights.batch_stats, **kw: encode(encoder, weights.params, stats, images, **kw)
  masked, whole, small = (
    run(rand, train=False, keep=keep),
    run(rand, train=False, attention_layers=(2,)),
    run(focal, train=False),
  )
  close(masked.out["cls"], z["output/eval/h_cls_masked"], 2e-5)
  close(whole.out["cls"], z["output/eval/h_cls_unmasked"], 2e-5)
  close(small.out["cls"][:4], z["output/eval/h_cls_focal0"], 2e-5)
  close(whole.out["cls_layers"][:, -1], z["output/eval/forward_blocks_n1_unmasked_NOT_normed"], 2e-5)
  close(masked.out["cls_layers"][:, -2:].reshape(4, -1), z["output/eval/forward_blocks_n2_masked_NOT_normed"], 2e-5)
  close(whole.out["attention"][2], z["output/eval/last_attention"], 2e-5)
  layers = whole.out["cls_layers_normed"].reshape(4, -1)
  close(
    jnp.concatenate([layers, jnp.mean(whole.out["tokens"], 1)], -1), z["output/eval/last3_normed_plus_patch_avg"], 2e-5
  )
  close(jnp.concatenate([masked.out["projection"], small.out["projection"]]), z["output/eval/z_rand_then_focal"], 2e-5)
  grad = jax.grad(lambda x: jnp.sum(run(x, train=False, keep=keep).out["cls"] * z["grad_weight"]))(rand)
  close(jnp.moveaxis(grad, -1, 1), z["grad/input_rand"], 2e-5)
  a = run(rand, train=True, keep=keep)
  b = run(focal, a.batch_stats, train=True)
  close(jnp.concatenate([a.out["projection"], b.out["projection"]]), z["output/train/z_rand_then_focal"], 2e-5)
  check_stats(b.batch_stats, z, "output/train/new_state/", 2e-5)


@pytest.mark.parametrize("epsilon", ["1e-06", "1e-05", "1e-12"])
def test_the_layer_norm_epsilon_is_that_of_the_release(golden, epsilon):
  z = golden("vit_layernorm_eps_probe")
  params = import_vit(state_of(z), heads=2).params["backbone"]
  model = ViT(
    variant="custom", width=32, depth=1, heads=2, mlp_dim=64, patch=8, image_size=24, layernorm_eps=float(epsilon)
  )
  cls = model.apply({"params": params}, nhwc(z["input"]), train=False)["cls"]
  for other in ("1e-06", "1e-05", "1e-12"):
    assert (np.abs(cls - z[f"output/cls_eps{other}"]).max() < 1e-4) == (other == epsilon)


@pytest.mark.parametrize("tag", ["native", "nonsquare"])
def test_dinov2_with_registers_and_layer_scale(golden, tag):
  z = golden("vit_dinov2_official_reg")
  params = import_vit(state_of(z), heads=2).params["backbone"]
  model = ViT(
    variant="custom",
    width=32,
    depth=3,
    heads=2,
    mlp_dim=96,
    patch=7,
    image_size=28,
    registers=3,
    layer_scale=1.0,
    pos_rule="antialias",
  )
  out = model.apply({"params": params}, nhwc(z[f"{tag}/input"]), train=False)
  for ours, theirs in (("cls", "cls"), ("registers", "reg"), ("tokens", "patch")):
    close(out[ours], z[f"{tag}/output/x_norm_{theirs}token{'' if ours == 'cls' else 's'}"], 2e-5)
  for i in (0, 1):
    close(out["cls_layers_normed"][:, -2 + i], z[f"{tag}/output/last2_{i}_cls"], 2e-5)


@pytest.mark.parametrize(
  "variant,patch,millions",
  [
    ("Ti", 16, 5.524),
    ("S", 16, 21.666),
    ("B", 16, 85.799),
    ("L", 16, 303.302),
    ("H", 14, 630.765),
    ("g", 14, 1011.2),
    ("G", 14, 1842.8),
  ],
)
def test_parameter_counts_are_the_published_ones(variant, patch, millions):
  shapes = jax.eval_shape(
    lambda: ViT(variant=variant, patch=patch).init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False)
  )
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
  assert round(count / 1e6, 3 if millions < 1000 else 1) == millions


@pytest.fixture(scope="module")
def tiny():
  model = custom(24, 3, 2, 8, 32, drop_path=0.2)
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  return model, model.init(jax.random.key(1), images, train=False)["params"], images


def test_the_order_of_kept_patches_does_not_matter_and_keeping_all_is_no_masking(tiny):
  model, params, images = tiny
  run = lambda **kw: model.apply({"params": params}, images, train=False, **kw)["cls"]
  some = jnp.array([1, 5, 7, 12])
  np.testing.assert_allclose(run(keep=some), run(keep=some[::-1]), atol=1e-5)
  np.testing.assert_allclose(run(keep=jnp.arange(16)), run(), atol=1e-6)
  per_image = jnp.stack([some, jnp.array([0, 2, 3, 9])])
  np.testing.assert_allclose(run(keep=per_image)[0], run(keep=some)[0], atol=1e-5)
  assert not np.allclose(run(keep=some), run(), atol=1e-3)


def test_dropped_patches_cost_nothing(tiny):
  model, params, images = tiny

  def flops(keep):
    compiled = (
      jax.jit(lambda p, x: model.apply({"params": p}, x, train=False, keep=keep)["cls"]).lower(params, images).compile()
    )
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

  assert flops(jnp.arange(4)) < 0.5 * flops(None)


@pytest.mark.parametrize(
  "changes", [{"scan": True}, {"remat": "full"}, {"remat": "dots"}, {"scan": True, "remat": "full"}]
)
def test_scan_and_remat_change_neither_outputs_nor_gradients_nor_the_tree(tiny, changes):
  model, params, images = tiny
  other = model.clone(**changes)
  assert jax.tree.structure(other.init(jax.random.key(1), images, train=False)["params"]) == jax.tree.structure(params)

  def loss(m):
    return lambda p: jnp.sum(
      m.apply({"params": p}, images, train=True, rngs={"drop_path": jax.random.key(3)})["cls_layers"] ** 2
    )

  (a, grad_a), (b, grad_b) = (jax.value_and_grad(loss(m))(params) for m in (model, other))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  for x, y in zip(jax.tree.leaves(grad_a), jax.tree.leaves(grad_b), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)


def test_scan_and_remat_keep_registers_layer_scale_and_masks(tiny):
  _, _, images = tiny
  model = custom(24, 3, 2, 8, 32, registers=2, layer_scale=0.1)
  params = model.init(jax.random.key(1), images, train=False)["params"]
  mask = jnp.ones((2, 19, 19), bool).at[:, :, 12:].set(False)
  run = lambda m, **kw: m.apply({"params": params}, images, train=False, **kw)["tokens"]
  np.testing.assert_allclose(run(model, mask=mask), run(model.clone(scan=True, remat="full"), mask=mask), atol=1e-5)
  assert np.abs(run(model, mask=mask) - run(model)).max() > 1e-5


def test_without_a_class_token_the_pooled_feature_is_the_mean_of_the_patches(tiny):
  _, _, images = tiny
  model = custom(24, 2, 2, 8, 32, class_token=False)
  out, variables = model.init_with_output(jax.random.key(1), images, train=False)
  assert out.keys() == {"pooled", "tokens"} and out["tokens"].shape == (2, 16, 24)
  np.testing.assert_allclose(out["pooled"], out["tokens"].mean(1), atol=1e-6)
  assert "cls_token" not in variables["params"] and variables["params"]["pos_embed"].shape == (1, 16, 24)
  scanned = model.clone(scan=True).apply(variables, images, train=False)
  np.testing.assert_allclose(scanned["tokens"], out["tokens"], atol=1e-5)


def test_bfloat16_keeps_parameters_in_float32_and_is_near(tiny):
  model, params, images = tiny
  half = model.clone(dtype="bfloat16")
  assert all(
    x.dtype == jnp.float32 for x in jax.tree.leaves(half.init(jax.random.key(1), images, train=False)["params"])
  )
  a, b = (m.apply({"params": params}, images, train=False)["pooled"] for m in (model, half))
  assert b.dtype == jnp.bfloat16
  np.testing.assert_allclose(a, np.asarray(b, np.float32), atol=0.1)


def test_linear_and_uniform_stochastic_depth_give_their_rates(tiny, monkeypatch):
  _, params, images = tiny
  rates = {}
  for decay in ("linear", "uniform"):
    seen = rates.setdefault(decay, [])
    monkeypatch.setattr(
      "big_ssl.models.vit_blocks.drop_path", lambda x, *, rate, key, seen=seen: seen.append(round(float(rate), 3)) or x
    )
    model = custom(24, 3, 2, 8, 32, drop_path=0.2, drop_path_decay=decay)
    model.apply({"params": params}, images, train=True, rngs={"drop_path": jax.random.key(0)})
  assert rates == {"linear": [0, 0, 0.1, 0.1, 0.2, 0.2], "uniform": [0.2] * 6}


def test_a_model_is_a_hashable_value():
  assert hash(custom(24, 2, 2, 4, 32, stem_channels=(8, 16))) == hash(custom(24, 2, 2, 4, 32, stem_channels=(8, 16)))
  assert custom(24, 2, 2, 8, 32) != custom(24, 2, 2, 8, 32, registers=1)


def test_the_initial_values_are_those_of_the_releases():
  images = jnp.zeros((1, 32, 32, 3))
  for patch_init, spread in (("dino", 192**-0.5 / 3**0.5), ("msn", (2 / 192) ** 0.5)):
    params = custom(96, 1, 2, 8, 32, patch_init=patch_init).init(jax.random.key(0), images, train=False)["params"]
    conv = params["patch_embed"]["conv"]
    np.testing.assert_allclose(np.std(conv["kernel"]), spread, rtol=0.03)
    assert np.any(conv["bias"]) == (patch_init == "dino")
    for kernel in (params["block_0"]["mlp"]["fc1"]["kernel"], params["block_0"]["attention"]["query"]["kernel"]):
      np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.03)
    np.testing.assert_allclose(np.std(params["pos_embed"]), 0.02, rtol=0.06)


def test_stochastic_depth_acts_in_training_only(tiny):
  model, params, images = tiny
  run = lambda key, train: model.apply(
    {"params": params}, images, train=train, rngs={"drop_path": jax.random.key(key)}
  )["cls"]
  assert any(not np.allclose(run(0, True), run(k, True)) for k in range(1, 6))
  np.testing.assert_array_equal(run(0, False), run(1, False))


def test_the_convolutional_stem_has_its_own_batch_statistics():
  model = ViT(variant="custom", width=24, depth=1, heads=2, mlp_dim=48, patch=4, image_size=16, stem_channels=(8, 16))
  images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
  variables = model.init(jax.random.key(1), images, train=False)
  out, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
  assert out["tokens"].shape == (3, 16, 24) and np.any(updated["batch_stats"]["patch_embed"]["bn_0"]["mean"])


@pytest.mark.parametrize(
  "model,shape,message",
  [
    (ViT(variant="Q"), (1, 32, 32, 3), "config.model.variant='Q'"),
    (custom(24, 1, 2, 16, 32), (1, 8, 8, 3), "smaller than one patch"),
    (custom(24, 1, 2, 8, 32), (1, 32, 32, 4), "channels"),
    (custom(25, 1, 2, 8, 32), (1, 32, 32, 3), "must divide the width 25"),
    (custom(24, 1, 2, 7, 32), (1, 32, 32, 3), "does not divide config.model.image_size=32"),
    (custom(24, 1, 2, 4, 32, stem_channels=(8, 16)), (1, 3, 32, 3), "smaller than one patch"),
    (custom(24, 1, 2, 8, 32, drop_path=1.0), (1, 32, 32, 3), "config.model.drop_path=1.0"),
    (custom(24, 1, 2, 8, 32, pos_rule="hff"), (1, 32, 32, 3), "Did you mean 'hf'"),
  ],
)
def test_wrong_sizes_are_clear_errors(model, shape, message):
  with pytest.raises(UserError, match=message):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))


@pytest.mark.parametrize(
  "kwargs,message",
  [
    ({"keep": jnp.zeros((0,), int)}, "keep: 0 of 16 patches"),
    ({"keep": jnp.arange(17)}, "keep: 17 of 16 patches"),
    ({"keep": jnp.zeros((3, 4), int)}, r"integers \[K\] or \[2, K\], found int32 \[3, 4\]"),
    ({"keep": jnp.ones(16)}, "expected integers"),
    ({"attention_layers": (3,)}, "the blocks are 0 to 2"),
    ({"attention_layers": (-1,)}, "the blocks are 0 to 2"),
  ],
)
def test_wrong_selections_are_clear_errors(tiny, kwargs, message):
  model, params, images = tiny
  with pytest.raises(UserError, match=message):
    model.apply({"params": params}, images, train=False, **kwargs)


@pytest.mark.parametrize("keep", [jnp.array([1, 99]), jnp.array([[1, 2], [1, 99]])])
def test_a_patch_that_does_not_exist_is_not_a_number_instead_of_a_neighbor(tiny, keep):
  model, params, images = tiny
  assert np.isnan(model.apply({"params": params}, images, train=False, keep=keep)["cls"]).any()
