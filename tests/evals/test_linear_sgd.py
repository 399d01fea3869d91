"""Linear probes by SGD: sweeps, layers and presets on planted features, and readouts of a real run."""

import dataclasses

import engine
import jax
import numpy as np
import pytest

from big_ssl import setup
from big_ssl.core.config import build_named
from big_ssl.core.types import UserError
from big_ssl.evals.base import Crop, Evaluator, Features
from big_ssl.evals.linear_sgd import LinearSGD, constants
from big_ssl.evaluate import Extractor
from big_ssl.feature_cache import FeatureCache
from big_ssl.models.readouts import Readout

SMALL = LinearSGD(readout="output", epochs=15, batch_size=9, lr=(0.3, 3.0))  # scaled by 9 / 256


def planted(split, *, output="pooled", weights="current", noise=None, shape=(8,)):
  """Classes around axes: tight for the current weights, loose in pixels, none for random weights."""
  rng = np.random.default_rng([split == "train", len(str(output)), len(weights)])
  labels = np.arange(60, dtype=np.int32) % 6
  noise = noise or (100.0 if weights == "random" else 0.6 if output == "pixels" else 0.05)
  features = np.eye(8)[labels][:, :, None] + noise * rng.normal(size=(60, 8, np.prod(shape) // 8))
  return Features(features.reshape(60, -1).astype(np.float32), labels, np.arange(60), source="8 axes", shape=shape)


def test_planted_classes_are_learned_better_than_the_baselines_and_the_protocol_says_how():
  report = dataclasses.replace(SMALL, baselines=True)(planted)
  m = report.metrics
  assert m["top1"] == 100 and m["random_init/top1"] < m["raw_pixels/top1"] < 100, m
  assert set(m) == {"top1", "lr/0.3", "lr/3", "random_init/top1", "raw_pixels/top1"} and m["top1"] in (
    m["lr/0.3"],
    m["lr/3"],
  )
  for word in (
    *("preset dino", "momentum 0.9", "batch 9", "15 epochs", "cosine epochs", "* 9/256", "2 heads", "by a tenth of the"),
    *("edge of the sweep", "'pooled' (8 dimensions)", "without augmentation", "last epoch", "60 training", "8 axes"),
  ):
    assert word in report.protocol, (word, report.protocol)


def test_the_head_is_chosen_on_training_images_and_a_diverged_one_is_left_out_and_named():
  def misleading(split, **kwargs):
    f = planted(split, **kwargs)
    # The held-out labels are shifted: a head that is right on training images is wrong here.
    return f if split == "train" else dataclasses.replace(f, labels=(f.labels + 1) % 6)

  report = dataclasses.replace(SMALL, lr=(1e-5, 3.0, 1e40))(misleading)
  assert report.metrics["top1"] == report.metrics["lr/3"] == 0 and "lr 3 * 9/256" in report.protocol
  assert "lr/1e+40" not in report.metrics and "diverged: lr 1e+40" in report.protocol


def test_of_several_layers_the_best_on_the_tenth_is_reported_beside_each():
  def by_stage(split, *, output, weights):
    return planted(split, weights=weights, noise={1: 3.0, 2: 0.05, 3: 1.0}[output.stage], shape=(8, 2))

  report = dataclasses.replace(SMALL, preset="benchmark", readout=None, stages=(1, 2, 3))(by_stage)
  m = report.metrics
  assert m["top1"] == m["conv2/top1"] > m["conv3/top1"] and {"conv1/lr/0.3", "conv3/lr/3"} <= set(m), m
  assert "of 'conv1', 'conv2', 'conv3' the best on that tenth is conv2 (16 dimensions)" in report.protocol
  assert "BN without scale" in report.protocol and "milestones" in report.protocol


def test_presets_have_the_published_constants():
  found = {name: constants(name) for name in ("dino", "msn", "swav", "deepcluster", "benchmark", "seer")}
  table = {k: (p.lr, p.batch_size, p.weight_decay, p.epochs, p.schedule, p.readout) for k, p in found.items()}
  assert table == {
    "dino": (1e-3, 256, 0.0, 100, "cosine_epochs", "cls"),
    "msn": (6.4, 16384, 0.0, 100, "cosine_steps", "cls_unnormed"),
    "swav": (0.3, 256, 1e-6, 100, "cosine_epochs", "output"),
    "deepcluster": (0.01, 256, 1e-7, 90, "inverse_sqrt", "stages"),
    "benchmark": (0.01, 256, 5e-4, 28, "milestones", "stages"),
    "seer": (0.01, 256, 5e-4, 28, "milestones", "stages"),
  }
  assert [k for k, p in found.items() if p.scaled] == ["dino", "benchmark", "seer"]
  assert [k for k, p in found.items() if p.recipe.nesterov] == ["msn", "benchmark", "seer"]
  assert {p.recipe.momentum for p in found.values()} == {0.9}
  for name in found:  # the published rate is one of the heads
    assert found[name].lr in [lr for lr, _ in LinearSGD(preset=name).grid()]


def test_every_field_of_the_training_has_an_effect():
  loose = lambda split, **kwargs: planted(split, **kwargs, noise=1.0)
  base = dataclasses.replace(SMALL, epochs=3)
  before = base(loose).metrics
  for change in ({"seed": 1}, {"epochs": 6}, {"batch_size": 20}, {"weight_decay": (1.0,)}):
    assert dataclasses.replace(base, **change)(loose).metrics != before, change
  both = dataclasses.replace(base, weight_decay=(0.0, 1.0))(loose).metrics
  assert {"lr/0.3_wd/0", "lr/3_wd/1"} <= set(both) and both["lr/3_wd/0"] == before["lr/3"]


def test_cropped_training_images_are_asked_for_in_every_epoch_and_nothing_else_is():
  asked = []

  def noted(split, *, crop=None, **kwargs):
    asked.append((split, crop))
    found = planted(split, **kwargs)
    noise = 0 if crop is None else np.random.default_rng(crop.epoch).normal(size=found.features.shape)
    return dataclasses.replace(found, features=(found.features + 0.01 * noise).astype(np.float32))

  report = dataclasses.replace(SMALL, epochs=4, seed=3, augment="published")(noted)
  crops = [Crop(seed=3, epoch=e) for e in range(4)]
  assert asked == [("train", None), ("eval", None), *(("train", crop) for crop in crops)]
  for word in ("random crops (0.08 to 1 of the area, aspect 0.75 to 1.33", "flipped with p 0.5, anew in every epoch"):
    assert word in report.protocol, report.protocol
  assert "without augmentation" not in report.protocol and "held-out images of the evaluation view" in report.protocol
  report = dataclasses.replace(SMALL, preset="deepcluster", readout="output", epochs=1, augment="published")(noted)
  assert "the view's size out of the central square of images resized to 1 times it / 0.875" in report.protocol, report.protocol


def test_ten_crops_of_the_held_out_images_are_judged_by_their_mean_softmax():
  asked = []

  def noted(split, *, crop=None, **kwargs):
    found = planted(split, **kwargs)
    if crop is not None:  # one crop in ten knows the class well; the nine others show nothing
      asked.append((split, crop.place, crop.flip))
      found = dataclasses.replace(found, features=found.features * (crop.place == (0.5, 0.5) and crop.flip == 1))
    return found

  ten = dataclasses.replace(SMALL, ten_crops=True, lr=(3.0,))
  report = ten(noted)
  places = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5)]
  assert asked == [("eval", place, flip) for flip in (0.0, 1.0) for place in places]
  assert report.metrics["top1"] > 90 and "held-out images by the mean softmax of ten crops" in report.protocol, report
  blind = lambda split, *, crop=None, **kw: dataclasses.replace(f := planted(split, **kw), features=f.features * (crop is None))
  assert ten(blind).metrics["top1"] < 30
  with pytest.raises(UserError, match="linear_sgd.ten_crops=True: expected report='last'"):
    dataclasses.replace(ten, report="best")


