"""Evaluators on planted features: exact scores, protocol lines, and the errors a user can run into."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from big_ssl.core.config import build_named
from big_ssl.core.method import View
from big_ssl.core.types import Interval, UserError
from big_ssl.evals import base
from big_ssl.evals.base import Evaluator, Features
from big_ssl.evals.knn import Knn
from big_ssl.evals.linear import LinearProbe
from big_ssl.evals.lowshot import LowShot, fit_logistic, preprocess

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
KNN, LOGISTIC = np.load(GOLDENS / "dino_knn.npz"), np.load(GOLDENS / "msn_logistic.npz")


def planted(split="train", *, output="pooled", weights="current", count=60, classes=6):
  """Classes are clusters around axes: tight for the current weights, loose in pixels, none for random weights."""
  rng = np.random.default_rng([split == "train", len(output), len(weights)])
  labels = np.arange(count, dtype=np.int32) % classes
  noise = 100.0 if weights == "random" else 0.6 if output == "pixels" else 0.05
  features = np.eye(8)[labels] + noise * rng.normal(size=(count, 8)) + (5 if output == "pixels" else 0)
  return Features(features.astype(np.float32), labels, np.arange(count), source="8 axes")


def without_labels(split, **kwargs):
  return dataclasses.replace(planted(split, **kwargs), labels=None)


def golden(split, *, output="pooled", weights="current"):
  del output, weights
  name = {"train": "train", "eval": "test"}[split]
  return Features(3 * KNN[f"{name}_features"], KNN[f"{name}_labels"], np.arange(len(KNN[f"{name}_labels"])))


@pytest.mark.parametrize("devices", [1, 8])
def test_knn_accuracies_match_the_reference_also_over_devices(devices):
  mesh = jax.make_mesh(
    (devices, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices]
  )
  report = Knn(k=tuple(int(k) for k in KNN["ks"]), temperature=float(KNN["T"]))(golden, mesh=mesh)
  for k in KNN["ks"]:
    assert report.metrics[f"top1_k{k}"] == pytest.approx(float(KNN[f"k{k}/top1"]), abs=1e-4)
    assert report.metrics[f"top5_k{k}"] == pytest.approx(float(KNN[f"k{k}/top5_strict"]), abs=1e-4)


def test_knn_reports_baselines_below_separable_features_and_its_protocol():
  report = Knn(k=5, temperature=0.1, baselines=True)(planted)
  m = report.metrics
  assert (
    m["top1_k5"] == 100 and m["random_init/top1_k5"] < 50 and m["random_init/top1_k5"] < m["raw_pixels/top1_k5"] < 100
  ), m
  for word in ("k=5", "T=0.1", "'pooled'", "8 dimensions", "60 of 60", "60 held-out", "8 axes"):
    assert word in report.protocol, report.protocol


def test_knn_bank_is_cut_to_max_bank_with_all_classes_of_sorted_data():
  def by_class(split, **kwargs):
    f = planted(split, **kwargs, count=600)
    order = np.argsort(f.labels, kind="stable")
    return dataclasses.replace(f, features=f.features[order], labels=f.labels[order])

  report = Knn(k=1, max_bank=60)(by_class)
  assert report.metrics["top1_k1"] == 100 and "60 of 600" in report.protocol


def test_knn_reads_the_named_output_and_temperature_matters():
  asked = []

  def extract(split, **kwargs):
    asked.append(kwargs)
    return planted(split, weights=kwargs["weights"], output="pixels")

  sharp, flat = (Knn(k=30, temperature=t, output="projection")(extract).metrics for t in (0.01, 10.0))
  assert all(kwargs["output"] == "projection" for kwargs in asked) and sharp != flat


@pytest.mark.parametrize("evaluator", [Knn(k=1), LowShot(images_per_class=1)])
def test_without_labels_there_is_no_number_and_the_protocol_says_why(evaluator):
  report = evaluator(without_labels)
  assert report.metrics == {} and "no labels" in report.protocol


@pytest.mark.parametrize("evaluator", [Knn(k=1), LowShot(images_per_class=1)])
def test_images_without_a_label_take_no_part(evaluator):
  def some(split, **kwargs):
    f = planted(split, **kwargs)
    extra = np.full((7, 8), 9.0, np.float32)
    return Features(
      np.concatenate([f.features, extra]), np.concatenate([f.labels, np.full(7, -1, np.int32)]), np.arange(67)
    )

  assert evaluator(some).metrics == evaluator(planted).metrics


@pytest.mark.parametrize("evaluator", [Knn(k=1), LowShot(images_per_class=1)])
def test_diverged_features_are_an_error_that_says_so(evaluator):
  def bad(split, **kwargs):
    f = planted(split, **kwargs)
    f.features[3] = np.nan
    return f

  with pytest.raises(UserError, match="'pooled' is not finite for 1 of 60 images"):
    evaluator(bad)


@pytest.mark.parametrize("i", range(len(LOGISTIC["lambdas"])))
def test_logistic_regression_reaches_the_reference_minimum_and_predictions(i):
  train, test = preprocess(LOGISTIC["train_features"]), preprocess(LOGISTIC["test_features"])
  np.testing.assert_allclose(train, LOGISTIC["train_features_preprocessed"], atol=1e-6)
  np.testing.assert_allclose(test, LOGISTIC["test_features_preprocessed"], atol=1e-6)
  fitted = fit_logistic(train, labels=LOGISTIC["train_labels"], num_classes=8, l2=float(LOGISTIC["lambdas"][i]))
  assert fitted.objective == pytest.approx(float(LOGISTIC[f"lambda{i}/objective"]), rel=1e-6)
  np.testing.assert_allclose(fitted.weights, LOGISTIC[f"lambda{i}/weights"], atol=1e-4)
  np.testing.assert_array_equal(np.argmax(test @ fitted.weights, axis=1), LOGISTIC[f"lambda{i}/test_pred"])
  for split, x in (("train", train), ("test", test)):
    accuracy = np.mean(np.argmax(x @ fitted.weights, axis=1) == LOGISTIC[f"{split}_labels"])
    assert accuracy == pytest.approx(float(LOGISTIC[f"lambda{i}/{split}_accuracy"]), abs=1e-6)


def test_lowshot_separates_planted_classes_better_than_its_baselines():
  report = LowShot(images_per_class=(1, 5), splits=2, baselines=True)(planted)
  m = report.metrics
  assert m["top1_1img"] == 100 and m["top1_5img_std"] == 0, m
  assert m["random_init/top1_5img"] < m["raw_pixels/top1_5img"] < 100, m
  for word in ("1,5 images per class", "2 splits", "lambda=0.00025", "'pooled'", "8 axes"):
    assert word in report.protocol, report.protocol


def test_linear_probe_is_exact_on_separable_features_and_below_on_its_baselines():
  m = LinearProbe(baselines=True)(planted).metrics
  assert m["top1"] == 100 and m["random_init/top1"] < m["raw_pixels/top1"] < 100, m


def test_linear_probe_takes_the_penalty_that_holds_for_unseen_images():
  def noisy(split, **kwargs):
    del kwargs
    rng = np.random.default_rng(split == "train")
    labels = np.arange(400, dtype=np.int32) % 2
    features = np.concatenate([labels[:, None] + 0.8 * rng.normal(size=(400, 1)), rng.normal(size=(400, 180))], axis=1)
    return Features(features.astype(np.float32), labels, np.arange(400))

  weak, strong = (LinearProbe(l2=(l2,))(noisy).metrics["top1"] for l2 in (1e-3, 1e2))
  assert strong > weak + 2
  report = LinearProbe(l2=(1e-3, 1e2))(noisy)
  assert report.metrics["top1"] == strong and "lambda=100 of" in report.protocol


def test_linear_probe_says_where_the_penalty_is_the_largest_or_smallest_that_was_tried():
  protocol = lambda *l2: LinearProbe(l2=l2)(planted).protocol  # all are exact, and the first of them is taken
  assert "(at the edge of these)" in protocol(1.0, 10.0, 100.0) and "(at the edge of these)" in protocol(100.0, 10.0, 1.0)
  assert "edge" not in protocol(10.0, 1.0, 100.0) and "edge" not in protocol(1.0)


def test_linear_probe_counts_a_class_without_a_training_image_as_wrong_and_names_it():
  def without_class_2(split, **kwargs):
    f = planted(split, **kwargs)
    keep = np.flatnonzero(f.labels != 2) if split == "train" else np.arange(len(f.labels))
    return Features(f.features[keep], f.labels[keep], f.index[keep])

  share = np.mean(planted("test").labels == 2)
  report = LinearProbe()(without_class_2)
  assert report.metrics["top1"] == pytest.approx(100 * (1 - share)) and 0 < share < 1
  assert "classes [2] without a training image" in report.protocol


def test_lowshot_is_a_function_of_its_fields_alone():
  def pixels(split, *, output, weights):
    return planted(split, output="pixels")

  evaluator = LowShot(images_per_class=2, splits=2)
  base = evaluator(pixels).metrics
  assert evaluator(pixels).metrics == base
  for change in ({"seed": 1}, {"l2": 10.0}, {"splits": 1}):
    assert dataclasses.replace(evaluator, **change)(pixels).metrics != base, change


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Knn(k=61)(planted), "config.evals.knn.k=61: more neighbors than the 60 images"),
    (lambda: Knn(k=20, max_bank=10)(planted), "k=20: more neighbors than the 10 images"),
    (lambda: Knn(k=0), "config.evals.knn.k=0"),
    (lambda: Knn(temperature=0.0), "config.evals.knn.temperature=0.0"),
    (lambda: Knn(max_bank=-1), "config.evals.knn.max_bank=-1"),
    (lambda: LowShot(images_per_class=11)(planted), "images_per_class=11: class 0 of 6 has 10 training images"),
    (lambda: LowShot(images_per_class=()), "config.evals.lowshot.images_per_class"),
    (lambda: LowShot(l2=0.0), "config.evals.lowshot.l2=0.0"),
    (lambda: LinearProbe(l2=(1.0, 0.0)), "config.evals.linear.l2"),
    (lambda: LowShot(splits=0), "config.evals.lowshot.splits=0"),
    (lambda: fit_logistic(np.eye(3), labels=np.zeros(3, int), num_classes=1, l2=1.0), "one class"),
  ],
)
def test_user_mistakes_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_evaluators_are_found_by_name_and_built_from_a_config():
  knn = build_named("evals", {"name": "knn", "k": [5, 20], "every": "3epochs"}, Evaluator, path="config.evals.knn")
  assert knn == Knn(k=(5, 20), every=Interval(3, "epochs"))
  assert build_named(
    "evals", {"name": "lowshot", "images_per_class": 2}, Evaluator, path="config.evals.lowshot"
  ) == LowShot(images_per_class=2)


@pytest.mark.parametrize("evaluator", [Knn, LinearProbe])
def test_the_protocol_tells_what_raw_pixels_are_where_these_are_scored(evaluator):
  words = "raw_pixels: those of the view, standardized by the training images"
  assert evaluator(baselines=True)(planted).protocol.endswith(words)
  assert "raw_pixels" not in evaluator()(planted).protocol


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"size": 32, "crop": "center"}, "largest center crop, 32x32, bicubic"),
    ({"size": (224, 320), "crop": "center", "center_fraction": 0.875}, "center of images resized to 256 on the shorter side, 224x320, bicubic"),
    ({"size": 16, "crop": "none", "antialias": False}, "whole images, squashed, 16x16, bicubic without antialiasing"),
  ],
)
def test_a_protocol_tells_what_of_an_image_is_seen(fields, words):
  assert base.seen(View(name="image", interpolation="bicubic", **fields)) == words
