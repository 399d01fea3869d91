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
from big_ssl.weights.vit import export_vit, import_vit


def state_of(z, prefix="state/"):
  return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def close(a, b, tolerance):
  np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=tolerance)


def custom(width, depth, heads, patch, image_size, **kwargs):
  return ViT(variant="custom", width=width, depth=depth, heads=heads, mlp_dim=4 * width, patch=patch, image_size=image_size, **kwargs)


RULES = {
  "dino": ("dino", "dinov2_offset0.1_noaa"),
  "hf": ("hf_size_noaa",),
  "antialias": ("dinov2reg_size_antialias", "timm_bicubic_antialias"),
  "linear": ("flexivit_runtime_linear", "loca_runtime_bilinear"),
  "msn": ("msn",),
}


def test_position_tables_resample_by_every_public_rule(golden):
  z = golden("vit_pos_embed_interpolation")
  table, seen = z["pos_embed_with_cls"][0], 0
  for rule, names in RULES.items():
    for name in names:
      for key in (k for k in z if k.endswith(f"/{name}")):
        grid = tuple(int(n) for n in key.split("/")[0].split("x"))
        out = positions.resample(table[1:].astype(np.float64), rule=rule, grid=grid, image=(grid[0] * 16, grid[1] * 16))
        wanted = z[key][0][1:] if z[key].shape[1] == grid[0] * grid[1] + 1 else z[key][0]
        np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=0, err_msg=key)
        seen += 1
  assert seen >= 40


def test_a_table_that_is_no_square_needs_its_grid():
  with pytest.raises(UserError, match="12 patches"):
    positions.table_grid(12)
  with pytest.raises(UserError, match="12 patches: does not fit the grid 5x3"):
    positions.table_grid(12, (5, 3))
  assert positions.table_grid(12, (3, 4)) == (3, 4)


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

  def weighted(params, images):
    return jnp.sum(model.apply({"params": params}, images, train=False)["cls"] * z[f"{tag}/grad_weight"])

  grads, image_grad = jax.grad(weighted, argnums=(0, 1))(params, images)
  close(jnp.moveaxis(image_grad, -1, 1), z[f"{tag}/grad/input"], 2e-5)
  close(grads["pos_embed"], z[f"{tag}/grad/pos_embed"], 2e-5)


@pytest.mark.parametrize("tag", ["native", "small", "rect"])
def test_dino_tiny_network(golden, tag):
  z = golden("dino_vit_tiny")
  params = import_vit(state_of(z), heads=3).params["backbone"]
  depth = sum(1 for k in params if k.startswith("block_"))
  model = custom(48, depth, 3, 8, 56)
  out = model.apply({"params": params}, nhwc(z[f"input/{tag}"]), train=False, attention_layers=(depth - 1,))
  close(out["cls"], z[f"output/{tag}/cls"], 1e-4)
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
  run = lambda images, **kw: encode(encoder, weights.params, weights.batch_stats, images, **kw)  # noqa: E731
  a, b = run(rand, train=False), run(focal, train=False)
  close(jnp.concatenate([a.out["projection"], b.out["projection"]]), z["output/eval/projected_all_views"], 1e-4)
  close(a.out["cls"], z["output/eval/cls_after_norm"], 1e-4)
  close(a.out["cls_layers"][:, -1], z["output/eval/blocks1_no_final_norm"], 1e-4)
  close(a.out["cls_layers"][:, -2:].reshape(3, -1), z["output/eval/blocks2_no_final_norm"], 1e-4)
  close(a.out["cls_layers_normed"][:, -2:].reshape(3, -1), z["output/eval/n_last_blocks2_with_norm"], 1e-4)
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
  run = lambda images, stats=weights.batch_stats, **kw: encode(encoder, weights.params, stats, images, **kw)  # noqa: E731
  masked, whole, small = run(rand, train=False, keep=keep), run(rand, train=False, attention_layers=(2,)), run(focal, train=False)
  close(masked.out["cls"], z["output/eval/h_cls_masked"], 2e-5)
  close(whole.out["cls"], z["output/eval/h_cls_unmasked"], 2e-5)
  close(small.out["cls"][:4], z["output/eval/h_cls_focal0"], 2e-5)
  close(whole.out["cls_layers"][:, -1], z["output/eval/forward_blocks_n1_unmasked_NOT_normed"], 2e-5)
  close(masked.out["cls_layers"][:, -2:].reshape(4, -1), z["output/eval/forward_blocks_n2_masked_NOT_normed"], 2e-5)
  close(whole.out["attention"][2], z["output/eval/last_attention"], 2e-5)
  close(jnp.concatenate([masked.out["projection"], small.out["projection"]]), z["output/eval/z_rand_then_focal"], 2e-5)
  grad = jax.grad(lambda x: jnp.sum(run(x, train=False, keep=keep).out["cls"] * z["grad_weight"]))(rand)
  close(jnp.moveaxis(grad, -1, 1), z["grad/input_rand"], 2e-5)
  a = run(rand, train=True, keep=keep)
  b = run(focal, a.batch_stats, train=True)
  close(jnp.concatenate([a.out["projection"], b.out["projection"]]), z["output/train/z_rand_then_focal"], 2e-5)
  check_stats(b.batch_stats, z, "output/train/new_state/", 2e-5)