def test_crops_that_change_nothing_train_the_heads_of_the_cached_features_and_baselines_are_cropped_too():
  loose = lambda split, *, crop=None, **kwargs: planted(split, **kwargs, noise=1.0)
  cached = dataclasses.replace(SMALL, epochs=4, baselines=True)
  anew = dataclasses.replace(cached, augment="published")
  assert anew(loose).metrics == cached(loose).metrics
  worse = lambda split, *, crop=None, **kwargs: planted(split, **kwargs, noise=1.0 if crop is None else 100.0)
  found, before = anew(worse).metrics, cached(loose).metrics
  for name in ("top1", "random_init/top1", "raw_pixels/top1"):
    assert found[name] != before[name], name


def test_the_best_epoch_is_reported_where_asked_for_and_is_no_worse_than_the_last():
  # The last epochs learn other labels than those that are held out.
  def turning(split, *, crop=None, **kwargs):
    f = planted(split, **kwargs)
    return f if crop is None or crop.epoch < 8 else dataclasses.replace(f, labels=(f.labels + 1) % 6)

  last = dataclasses.replace(SMALL, preset="swav", augment="published", lr=(3.0,))  # a smaller one keeps the first
  best = dataclasses.replace(last, report="best")
  worse, better = last(turning), best(turning)
  assert worse.metrics["top1"] < better.metrics["top1"] == 100, (worse.metrics, better.metrics)
  assert "last epoch" in worse.protocol and "the epoch with the best on the held-out images" in better.protocol
  steady = dataclasses.replace(SMALL, report="best")
  assert steady(planted).metrics["top1"] == 100 and "the epoch with the best" in steady(planted).protocol


def extractor(devices, kept=None):
  run = setup.make_run(engine.small("dino"), devices=jax.devices()[:devices])
  extract = Extractor(run, kept=kept)
  extract.state = run.initial_state()
  return extract


@pytest.fixture(scope="module")
def one():
  return extractor(1)


@pytest.fixture(scope="module")
def eight():
  return extractor(8)


