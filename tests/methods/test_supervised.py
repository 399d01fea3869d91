"""Supervised training and fine-tuning: mixtures, views, heads, the sigmoid loss, and mistakes."""

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import mixup
from big_ssl.augment.photometric import ColorJitter, GaussianBlur, Grayscale, Normalize
from big_ssl.augment.rand_augment import RandAugment
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


def test_cutmix_pastes_a_box_of_the_partner_and_weighs_labels_by_its_area(monkeypatch):
  mask = jnp.ones((16, 16, 1)).at[:8, :4].set(0.0)
  monkeypatch.setattr(mixup, "cut_mask", lambda key, *, alpha, size: mask)
  params, extra = METHOD.init(jax.random.key(0), BATCH)
  x, partners = BATCH["crop"], np.arange(6) - 1
  pasted = {"crop": x.at[:, :, :8, :4].set(x[partners, :, :8, :4])}
  own, partner = (step(METHOD, params, extra, pasted | {"label": y}) for y in (BATCH["label"], BATCH["label"][partners]))
  for fields in ({"cutmix": 1.0}, {"cutmix": 1.0, "mixup": 0.8, "switch_prob": 1.0}):
    value = step(METHOD.replace(**fields), params, extra)
    assert float(value) == pytest.approx(0.875 * float(own) + 0.125 * float(partner), rel=1e-5)
  assert not METHOD.replace(cutmix=1.0).supports_accumulation


def test_label_smoothing_moves_a_share_of_the_target_to_all_classes():
  params, extra = METHOD.init(jax.random.key(0), BATCH)
  value = step(METHOD.replace(label_smoothing=0.1), params, extra)
  even = np.mean([float(step(METHOD, params, extra, BATCH | {"label": jnp.full(6, k)})) for k in range(5)])
  assert float(value) == pytest.approx(0.9 * float(step(METHOD, params, extra)) + 0.1 * even, rel=1e-5)


def test_stochastic_depth_of_the_backbone_is_on_in_training_alone():
  params, extra = METHOD.init(jax.random.key(0), BATCH)
  dropping = METHOD.replace(model=MODEL.clone(depth=2, drop_path=0.9))
  params, extra = dropping.init(jax.random.key(0), BATCH)
  assert len({float(step(dropping, params, extra, seed=s)) for s in range(4)}) > 1
  image = {"image": BATCH["crop"]}
  plain = METHOD.replace(model=MODEL.clone(depth=2)).features(params, extra, image)
  np.testing.assert_array_equal(dropping.features(params, extra, image)["logits"], plain["logits"])


def test_views_have_the_operations_of_the_recipe_in_their_order():
  method = METHOD.replace(rand_augment=RandAugment(magnitude=7.0), color_strength=1.0, grayscale=0.2, blur=0.5, interpolation="bicubic")
  view = method.inputs().views[0]
  assert [type(o) for o in view.augment] == [RandAugment, ColorJitter, Grayscale, GaussianBlur, Normalize]
  assert view.augment[0] == RandAugment(magnitude=7.0, fill=method.mean)
  assert view.interpolation == method.eval_view().interpolation == "bicubic"
  sharp = METHOD.replace(rand_augment=RandAugment(style="tf"), antialias=False)
  assert sharp.inputs().views[0].augment[0].fill == () and METHOD.inputs().views[0].antialias  # a gray of its own
  assert not sharp.inputs().views[0].antialias and sharp.eval_view().antialias
  assert [type(o) for o in METHOD.inputs().views[0].augment] == [Normalize]


def test_squashed_views_are_whole_images():
  method = METHOD.replace(squash=True)
  train, held_out = method.inputs().views[0], method.eval_view()
  assert (train.crop, train.flip, held_out.crop, held_out.flip) == ("none", 0.5, "none", 0.0)
  assert (METHOD.inputs().views[0].crop, METHOD.eval_view().crop) == ("random_resized", "center")


def test_a_head_has_hidden_layers_of_its_own_width():
  params, _ = METHOD.replace(hidden_layers=1, hidden_dim=24).init(jax.random.key(0), BATCH)
  head = params["encoder"]["head"]
  assert head["fc1"]["kernel"].shape == (16, 24) and head["fc"]["kernel"].shape == (24, 5)


def test_a_tanh_layer_comes_before_the_classifier():
  method = METHOD.replace(pre_logits=24)
  params, extra = method.init(jax.random.key(0), BATCH)
  head = params["encoder"]["head"]
  features = method.features(params, extra, {"image": BATCH["crop"]})
  hidden = np.tanh(features["pooled"] @ head["pre_logits"]["kernel"] + head["pre_logits"]["bias"])
  np.testing.assert_allclose(features["logits"], hidden @ head["fc"]["kernel"] + head["fc"]["bias"], atol=1e-5)


def test_the_plain_vit_has_the_constants_of_the_public_code():
  config = engine.load("supervised", "imagenet")
  method, o, model = config.method, config.optim, config.model
  flexible = engine.load("flexivit", "imagenet21k").method
  for fields in (method, flexible):
    assert RandAugment(**fields["rand_augment"]) == RandAugment(style="tf", layers=2, magnitude=10.0, std=0.0, p=1.0)
    assert (fields["mixup"], fields["scale"], fields["mean"], fields["antialias"]) == (0.2, (0.05, 1.0), (0.5, 0.5, 0.5), False)
  assert (model["pos_table"], model["class_token"], model["gelu"], method["pre_logits"]) == ("sincos2d", False, "tanh", 384)
  assert (o.lr, o.weight_decay, o.clip, str(o.warmup), str(config.total), config.batch_size) == (1e-3, 0.1, 1.0, "10000steps", "90epochs", 1024)
  table = (engine.ROOT / "tests" / "tables" / "supervised-imagenet.txt").read_text()
  decay = {line.split()[0]: line.split()[-5] for line in table.splitlines()[1:-1]}
  assert all((value == "1") == name.endswith("kernel") for name, value in decay.items())
  assert "encoder/head/pre_logits/kernel" in decay and "pos_embed" not in table and "cls_token" not in table


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


@pytest.mark.parametrize("field,value", [("mixup", -0.5), ("cutmix", -1.0), ("switch_prob", 1.5), ("label_smoothing", 2.0), ("hidden_dim", -1), ("pre_logits", -1)])
def test_fields_out_of_range_are_named(field, value):
  with pytest.raises(UserError, match=f"config.method.{field}={value}"):
    METHOD.replace(**{field: value})
