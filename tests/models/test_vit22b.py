"""The block of ViT-22B against timm's, its published size, and the same numbers however it is spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core import sharding
from big_ssl.core.config import MeshConfig
from big_ssl.core.types import UserError
from big_ssl.models.encoder import Encoder
from big_ssl.models.heads import Classifier
from big_ssl.models.vit import ViT
from big_ssl.models.vit22b import ViT22B
from big_ssl.weights.keymap import KeyMap
from big_ssl.weights.vit22b import parallel

TINY = {
  "variant": "custom",
  "width": 32,
  "depth": 2,
  "heads": 2,
  "mlp_dim": 96,
  "patch": 8,
  "image_size": 32,
  "dtype": "float32",
}


def close(a, b, message=""):
  np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=2e-5, err_msg=message)


def test_timms_parallel_network(golden):
  z = golden("vit22b_parallel_forward")
  state = {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}
  keymap = KeyMap("parallel ViT", parallel(heads=2))
  weights = keymap.load(state)
  again = keymap.dump(weights)
  assert again.keys() == state.keys() and all(np.array_equal(again[k], state[k]) for k in state)
  encoder = Encoder(ViT22B(**TINY), Classifier(7))

  @jax.jit
  def run(images):
    out = encoder.apply({"params": weights.params}, images, train=False, token_layers=(0, 1))
    return jnp.sum(out["projection"] * z["native/grad_weight"]), out

  images = jnp.asarray(np.moveaxis(z["native/input"], 1, -1))
  (_, out), grad = jax.value_and_grad(run, has_aux=True)(images)
  for i in (0, 1):
    close(out["token_layers"][i], z[f"native/output/block{i}_patch"], f"block {i}")
  close(out["tokens"], z["native/output/features"])
  close(out["pooled"], z["native/output/pre_logits"])
  close(out["projection"], z["native/output/logits"])
  close(np.moveaxis(np.asarray(grad), -1, 1), z["native/grad/input"])
  scanned = encoder.apply({"params": weights.params}, images, train=False)
  close(scanned["projection"], z["native/output/logits"])


def count(model):
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False))["params"]
  total = lambda tree: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
  return total(shapes) - total(shapes["map_head"])


def test_the_parameter_count_is_the_published_one():
  """21,743 million in Table 1; the public summary of the block gives 21,750, without the pooling."""
  assert abs(count(ViT22B()) / 21_750e6 - 1) < 1e-3


def test_on_1024_devices_each_holds_one_in_1024_of_the_parameters():
  """All but norms and biases, without a device or an array."""
  shapes = jax.eval_shape(lambda: ViT22B().init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False))
  config = MeshConfig(fsdp=128, tensor=8)
  mesh = jax.sharding.AbstractMesh((1, 128, 8), sharding.AXES)
  held = sharding.bytes_per_device(shapes, sharding.state_shardings(mesh, shapes, config))
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  assert total / 1024 <= held < 1.1 * total / 1024


def test_heads_that_tensor_does_not_divide_are_a_clear_error():
  shapes = jax.eval_shape(lambda: ViT22B(**TINY).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
  mesh = jax.sharding.AbstractMesh((1, 1, 4), sharding.AXES)
  with pytest.raises(UserError, match="config.mesh.tensor_rules.*attention/key/kernel'.*cannot be split on dimension -2"):
    sharding.state_shardings(mesh, shapes, MeshConfig(tensor=4))


def test_norms_and_queries_have_no_biases_and_the_mlp_has():
  params = jax.eval_shape(lambda: ViT22B(**TINY).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))["params"]
  block = params["block_0"]
  assert block["attention"]["query"].keys() == {"kernel"} and block["norm"]["norm"].keys() == {"scale"}
  assert block["attention"]["query_norm"]["norm"]["scale"].shape == (16,)
  assert block["mlp"]["fc1"].keys() == block["mlp"]["fc2"].keys() == {"kernel", "bias"}


def test_query_and_key_norms_bound_the_logits():
  """Queries 100 times as large change nothing: without the norm the softmax of such logits is a choice of one token."""
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  outs = {}
  for qk_norm in ("rmsnorm", "none"):
    model = ViT22B(**TINY | {"qk_norm": qk_norm, "depth": 1})
    params = model.init(jax.random.key(1), images, train=False)["params"]
    loud = jax.tree_util.tree_map_with_path(lambda p, x: 100 * x if "query'" in str(p) and "block" in str(p) else x, params)
    outs[qk_norm] = [model.apply({"params": p}, images, train=False)["pooled"] for p in (params, loud)]
  np.testing.assert_allclose(*outs["rmsnorm"], atol=1e-4)
  assert np.abs(outs["none"][0] - outs["none"][1]).max() > 1e-2


@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_fsdp_and_tensor_shardings_give_the_numbers_of_one_device(block):
  model = ViT22B(**TINY | {"width": 64, "heads": 4, "mlp_dim": 128, "block": block})
  images = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
  params = model.init(jax.random.key(1), images, train=False)["params"]

  def loss(params, images):
    return jnp.mean(model.apply({"params": params}, images, train=True)["pooled"] ** 2)

  wanted, grads = jax.jit(jax.value_and_grad(loss))(params, images)
  config = MeshConfig(fsdp=4, tensor=2, fsdp_min_size=64)
  mesh = sharding.make_mesh(config, batch_size=8)
  shardings = sharding.state_shardings(mesh, params, config)
  specs = jax.tree.map(lambda s: s.spec, shardings)["block_1"]
  assert specs["attention"]["query"]["kernel"] == jax.P("fsdp", "tensor", None)
  assert specs["attention"]["out"]["kernel"] == jax.P("tensor", None, "fsdp")
  assert specs["mlp"]["fc1"]["kernel"] == jax.P("fsdp", "tensor") and specs["mlp"]["fc1"]["bias"] == jax.P("tensor")
  assert specs["mlp"]["fc2"]["kernel"] == jax.P("tensor", "fsdp")
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, shardings), jax.device_put(images, jax.NamedSharding(mesh, sharding.BATCH))
    found, spread = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(*placed)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), spread, grads)


def test_the_count_of_vit_e_is_the_published_one():
  """3,926 million in Table 1: sequential blocks, pooling, and a classifier of JFT's 29,593 labels."""
  model = ViT(variant="e", patch=14, class_token=False, pool="map")
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False))
  total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) + 29_593 * (1792 + 1)
  assert round(total / 1e6) == 3926
