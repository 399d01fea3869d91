"""One set of parameters at every patch size, as big_vision's network runs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.encoder import Encoder
from big_ssl.models.flexivit import FlexiViT
from big_ssl.models.heads import Classifier
from big_ssl.models.layers import PatchEmbed
from big_ssl.models.vit import ViT
from big_ssl.weights.bigvision import big_vision
from big_ssl.weights.keymap import KeyMap

TINY = {"variant": "custom", "width": 32, "depth": 2, "heads": 4, "mlp_dim": 64}


def close(a, b):
  np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("seqhw", [2, 3, 4, 6, 8])
def test_the_public_network_at_every_patch_size(golden, seqhw, monkeypatch):
  z = golden("flexivit_forward")
  weights = KeyMap("FlexiViT", big_vision()).load({k.removeprefix("state/"): v for k, v in z.items() if "state/" in k})
  params, side = weights.params["backbone"], 48 // seqhw
  model = FlexiViT(**TINY, kernel_patch=8, pos_grid=4, image_size=48)
  encoder = Encoder(model.at_patch(side), Classifier(7))
  embedded, embed = [], ViT._embed
  monkeypatch.setattr(ViT, "_embed", lambda self, *a, **kw: embedded.append(embed(self, *a, **kw)) or embedded[-1])
  out = encoder.apply({"params": weights.params}, z["input"], train=False)
  close(out["projection"], z[f"seqhw{seqhw}/output/logits"])
  close(embedded[0][:, 1:], z[f"seqhw{seqhw}/output/with_posemb"])
  stem = PatchEmbed(32, 8).apply({"params": params["patch_embed"]}, z["input"], patch=(side, side))
  close(stem, z[f"seqhw{seqhw}/output/stem"])


def test_the_tree_does_not_depend_on_the_patch_size():
  model = ViT(**TINY, patch=8, image_size=32)
  images = jnp.zeros((1, 32, 32, 3))
  shapes = lambda m: jax.tree.map(
    lambda x: x.shape, jax.eval_shape(lambda: m.init(jax.random.key(0), images, train=False))
  )
  assert shapes(model.at_patch(4)) == shapes(model.at_patch(16)) == shapes(model)
  assert model.at_patch(4).patch == 4 and model.at_patch(4).at_patch(16) == model.at_patch(16)
  assert hash(model.at_patch(4)) == hash(model.at_patch(4))


def test_a_patch_of_the_call_is_that_of_the_model_and_may_be_a_rectangle():
  model = ViT(**TINY, patch=8, image_size=32, pos_rule="linear")
  images = jax.random.normal(jax.random.key(0), (2, 32, 48, 3))
  params = model.init(jax.random.key(1), images, train=False)["params"]
  run = jax.jit(lambda m, **kw: m.apply({"params": params}, images, train=False, **kw)["tokens"], static_argnums=0, static_argnames="patch")
  np.testing.assert_array_equal(run(model, patch=4), run(model.at_patch(4)))
  assert run(model, patch=(8, 16)).shape == (2, 4 * 3, 32)
  close(run(model, patch=8), run(model))


def test_a_stored_kernel_may_be_a_rectangle():
  model = ViT(**TINY, patch=8, kernel_patch=(8, 4), pos_grid=(2, 3))
  run = lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, 16, 24, 3)), train=False)
  out, variables = jax.eval_shape(run)
  assert variables["params"]["patch_embed"]["conv"]["kernel"].shape == (8, 4, 3, 32)
  assert variables["params"]["pos_embed"].shape == (1, 7, 32) and out["tokens"].shape == (1, 6, 32)


def test_gradients_reach_the_stored_kernel_and_table_in_float32():
  model = ViT(**TINY, patch=8, image_size=32, dtype="bfloat16").at_patch(4)
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  params = model.init(jax.random.key(1), images, train=False)["params"]
  grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, images, train=True)["pooled"] ** 2)))(params)
  for grad in (grads["patch_embed"]["conv"]["kernel"], grads["pos_embed"]):
    assert grad.dtype == jnp.float32 and np.any(grad)
  assert grads["patch_embed"]["conv"]["kernel"].shape == (8, 8, 3, 32) and grads["pos_embed"].shape == (1, 17, 32)


def test_the_default_model_is_that_of_the_paper():
  model = FlexiViT(variant="mu")
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 240, 240, 3)), train=False))["params"]
  assert shapes["patch_embed"]["conv"]["kernel"].shape[:2] == (32, 32) and shapes["pos_embed"].shape == (1, 49, 32)
  for patch in model.patch_sizes:
    run = lambda p=patch: model.at_patch(p).init_with_output(jax.random.key(0), jnp.zeros((1, 240, 240, 3)), train=False)[0]
    assert jax.eval_shape(run)["tokens"].shape == (1, (240 // patch) ** 2, 32) and 240 % patch == 0


def test_a_patch_size_that_cannot_be_is_a_clear_error():
  model = FlexiViT(**TINY)
  with pytest.raises(UserError, match="config.model.patch_sizes.*found 0"):
    model.at_patch(0)
  images = jnp.zeros((1, 30, 30, 3))
  with pytest.raises(UserError, match="config.model.patch=48: the images are 30x30, smaller than one patch"):
    jax.eval_shape(lambda: model.at_patch(48).init(jax.random.key(0), images, train=False))
  with pytest.raises(UserError, match="config.model.kernel_patch=7: does not divide config.model.image_size=30"):
    ViT(kernel_patch=7, image_size=30).table()
  stem = ViT(**TINY, patch=4, image_size=32, stem_channels=(8, 16))
  with pytest.raises(UserError, match="config.model.stem_channels"):
    jax.eval_shape(lambda: stem.at_patch(8).init(jax.random.key(0), images, train=False))
