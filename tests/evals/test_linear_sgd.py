"""Linear probes by SGD: sweeps, layers and presets on planted features, and readouts of a real run."""

import dataclasses

import engine
import jax
import numpy as np
import pytest

from big_ssl import setup
from big_ssl.core.config import build_named
from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Features
from big_ssl.evals.linear_sgd import LinearSGD, constants
from big_ssl.evaluate import Extractor
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
    *("preset dino", "momentum 0.9", "batch 9", "15 epochs", "cosine epochs", "* 9/256", "2 heads", "every tenth"),
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


def extractor(devices):
  run = setup.make_run(engine.small("dino"), devices=jax.devices()[:devices])
  extract = Extractor(run)
  extract.state = run.initial_state()
  return extract


def test_a_run_is_read_by_functions_of_its_backbone_and_reports_are_equal_on_one_and_eight_devices():
  one, eight = extractor(1), extractor(8)
  readout = Readout(kind="cls", layers=2)
  found, pooled = one("eval", output=readout).features, one("eval").features
  np.testing.assert_allclose(found[:, -pooled.shape[1] :], pooled, atol=1e-5)
  np.testing.assert_allclose(eight("eval", output=readout).features, found, atol=1e-5)
  evaluator = dataclasses.replace(SMALL, readout="cls", layers=2, epochs=3)
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