def test_weights_round_trip_bit_for_bit(golden):
  state = {k: v for k, v in state_of(golden("msn_vit_tiny")).items() if "num_batches" not in k}
  again = export_vit(import_vit(state, heads=4))
  assert again.keys() == state.keys()
  assert all(np.array_equal(again[k], state[k]) for k in state)


def test_an_unknown_tensor_is_named(golden):
  with pytest.raises(UserError, match="blocks.0.attn.q_norm.weight"):
    import_vit(state_of(golden("dino_vit_tiny")) | {"blocks.0.attn.q_norm.weight": np.zeros(3)}, heads=3)


@pytest.mark.parametrize("variant,patch,millions", [("Ti", 16, 5.524), ("S", 16, 21.666), ("B", 16, 85.799), ("L", 16, 303.302), ("H", 14, 630.765)])
def test_parameter_counts_are_the_published_ones(variant, patch, millions):
  shapes = jax.eval_shape(lambda: ViT(variant=variant, patch=patch).init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False))
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
  assert round(count / 1e6, 3) == millions


@pytest.fixture(scope="module")
def tiny():
  model = custom(24, 3, 2, 8, 32, drop_path=0.2)
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  return model, model.init(jax.random.key(1), images, train=False)["params"], images


def test_the_order_of_kept_patches_does_not_matter_and_keeping_all_is_no_masking(tiny):
  model, params, images = tiny
  run = lambda **kw: model.apply({"params": params}, images, train=False, **kw)["cls"]  # noqa: E731
  some = jnp.array([1, 5, 7, 12])
  np.testing.assert_allclose(run(keep=some), run(keep=some[::-1]), atol=1e-5)
  np.testing.assert_allclose(run(keep=jnp.arange(16)), run(), atol=1e-6)
  per_image = jnp.stack([some, jnp.array([0, 2, 3, 9])])
  np.testing.assert_allclose(run(keep=per_image)[0], run(keep=some)[0], atol=1e-5)
  assert not np.allclose(run(keep=some), run(), atol=1e-3)


def test_dropped_patches_cost_nothing(tiny):
  model, params, images = tiny

  def flops(keep):
    compiled = jax.jit(lambda p, x: model.apply({"params": p}, x, train=False, keep=keep)["cls"]).lower(params, images).compile()
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

  assert flops(jnp.arange(4)) < 0.5 * flops(None)


@pytest.mark.parametrize("changes", [{"scan": True}, {"remat": "full"}, {"remat": "dots"}, {"scan": True, "remat": "full"}])
def test_scan_and_remat_change_neither_outputs_nor_gradients_nor_the_tree(tiny, changes):
  model, params, images = tiny
  other = model.clone(**changes)
  assert jax.tree.structure(other.init(jax.random.key(1), images, train=False)["params"]) == jax.tree.structure(params)

  def loss(m):
    return lambda p: jnp.sum(m.apply({"params": p}, images, train=True, rngs={"drop_path": jax.random.key(3)})["cls_layers"] ** 2)

  (a, grad_a), (b, grad_b) = (jax.value_and_grad(loss(m))(params) for m in (model, other))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  for x, y in zip(jax.tree.leaves(grad_a), jax.tree.leaves(grad_b), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)


def test_stochastic_depth_acts_in_training_only(tiny):
  model, params, images = tiny
  run = lambda key, train: model.apply({"params": params}, images, train=train, rngs={"drop_path": jax.random.key(key)})["cls"]  # noqa: E731
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
  ],
)
def test_wrong_sizes_are_clear_errors(model, shape, message):
  with pytest.raises(UserError, match=message):
    jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))