def test_crops_are_a_function_of_seed_and_epoch_on_any_number_of_devices(one, eight):
  view, first = one("train"), one("train", crop=Crop())
  np.testing.assert_array_equal(one("train", crop=Crop()).features, first.features)
  np.testing.assert_allclose(eight("train", crop=Crop()).features, first.features, atol=1e-5)
  np.testing.assert_array_equal(first.index, view.index)
  np.testing.assert_array_equal(first.labels, view.labels)
  for other in (view, one("train", crop=Crop(epoch=1)), one("train", crop=Crop(seed=1))):
    assert np.abs(other.features - first.features).max() > 1e-3
  pixels = one("train", output="pixels", crop=Crop(epoch=1)).features
  np.testing.assert_allclose(eight("train", output="pixels", crop=Crop(epoch=1)).features, pixels, atol=1e-5)


def test_the_whole_image_unflipped_is_the_evaluation_view(one):
  whole = Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, interpolation="bicubic")
  np.testing.assert_allclose(one("train", crop=whole).features, one("train").features, atol=1e-5)
  scaled = Crop(kind="scaled", scale=(1.0, 1.0), flip=0.0, interpolation="bicubic")
  np.testing.assert_allclose(one("train", crop=scaled).features, one("train").features, atol=1e-5)
  pixels = lambda **crop: one("eval", output="pixels", crop=Crop(kind="center", interpolation="bicubic", **crop)).features.reshape(-1, 32, 32, 3)
  view = one("eval", output="pixels").features.reshape(-1, 32, 32, 3)
  np.testing.assert_array_equal(pixels(flip=0.0), view)
  np.testing.assert_allclose(pixels(flip=1.0), view[:, :, ::-1], atol=1e-4)
  corner = pixels(flip=0.0, center_fraction=0.5, place=(0.0, 1.0))
  np.testing.assert_allclose(corner.mean((1, 2)), view[:, :16, 16:].mean((1, 2)), atol=0.05)
  alike = lambda split, *, crop=None, **kw: one(split, crop=crop and whole, **kw)
  cached = dataclasses.replace(SMALL, readout="cls", layers=2, epochs=3)
  found, expected = dataclasses.replace(cached, augment="published")(alike).metrics, cached(one).metrics
  assert found == expected


def test_features_of_crops_are_not_kept(one, tmp_path):
  kept = Extractor(one._run, kept=FeatureCache(tmp_path / "features", max_bytes=2**30))
  kept.state = one.state
  kept("train", crop=Crop())
  assert not (tmp_path / "features").exists()


def test_a_run_is_read_by_functions_of_its_backbone_and_reports_are_equal_on_one_and_eight_devices(one, eight):
  readout = Readout(kind="cls", layers=2)
  found, pooled = one("eval", output=readout).features, one("eval").features
  np.testing.assert_allclose(found[:, -pooled.shape[1] :], pooled, atol=1e-5)
  np.testing.assert_allclose(eight("eval", output=readout).features, found, atol=1e-5)
  for augment in ("none", "published"):
    evaluator = dataclasses.replace(SMALL, readout="cls", layers=2, epochs=3, augment=augment)
    assert evaluator(one) == evaluator(eight, mesh=eight._run.mesh)


def test_without_labels_there_is_no_number_and_the_protocol_says_why():
  report = SMALL(lambda split, **kwargs: dataclasses.replace(planted(split, **kwargs), labels=None))
  assert report.metrics == {} and "no labels" in report.protocol


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: LinearSGD(lr=(0.1, 0.0)), "config.evals.linear_sgd.lr="),
    (lambda: LinearSGD(lr=(0.1, 0.1)), "each rate and each weight decay once"),
    (lambda: LinearSGD(weight_decay=(-1.0,)), "config.evals.linear_sgd.weight_decay="),
    (lambda: LinearSGD(epochs=-1), "config.evals.linear_sgd.epochs=-1"),
    (lambda: LinearSGD(batch_size=-1), "config.evals.linear_sgd.batch_size=-1"),
    (lambda: LinearSGD(stages=()), "config.evals.linear_sgd.stages"),
    (lambda: SMALL(lambda split, **kw: _bad(planted(split, **kw))), "'pooled' is not finite for 1 of 60 images"),
    (lambda: dataclasses.replace(SMALL, lr=(1e40,))(planted), "every head diverged"),
  ],
)
def test_user_mistakes_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()


def _bad(features):
  features.features[3] = np.nan
  return features


def test_it_is_found_by_name_and_built_from_a_config():
  fields = {"name": "linear_sgd", "preset": "swav", "lr": [0.3], "readout": "cls"}
  made = build_named("evals", fields, Evaluator, path="config.evals.linear_sgd")
  assert made == LinearSGD(preset="swav", lr=(0.3,), readout="cls")
  for field, value in (("augment", "crop"), ("report", "first")):
    with pytest.raises(UserError, match=f"config.evals.linear_sgd.{field}='{value}'"):
      build_named("evals", fields | {field: value}, Evaluator, path="config.evals.linear_sgd")
