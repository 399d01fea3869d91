"""Heads for segmentation against the public codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.losses.classify import cross_entropy
from big_ssl.models.segmentation_heads import LinearDecoder, MaskDecoder, ProbeHead, SegmentationNetwork
from big_ssl.models.vit import ViT
from big_ssl.ops.segmentation import bilinear, to_classes


def state(g):
  return {k.removeprefix("state/"): jnp.asarray(v) for k, v in g.items() if k.startswith("state/")}


def test_the_linear_probe_is_the_public_one_with_loss_gradients_and_statistics(golden):
  g = golden("segmentation_eval_linear_probe")
  s = state(g)
  x, labels = jnp.moveaxis(g["features_nchw"], 1, -1), to_classes(g["labels"], ignore=255)
  params = {
    "bn": {"scale": s["batchnorm_layer.weight"], "bias": s["batchnorm_layer.bias"]},
    "fc": {"kernel": s["conv.weight"][:, :, 0, 0].T, "bias": s["conv.bias"]},
  }
  stats = {"bn": {"mean": s["batchnorm_layer.running_mean"], "var": s["batchnorm_layer.running_var"]}}
  head = ProbeHead(classes=6, dropout=0.0)
  logits = head.apply({"params": params, "batch_stats": stats}, x, train=False)
  full = bilinear(logits, shape=labels.shape[1:])
  np.testing.assert_allclose(jnp.moveaxis(full, -1, 1), g["eval_logits"], atol=1e-5, rtol=1e-4)

  def loss(params):
    logits, new = head.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
    full = bilinear(logits, shape=labels.shape[1:])
    return cross_entropy(full.reshape(-1, 6), labels=labels.ravel()), new["batch_stats"]["bn"]

  (value, new), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(value, g["train_loss"], rtol=1e-5)
  np.testing.assert_allclose(grads["fc"]["kernel"].T[:, :, None, None], g["grad_conv_weight"], atol=1e-5)
  np.testing.assert_allclose(grads["fc"]["bias"], g["grad_conv_bias"], atol=1e-5)
  np.testing.assert_allclose(grads["bn"]["scale"], g["grad_bn_weight"], atol=1e-5)
  np.testing.assert_allclose(grads["bn"]["bias"], g["grad_bn_bias"], atol=1e-5)
  np.testing.assert_allclose(new["mean"], g["new_running_mean"], atol=1e-6)
  np.testing.assert_allclose(new["var"], g["new_running_var"], rtol=1e-5)


def decoder_params(s, *, heads):
  """The public mask transformer's tensors under our names."""
  norm = lambda name: {"norm": {"scale": s[f"{name}.weight"], "bias": s[f"{name}.bias"]}}
  dense = lambda name: {"kernel": s[f"{name}.weight"].T, "bias": s[f"{name}.bias"]}
  tree = {k: s[k] for k in ("cls_emb", "proj_patch", "proj_classes")}
  tree |= {"proj_dec": dense("proj_dec"), "decoder_norm": norm("decoder_norm"), "mask_norm": norm("mask_norm")}
  width = s["proj_patch"].shape[0]
  for i in range(sum(k.endswith("norm1.weight") for k in s)):
    name = f"blocks.{i}"
    qkv, bias = (
      s[f"{name}.attn.qkv.weight"].T.reshape(width, 3, heads, -1),
      s[f"{name}.attn.qkv.bias"].reshape(3, heads, -1),
    )
    attention = {key: {"kernel": qkv[:, j], "bias": bias[j]} for j, key in enumerate(("query", "key", "value"))}
    out = s[f"{name}.attn.proj.weight"].T.reshape(heads, -1, width)
    attention["out"] = {"kernel": out, "bias": s[f"{name}.attn.proj.bias"]}
    mlp = {key: dense(f"{name}.mlp.{key}") for key in ("fc1", "fc2")}
    tree[f"block_{i}"] = {"attention": attention, "norm1": norm(f"{name}.norm1"), "norm2": norm(f"{name}.norm2")} | mlp
  return tree


def test_the_mask_decoder_is_the_public_one_with_its_gradient(golden):
  g = golden("segmentation_eval_mask_decoder")
  head, params = MaskDecoder(classes=5, heads=2), decoder_params(state(g), heads=2)
  x = jnp.asarray(g["input"]).reshape(2, 3, 4, 32)
  made = jax.eval_shape(functools.partial(head.init, train=False), jax.random.key(0), x)["params"]
  assert jax.tree.structure(made) == jax.tree.structure(params)

  def run(x):
    logits = head.apply({"params": params}, x, train=False)
    full = jnp.moveaxis(bilinear(logits, shape=(12, 16)), -1, 1)
    return jnp.sum(full * g["upstream_grad"]), (logits, full)

  (_, (logits, full)), grad = jax.jit(jax.value_and_grad(run, has_aux=True))(x)
  np.testing.assert_allclose(jnp.moveaxis(logits, -1, 1), g["output/masks"], atol=1e-4)
  np.testing.assert_allclose(full, g["output/logits_full_resolution"], atol=1e-4)
  np.testing.assert_allclose(grad.reshape(2, 12, 32), g["grad_input"], atol=1e-4)


def test_dropout_of_the_probe_drops_channels_of_an_image_as_a_whole():
  x = jnp.ones((4, 3, 5, 64)) + jax.random.normal(jax.random.key(2), (64,))
  _, seen = ProbeHead(2, dropout=0.5).init_with_output(jax.random.key(0), x, train=False)
  _, out = ProbeHead(2, dropout=0.5).apply(
    seen,
    x,
    train=True,
    rngs={"dropout": jax.random.key(1)},
    mutable=["batch_stats", "intermediates"],
    capture_intermediates=True,
  )
  dropped = np.asarray(out["intermediates"]["Dropout_0"]["__call__"][0]) == 0
  assert 0.3 < dropped.mean() < 0.7
  np.testing.assert_array_equal(dropped.all((1, 2)), dropped.any((1, 2)))


@pytest.mark.parametrize(
  "head", [LinearDecoder(3), MaskDecoder(3, layers=1), ProbeHead(3)], ids=["linear", "mask", "probe"]
)
def test_logits_have_the_size_of_images_that_patches_do_not_divide(head):
  vit = ViT(variant="custom", width=8, depth=1, heads=2, mlp_dim=16, patch=4, image_size=8)
  images = jnp.zeros((2, 7, 10, 3))
  out, _ = jax.eval_shape(
    functools.partial(SegmentationNetwork(vit, head).init_with_output, train=False), jax.random.key(1), images
  )
  assert (
    out["logits"].shape == (2, 7, 10, 3) and out["map"].shape == (2, 2, 3, 8) and out["logit_map"].shape == (2, 2, 3, 3)
  )


def test_a_frozen_backbone_runs_as_in_evaluation():
  vit = ViT(variant="custom", width=8, depth=2, heads=2, mlp_dim=16, patch=4, image_size=8, drop_path=0.9)
  images = jax.random.uniform(jax.random.key(0), (8, 8, 8, 3))

  @functools.partial(jax.jit, static_argnames=("frozen",))
  def both(key, *, frozen):
    network = SegmentationNetwork(vit, LinearDecoder(2), frozen=frozen)
    out, variables = network.init_with_output(key, images, train=False)
    return out["map"], network.apply(variables, images, train=True, rngs={"drop_path": key})["map"]

  assert np.array_equal(*both(jax.random.key(1), frozen=True)) and not np.allclose(
    *both(jax.random.key(1), frozen=False)
  )
