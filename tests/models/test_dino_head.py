"""The DINO head against the public code, its weight normalization, its precision, and the multi-crop forward pass."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.models.encoder import Encoder, crop_major, encode, encode_crops
from big_ssl.models.heads import DINOHead
from big_ssl.models.resnet import ResNet
from big_ssl.models.vit import ViT
from big_ssl.weights.heads import dino_head
from big_ssl.weights.keymap import KeyMap, Weights


def state_of(z, prefix):
  return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}


def keymap(batch_norms, single):
  return KeyMap("DINO head", dino_head("head", batch_norms=batch_norms, single=single))


def import_head(state):
  norms = any("running_mean" in name for name in state)
  weights = keymap(norms, "mlp.weight" in state).load({f"head.{name}": value for name, value in state.items()})
  return Weights(weights.params["head"], weights.batch_stats.get("head", {}), weights.kept)


def export_head(weights):
  trees = (weights.params, weights.batch_stats)
  norms = "bn1" in weights.params["mlp"]
  named = keymap(norms, len(weights.params["mlp"]) == 1).dump(Weights(*({"head": tree} for tree in trees), weights.kept))
  return {name.removeprefix("head."): value for name, value in named.items()}


def make(z):
  state = state_of(z, "state/")
  weights = import_head(state)
  rows, bottleneck = state["last_layer.weight_v"].shape
  linear = [k for k in state if k.startswith("mlp") and state[k].ndim == 2]
  head = DINOHead(
    rows,
    hidden=state["mlp.0.bias"].shape[0],
    bottleneck=bottleneck,
    layers=len(linear),
    batch_norm=bool(weights.batch_stats),
    fix_scale=not bool(z["weight_g_trainable"]),
  )
  return head, weights


@pytest.mark.parametrize("name", ["dino_head", "dino_head_bn"])
def test_outputs_and_gradients_match_the_reference(golden, name):
  z = golden(name)
  head, weights = make(z)
  variables = {"params": weights.params, "batch_stats": weights.batch_stats}
  np.testing.assert_allclose(head.apply(variables, z["input"], train=False), z["output/eval"], atol=1e-5)

  def run(params, x):
    y, _ = head.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
    return jnp.sum(y * z["cotangent"]), y

  (_, y), (grads, grad_input) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(weights.params, jnp.asarray(z["input"]))
  np.testing.assert_allclose(y, z["output/train"], atol=1e-5)
  np.testing.assert_allclose(grad_input, z["grad/input"], atol=1e-5)
  wanted, mine = state_of(z, "grad/"), export_head(Weights(grads, {}))
  for key, value in wanted.items():
    if key != "input":
      np.testing.assert_allclose(mine[key], value, atol=1e-5, rtol=1e-5, err_msg=key)
  assert np.any(mine["last_layer.weight_g"]) == bool(z["weight_g_trainable"])


@pytest.mark.parametrize("name", ["dino_head", "dino_head_bn"])
def test_the_key_map_is_bijective(golden, name):
  state = state_of(golden(name), "state/")
  back = export_head(import_head(state))
  assert set(back) == set(state) and all(np.array_equal(back[k], state[k]) for k in state)


def test_a_head_of_one_layer_maps_too():
  head = DINOHead(5, bottleneck=4, layers=1)
  variables = head.init(jax.random.key(0), jnp.ones((2, 6)), train=False)
  state = export_head(Weights(variables["params"], {}))
  assert set(state) == {"mlp.weight", "mlp.bias", "last_layer.weight_v", "last_layer.weight_g"}
  again = import_head(state).params
  assert jax.tree.all(jax.tree.map(np.array_equal, again, variables["params"]))


def test_logits_are_cosines_at_the_start_and_do_not_depend_on_the_lengths_of_v():
  head = DINOHead(40, hidden=16, bottleneck=8)
  x = jax.random.normal(jax.random.key(0), (6, 12))
  params = head.init(jax.random.key(1), x, train=False)["params"]
  y = head.apply({"params": params}, x, train=False)
  assert float(jnp.abs(y).max()) <= 1 + 1e-6 and y.shape == (6, 40)
  last = params["last_layer"]
  assert np.all(last["g"] == 1) and float(jnp.abs(last["v"]).max()) <= 8**-0.5
  longer = params | {"last_layer": last | {"v": 7 * last["v"]}}
  np.testing.assert_allclose(head.apply({"params": longer}, x, train=False), y, atol=1e-6)


def test_half_precision_logits_are_accumulated_in_float32():
  head = DINOHead(40, hidden=16, bottleneck=64, dtype="bfloat16")
  x = jax.random.normal(jax.random.key(0), (6, 12))
  params = head.init(jax.random.key(1), x, train=False)["params"]
  y = head.apply({"params": params}, x.astype(jnp.bfloat16), train=False)
  assert y.dtype == jnp.float32 and not np.array_equal(y, y.astype(jnp.bfloat16).astype(jnp.float32))


def test_float32_logits_are_a_product_of_full_precision():
  x = jnp.ones((6, 12))
  head = DINOHead(40, hidden=16, bottleneck=64)
  variables = head.init(jax.random.key(1), x, train=False)
  products = [e for e in jax.make_jaxpr(lambda v: head.apply(v, x, train=False))(variables).eqns if e.primitive.name == "dot_general"]
  assert products[-1].outvars[0].aval.shape == (6, 40)
  assert products[-1].params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


BACKBONES = {
  "vit": ViT(variant="custom", width=24, depth=2, heads=2, mlp_dim=48, patch=8, image_size=32),
  "resnet": ResNet(depth=18, stem="cifar", blocks=(1, 1), stem_width=4),
}


def crops(*, sizes=(32, 16), counts=(2, 3), images=4):
  keys = jax.random.split(jax.random.key(3), len(sizes))
  return [jax.random.normal(k, (images, n, s, s, 3)) for k, s, n in zip(keys, sizes, counts, strict=True)]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_crops_go_through_the_backbone_by_size_and_through_the_head_at_once(backbone):
  encoder = Encoder(backbone=BACKBONES[backbone], head=DINOHead(12, hidden=16, bottleneck=8, batch_norm=True))
  groups = crops()
  variables = encoder.init(jax.random.key(0), groups[0][:, 0], train=False)
  params, stats = variables["params"], variables["batch_stats"]
  got = encode_crops(encoder, params, stats, groups, train=True)

  trunk, running, pooled = Encoder(backbone=encoder.backbone), {k: v for k, v in stats.items() if k == "backbone"}, []
  for views in groups:  # one backbone batch per resolution, statistics in order
    out = encode(trunk, {"backbone": params["backbone"]}, running, crop_major(views), train=True)
    running, pooled = out.batch_stats, [*pooled, out.out["pooled"]]
  pooled = jnp.concatenate(pooled)
  logits, head = encoder.head.apply(
    {"params": params["head"], "batch_stats": stats["head"]}, pooled, train=True, mutable=["batch_stats"]
  )
  np.testing.assert_allclose(got.out["pooled"], pooled.reshape(5, 4, -1), atol=1e-5)
  np.testing.assert_allclose(got.out["projection"], logits.reshape(5, 4, -1), atol=1e-5)
  expected = dict(running) | {"head": head["batch_stats"]}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), dict(got.batch_stats), expected)


def test_consecutive_groups_of_one_size_are_one_backbone_batch():
  encoder = Encoder(backbone=BACKBONES["resnet"], head=DINOHead(12, hidden=16, bottleneck=8))
  groups = crops(sizes=(16, 16, 8), counts=(1, 2, 1))
  variables = encoder.init(jax.random.key(0), groups[0][:, 0], train=False)
  run = lambda groups: encode_crops(encoder, variables["params"], variables["batch_stats"], groups, train=True)
  split, merged = run(groups), run([jnp.concatenate(groups[:2], axis=1), groups[2]])
  np.testing.assert_array_equal(split.out["projection"], merged.out["projection"])
  jax.tree.map(np.testing.assert_array_equal, split.batch_stats, merged.batch_stats)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_device_works_on_its_own_images(mesh8, backbone):
  """The compiler neither repeats the network on every device nor moves crops between them."""
  encoder = Encoder(backbone=BACKBONES[backbone], head=DINOHead(12, hidden=16, bottleneck=8, batch_norm=True))
  groups = crops(images=8)
  variables = encoder.init(jax.random.key(0), groups[0][:, 0], train=False)
  run = lambda params, groups: encode_crops(encoder, params, variables["batch_stats"], groups, train=True).out["projection"]
  alone = jax.jit(run).lower(variables["params"], groups).compile()
  with jax.set_mesh(mesh8):
    placed = jax.device_put(groups, NamedSharding(mesh8, P(("data", "fsdp"))))
    split = jax.jit(run).lower(variables["params"], placed).compile()
  assert split.cost_analysis()["flops"] < alone.cost_analysis()["flops"] / 6
  moved = [line for line in split.as_text().splitlines() if re.search(r"(all-gather|all-to-all|collective-permute)\(", line)]
  assert not [line for line in moved if re.search(r"\[[\d,]*(32,32|16,16),3\]", line)], moved
  np.testing.assert_allclose(split(variables["params"], placed), alone(variables["params"], groups), atol=1e-4)


def test_crop_major_puts_all_images_of_a_crop_together():
  views = jnp.arange(6).reshape(3, 2)  # [B, V]
  assert crop_major(views).tolist() == [0, 2, 4, 1, 3, 5]
