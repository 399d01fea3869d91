"""Contrastive pretraining on packed images: the loss view by view, draws of its own for each view, mistakes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.step import prepare
from big_ssl.core.types import UserError
from big_ssl.data.pipeline import Pipeline
from big_ssl.data.source import Python
from big_ssl.losses.contrastive import pair_loss
from big_ssl.methods.navit_contrastive import NaViTContrastive
from big_ssl.models.navit import NaViT
from big_ssl.models.vit import ViT

MODEL = NaViT(variant="custom", width=16, depth=1, heads=2, mlp_dim=16, patch=4, image_size=64)
METHOD = NaViTContrastive(
  model=MODEL, batch_size=8, tokens=48, shard_size=4, sequences=2, max_images=4, side=(8, 32), size=16, hidden_dim=8, output_dim=4
)


@pytest.fixture(scope="module")
def raw():
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), dtype=np.uint8) for _ in range(24)]
  return Pipeline(Python(images), METHOD.inputs(), batch_size=8, seed=0, rows=(0, 8), canvas=64, threads=1).batch(0)


@pytest.fixture(scope="module")
def batch(raw):
  return jax.jit(lambda raw: prepare(METHOD.inputs(), raw, None, jax.random.key(0)))(raw)


def test_the_two_views_of_an_image_are_drawn_independently(raw):
  for key in ("box", "plan/extent", "plan/grid"):
    assert not np.array_equal(raw[f"crop1/{key}"], raw[f"crop2/{key}"]), key
  dropping = METHOD.replace(drop_rate=(0.5, 0.5)).inputs()
  again = Pipeline(Python([np.zeros((32, 32, 3), np.uint8)] * 8), dropping, batch_size=8, seed=0, rows=(0, 8), canvas=32, threads=1).batch(0)
  assert not np.array_equal(again["crop1/plan/y"], again["crop2/plan/y"])


@pytest.mark.parametrize("kind,chunk", [("softmax", 3), ("sigmoid", 0)])
def test_the_loss_is_that_of_the_crops_one_by_one(batch, kind, chunk):
  method = METHOD.replace(kind=kind, chunk=chunk)
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  params = jax.tree.map(lambda x: x + 0.1, params)
  loss, (_, metrics) = jax.jit(method.loss)(params, extra, batch, jax.random.key(1), jnp.int32(0))
  apply = jax.jit(lambda image: method.encoder.apply({"params": params["encoder"]}, image, train=False)["projection"][0])
  views = []
  for name in ("crop1", "crop2"):
    sizes = 4 * np.asarray(batch[f"{name}_plan"]["extent"])
    views.append(jnp.stack([apply(batch[name][i, :, :h, :w]) for i, (h, w) in enumerate(sizes)]))
  scale, bias = 10 * math.exp(0.1), 0.1 - math.log(7)
  expected = pair_loss(*views, scale=scale, bias=bias if kind == "sigmoid" else 0.0, kind=kind)
  np.testing.assert_allclose(loss, expected.loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["contrastive_accuracy"], expected.accuracy)
  np.testing.assert_allclose(metrics["temperature"], 1 / scale, rtol=1e-6)
  assert 0 < metrics["padding"] < 1


def test_the_learned_scale_ends_at_one_hundred():
  for scale, kept in ((7.0, math.log(100)), (1.0, 1.0)):
    np.testing.assert_allclose(METHOD.project({"log_scale": jnp.float32(scale)})["log_scale"], kept, rtol=1e-6)


@pytest.mark.parametrize(
  "fields,message",
  [
    ({"kind": "sigmoids"}, "config.method.kind='sigmoids'.*Did you mean 'sigmoid'"),
    ({"temperature": 0.001}, "config.method.temperature=0.001: at least 0.01"),
    ({"chunk": -1}, "config.method.chunk=-1"),
    ({"blur": 1.5}, "config.method.blur=1.5"),
    ({"model": ViT()}, "config.model.name: packed sequences need navit, found ViT"),
  ],
)
def test_impossible_options_are_clear_errors(fields, message):
  with pytest.raises(UserError, match=message):
    METHOD.replace(**fields)


def test_one_image_has_no_negatives():
  with pytest.raises(UserError, match="config.batch_size=1: .*at least 2 images"):
    METHOD.replace(batch_size=1).init(jax.random.key(0), {"crop1": jnp.zeros((2, 1, 8, 8, 3))})


def test_the_bias_starts_from_the_batch_of_an_update_not_from_the_images_that_give_the_shapes():
  params, _ = METHOD.replace(kind="sigmoid", batch_size=101).init(jax.random.key(0), {"crop1": jnp.zeros((2, 1, 8, 8, 3))})
  np.testing.assert_allclose(params["bias"], -math.log(100), rtol=1e-6)
