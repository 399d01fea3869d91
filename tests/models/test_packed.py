"""All crops of a few images in common sequences: the plan, and the same results as batches per crop size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import UserError
from big_ssl.methods.dino import DINO
from big_ssl.methods.msn import MSN
from big_ssl.models.encoder import Encoder, encode_crops
from big_ssl.models.heads import DINOHead
from big_ssl.models.packed import plan_crops
from big_ssl.models.resnet import ResNet
from big_ssl.models.vit import ViT

MODEL = ViT(variant="custom", width=24, depth=2, heads=2, mlp_dim=32, patch=8, image_size=32)


def test_every_token_of_a_set_has_one_place():
  plan = plan_crops(((2, 197), (8, 37)), images=5)
  assert plan.token.shape == (18, 197)
  tokens = plan.token[plan.token >= 0]
  np.testing.assert_array_equal(np.sort(tokens), np.arange(5 * (2 * 197 + 8 * 37)))
  np.testing.assert_array_equal(plan.token.reshape(-1)[plan.place], np.arange(len(tokens)))
  assert ((plan.segment < 0) == (plan.token < 0)).all()
  np.testing.assert_allclose(plan.padding, 1 - 5 * 690 / (18 * 197))
  assert plan.padding < 0.03 < plan_crops(((2, 197), (8, 37)), images=1).padding


def crops(batch=4, seed=0):
  rng = np.random.default_rng(seed)
  make = lambda count, side: jnp.asarray(rng.normal(size=(batch, count, side, side, 3)), jnp.float32)
  return [make(1, 32), make(1, 32), make(3, 16)]


def an_encoder(model=MODEL, **head):
  encoder = Encoder(backbone=model, head=DINOHead(12, hidden=16, bottleneck=8, layers=2, **head))
  variables = jax.jit(functools.partial(encoder.init, train=False))(jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), variables["params"])
  return encoder, params, variables.get("batch_stats", {})


@pytest.mark.parametrize(
  "train,model,pack", [(True, {}, 2), (False, {"registers": 2, "layer_scale": 0.5, "scan": True, "pool": "mean"}, 4)]
)
def test_packed_crops_have_the_features_gradients_and_statistics_of_separate_batches(train, model, pack):
  encoder, params, stats = an_encoder(MODEL.clone(**model), batch_norm=True)

  @functools.partial(jax.jit, static_argnums=1)
  def run(params, pack):
    def loss(params):
      out = encode_crops(encoder, params, stats, crops(), train=train, pack=pack)
      return jnp.mean(out.out["projection"] ** 2) + jnp.mean(out.out["pooled"] ** 2), (out.out, out.batch_stats)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (_, (apart, apart_stats)), apart_grads = run(params, 0)
  (_, (packed, packed_stats)), packed_grads = run(params, pack)
  assert 0 <= packed["padding"] < 0.5 and "padding" not in apart
  for key in ("pooled", "projection"):
    assert packed[key].shape[:2] == (5, 4)
    np.testing.assert_allclose(packed[key], apart[key], rtol=0, atol=1e-5, err_msg=key)
  for tree, other in ((packed_grads, apart_grads), (packed_stats, apart_stats)):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), tree, other)


def test_eight_devices_pack_as_one(mesh8):
  encoder, params, stats = an_encoder()
  run = jax.jit(lambda params, groups: encode_crops(encoder, params, stats, groups, train=False, pack=2).out["projection"])
  groups = crops(batch=16)
  one = run(params, groups)
  with jax.set_mesh(mesh8):
    eight = run(params, jax.device_put(groups, NamedSharding(mesh8, P(("data", "fsdp")))))
    with pytest.raises(UserError, match="pack_crops=4: must divide config.batch_size=16 on each of 8 devices"):
      encode_crops(encoder, params, stats, groups, train=False, pack=4)
  np.testing.assert_allclose(eight, one, rtol=0, atol=1e-5)


def methods():
  common = dict(model=MODEL, total_steps=10, batch_size=4, num_examples=40)
  dino = DINO(**common, num_prototypes=16, hidden_dim=16, bottleneck_dim=8, local_views=3, global_size=32, local_size=16)
  msn = dict(num_prototypes=8, output_dim=8, hidden_dim=16, rand_views=2, focal_views=3, rand_size=32, focal_size=16, patch_drop=0.3)
  return {"dino": dino, "msn": MSN(**common, **msn), "msn_mask_per_image": MSN(**common, **msn, mask_per_image=True)}


@pytest.mark.parametrize("name", ["dino", "msn", "msn_mask_per_image"])
def test_a_method_has_the_same_loss_and_gradients_packed(name):
  method = methods()[name]
  rng = np.random.default_rng(0)
  batch = {v.name: jnp.asarray(rng.normal(size=(4, v.count, *v.shape, 3)), jnp.float32) for v in method.inputs().views}
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  results = []
  for pack in (0, 2):
    one = dataclasses.replace(method, pack_crops=pack)
    loss = lambda p, one=one: one.loss(p, extra, batch, jax.random.key(1), jnp.int32(0))
    results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
  ((loss, (new, _)), grads), ((packed_loss, (packed_new, metrics)), packed_grads) = results
  np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
  for mine, wanted in zip(*map(jax.tree.leaves, ((packed_new, packed_grads), (new, grads))), strict=True):
    np.testing.assert_allclose(mine, wanted, rtol=1e-3, atol=1e-5 * max(1, np.abs(wanted).max()))
  assert 0 < metrics["padding"] < 0.5


@pytest.mark.parametrize("model", [ResNet(depth=18), MODEL.clone(patch=4, stem_channels=(8, 8))])
def test_backbones_that_cannot_pack_are_refused(model):
  encoder = Encoder(backbone=model, head=None)
  with pytest.raises(UserError, match="pack_crops=2: needs a ViT with the linear patch embedding, found"):
    encode_crops(encoder, {"backbone": {}}, {}, crops(), train=False, pack=2)
