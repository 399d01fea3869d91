"""MoCo v3: heads and schedules as released, the order of the key encoder's update, the ViT's start and what is frozen."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core import health
from big_ssl.core.config import OptimConfig
from big_ssl.core.optim import learning_rate, match_rules
from big_ssl.core.types import Interval, UserError
from big_ssl.losses.contrastive import batch_nce
from big_ssl.methods.moco_v3 import MoCoV3
from big_ssl.models.encoder import encode
from big_ssl.models.vit import ViT


class Flat(nn.Module):
  """The pixels through one layer."""

  @nn.compact
  def __call__(self, images, *, train):
    return {"pooled": nn.relu(nn.Dense(20, name="fc")(images.reshape(images.shape[0], -1)))}


def make(**fields):
  return MoCoV3(**(dict(model=Flat(), total_steps=10, hidden_dim=28, output_dim=16) | fields))


@pytest.fixture(scope="module")
def tiny():
  method = make()
  batch = {f"view{i}": jax.random.normal(jax.random.key(i), (12, 1, 2, 2, 3)) for i in (1, 2)}
  return method, *method.init(jax.random.key(0), batch), batch


def head_variables(z, name):
  """Torch's Sequential of Linear, BN, ReLU, ...: entry 3 i is the linear layer i, entry 3 i + 1 its BN."""
  params, stats = {}, {}
  for i in range(len([k for k in z if k.startswith(f"state/{name}.") and k.endswith("running_mean")])):
    params[f"fc{i + 1}"] = {"kernel": z[f"state/{name}.{3 * i}.weight"].T}
    bn = f"state/{name}.{3 * i + 1}"
    if f"{bn}.weight" in z:
      params[f"bn{i + 1}"] = {"scale": z[f"{bn}.weight"], "bias": z[f"{bn}.bias"]}
    stats[f"bn{i + 1}"] = {"mean": z[f"{bn}.running_mean"], "var": z[f"{bn}.running_var"]}
  return jax.tree.map(jnp.asarray, {"params": params, "batch_stats": stats})


def test_projector_and_predictor_are_the_released_ones_in_training_and_evaluation(golden):
  z = golden("mocov3_heads")
  encoder = make().encoder
  inputs = {"head": z["input"]}
  for name, module in (("head", encoder.head), ("predictor", encoder.predictor)):
    variables = head_variables(z, name)
    shapes = jax.eval_shape(lambda m=module, n=name: m.init(jax.random.key(0), jnp.zeros((2, 20 if n == "head" else 16)), train=False))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda a: a.shape, shapes)
    x = jnp.asarray(inputs[name] if name in inputs else z["output/train_head"])
    out, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out, z[f"output/train_{name}"], atol=2e-5)
    for i, bn in enumerate(sorted(new["batch_stats"])):
      for key, torch in (("mean", "running_mean"), ("var", "running_var")):
        np.testing.assert_allclose(new["batch_stats"][bn][key], z[f"new_state/{name}.{3 * i + 1}.{torch}"], rtol=1e-5, atol=1e-6)
    x = jnp.asarray(inputs[name] if name in inputs else z["output/eval_head"])
    np.testing.assert_allclose(module.apply(variables, x, train=False), z[f"output/eval_{name}"], atol=2e-5)


