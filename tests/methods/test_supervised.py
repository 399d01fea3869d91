"""The supervised baseline: mixup, the sigmoid loss, patch sizes that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import mixup
from big_ssl.core.types import UserError
from big_ssl.methods.supervised import Supervised
from big_ssl.models.vit import ViT

MODEL = ViT(variant="custom", width=16, depth=1, heads=2, mlp_dim=16, patch=8, image_size=16)
METHOD = Supervised(model=MODEL, num_classes=5, size=16)
BATCH = {"crop": jax.random.uniform(jax.random.key(0), (6, 1, 16, 16, 3)), "label": jnp.array([0, 1, 2, 3, 4, 0])}


def step(method, params, extra, batch=BATCH, *, seed=1):
  return method.loss(params, extra, batch, jax.random.key(seed), jnp.int32(0))[0]


def test_mixup_is_the_mixture_of_two_losses_on_mixed_images(monkeypatch):
  monkeypatch.setattr(mixup, "draw", lambda key, *, alpha: jnp.float32(0.5 + alpha))
  params, extra = METHOD.init(jax.random.key(0), BATCH)
  x = BATCH["crop"]
  mixed = {"crop": 0.7 * x + 0.3 * x[np.arange(6) - 1]}
  own, partner = (step(METHOD, params, extra, mixed | {"label": y}) for y in (BATCH["label"], BATCH["label"][np.arange(6) - 1]))
  value = step(METHOD.replace(mixup=0.2), params, extra)
  assert float(value) == pytest.approx(0.7 * float(own) + 0.3 * float(partner), rel=1e-5)


def test_mixup_draws_anew_in_every_step_and_forbids_microbatches():
  params, extra = METHOD.init(jax.random.key(0), BATCH)
  method = METHOD.replace(mixup=1.0)
  assert step(method, params, extra, seed=1) != step(method, params, extra, seed=2)
  assert step(METHOD, params, extra, seed=1) == step(METHOD, params, extra, seed=2)
  assert METHOD.supports_accumulation and not method.supports_accumulation


def test_the_sigmoid_recipe_starts_from_rare_classes():
  method = METHOD.replace(sigmoid=True, zero_init=True)
  params, extra = method.init(jax.random.key(0), BATCH)
  assert np.all(params["encoder"]["head"]["fc"]["bias"] == -10)
  assert float(step(method, params, extra)) == pytest.approx(10 + 5 * np.log1p(np.exp(-10)), rel=1e-5)


def test_a_patch_size_that_cuts_the_images_is_an_error():
  with pytest.raises(UserError, match="config.method.size=16: must be a multiple of config.model.patch=6"):
    METHOD.replace(model=MODEL.clone(patch_sizes=(6, 8)).at_patch(6))
  with pytest.raises(UserError, match="config.method.mixup=-0.5"):
    METHOD.replace(mixup=-0.5)