def test_schedules_are_the_released_ones_at_fractions_of_epochs(golden):
  z, per_epoch = golden("mocov3_schedules"), 1000
  steps = np.rint(z["epoch"] * per_epoch).astype(np.int32)
  np.testing.assert_allclose(steps / per_epoch, z["epoch"], atol=1e-3)
  config = OptimConfig(lr=1.5e-4 * 16000 / 16, lr_scale="none", warmup=Interval(40, "epochs"))
  lr = learning_rate(config, total_steps=300 * per_epoch, batch_size=1, examples=per_epoch)
  scale = 2.4 / (1.5e-4 * 1000)
  method = make(total_steps=300 * per_epoch)
  for i, step in enumerate(steps):
    np.testing.assert_allclose(float(lr(jnp.int32(step))) * scale, z["lr"][i], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(float(method.ema_momentum(jnp.int32(step))), z["momentum"][i], rtol=1e-6)


def test_the_loss_is_both_directions_with_keys_of_the_averaged_encoder(tiny):
  method, params, extra, batch = tiny
  moved = jax.tree.map(lambda x: 1.1 * x, params)
  loss, (after, _) = method.loss(moved, extra, batch, jax.random.key(0), jnp.int32(0))
  q, k, stats, key_stats = {}, {}, extra["batch_stats"], extra["teacher_batch_stats"]
  for view in ("view1", "view2"):
    query = encode(method.encoder, moved["encoder"], stats, batch[view][:, 0], train=True)
    key = encode(method.key_encoder, after["teacher"], key_stats, batch[view][:, 0], train=True)
    q[view], k[view], stats, key_stats = query.out["prediction"], key.out["projection"], query.batch_stats, key.batch_stats
  wanted = sum(batch_nce(q[a], k[b], temperature=0.2, loss_scale=0.4).loss for a, b in (("view1", "view2"), ("view2", "view1")))
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  for old, new in zip(jax.tree.leaves(extra["teacher"]), jax.tree.leaves(after["teacher"]), strict=True):
    np.testing.assert_allclose(new, old * (1 + 0.01 * 0.1), rtol=1e-5, atol=1e-7)
  for got, expected in ((after["batch_stats"], stats), (after["teacher_batch_stats"], key_stats)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


def test_the_resnet_recipe_has_no_norm_after_the_predictor_and_no_predictor_is_possible(tiny):
  *_, batch = tiny
  plain = make(projector_layers=2, predictor_norm=False).init(jax.random.key(0), batch)[1]["batch_stats"]
  assert set(plain["head"]) == {"bn1", "bn2"} and set(plain["predictor"]) == {"bn1"}
  bare = make(predictor_layers=0)
  params, extra = bare.init(jax.random.key(0), batch)
  assert "predictor" not in params["encoder"]
  assert np.isfinite(bare.loss(params, extra, batch, jax.random.key(0), jnp.int32(0))[0])


@pytest.fixture(scope="module")
def vit():
  sizes = dict(variant="custom", width=64, depth=1, heads=2, mlp_dim=256, patch=8)
  method = make(model=ViT(**sizes, image_size=32, patch_init="moco_v3", pos_table="sincos"))
  return method, method.init(jax.random.key(0), {"view1": jnp.zeros((2, 1, 32, 32, 3))})[0]


def test_the_vit_starts_as_released(vit):
  _, params = vit
  p = params["encoder"]["backbone"]
  assert "pos_embed" not in p
  limits = {
    "patch": (p["patch_embed"]["conv"]["kernel"], 3 * 64 + 64),
    "query": (p["block_0"]["attention"]["query"]["kernel"], 64 + 64),
    "value": (p["block_0"]["attention"]["value"]["kernel"], 64 + 64),
    "out": (p["block_0"]["attention"]["out"]["kernel"], 64 + 64),
    "fc1": (p["block_0"]["mlp"]["fc1"]["kernel"], 64 + 256),
    "fc2": (p["block_0"]["mlp"]["fc2"]["kernel"], 64 + 256),
  }
  for name, (kernel, fans) in limits.items():
    bound = np.sqrt(6 / fans)
    assert 0.97 * bound < np.abs(kernel).max() <= bound, name
    np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.05, err_msg=name)
  for block in (p["patch_embed"]["conv"], p["block_0"]["attention"]["query"], p["block_0"]["mlp"]["fc1"]):
    assert not np.any(block["bias"])
  assert 3e-7 < np.std(p["cls_token"]) < 3e-6


def test_the_convolutional_stem_starts_as_torchs_layers_and_nothing_of_it_is_frozen():
  sizes = dict(variant="custom", width=64, depth=1, heads=2, mlp_dim=128, patch=4, image_size=16)
  method = make(model=ViT(**sizes, stem_channels=(32, 64), patch_init="moco_v3", pos_table="sincos"))
  params = method.init(jax.random.key(0), {"view1": jnp.zeros((2, 1, 16, 16, 3))})[0]
  stem = params["encoder"]["backbone"]["patch_embed"]
  for name, fan_in in (("conv_0", 27), ("conv_1", 288), ("project", 64)):
    for kind, value in stem[name].items():
      assert 0.85 * fan_in**-0.5 < np.abs(value).max() <= fan_in**-0.5, (name, kind)
  tensors = match_rules(params, method.param_rules(), batch_size=1, examples=1)
  assert all(t.rule.lr_mult == 1 for t in tensors)


def test_fixed_positions_are_added_to_patches_and_not_to_the_class_token(vit):
  method, params = vit
  p = jax.tree.map(jnp.zeros_like, params["encoder"]["backbone"])
  p["norm"] = params["encoder"]["backbone"]["norm"]  # blocks of zeros are the identity: what is left are the positions
  out = method.model.apply({"params": p}, jnp.zeros((1, 32, 32, 3)), train=False)
  assert not np.any(out["cls"])
  tokens = np.asarray(out["tokens"][0]).reshape(4, 4, 64)
  assert len(np.unique(tokens.reshape(16, 64).round(4), axis=0)) == 16
  scrambled = method.model.clone(pos_table="sincos_scrambled", image_size=(16, 32))
  straight = scrambled.clone(pos_table="sincos")
  a, b = (m.apply({"params": p}, jnp.zeros((1, 16, 32, 3)), train=False)["tokens"] for m in (scrambled, straight))
  assert np.abs(a - b).max() > 0.1


def test_the_patch_projection_is_frozen_and_everything_else_decays(vit):
  method, params = vit
  rules = lambda m: {t.path: t.rule for t in match_rules(params, m.param_rules(), batch_size=1, examples=1)}
  for path, rule in rules(method).items():
    assert rule.weight_decay == 1
    assert (rule.lr_mult == 0) == path.startswith("encoder/backbone/patch_embed/"), path
  lars = rules(method.replace(decay_all=False, freeze_patches=False))
  assert all(r.lr_mult == 1 for r in lars.values())
  for path, rule in lars.items():
    small = path.endswith(("bias", "scale"))
    assert (rule.weight_decay == 0) == small and rule.trust_ratio == (not small), path


def test_a_planted_constant_embedding_is_called_collapsed(tiny):
  method, params, extra, batch = tiny
  for factor, wanted in ((1.0, "healthy"), (0.0, "collapsed")):
    backbone = jax.tree.map(lambda x, f=factor: f * x, params["encoder"]["backbone"])
    planted = {"encoder": params["encoder"] | {"backbone": backbone}}
    loss, (_, metrics) = method.loss(planted, extra, batch, jax.random.key(0), jnp.int32(0))
    verdict = health.judge({k: float(v) for k, v in metrics.items()} | {"loss": float(loss)}, thresholds=health.HealthConfig())
    assert verdict.state == wanted, verdict


@pytest.mark.parametrize(
  "field,value",
  [
    ("temperature", 0.0),
    ("momentum", 1.5),
    ("momentum_final", -1.0),
    ("projector_layers", 0),
    ("predictor_layers", -1),
    ("hidden_dim", 0),
    ("mean", (0.5,)),
  ],
)
def test_impossible_options_are_clear_errors(field, value):
  with pytest.raises(UserError, match=f"config.method.{field}="):
    dataclasses.replace(make(), **{field: value})
