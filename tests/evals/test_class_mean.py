"""Nearest class mean against a loop over images and classes, on planted features, and without all classes."""

import dataclasses

import numpy as np
import pytest

from big_ssl.evals.base import Features
from big_ssl.evals.class_mean import ClassMean, class_means, nearest_mean


def noisy(split="train", *, output="pooled", weights="current", count=150, scale=6.0):
  """Five overlapping classes with unequal lengths of the features, so that cosine and Euclidean differ."""
  rng = np.random.default_rng([split == "train", len(output), len(weights)])
  labels = rng.integers(0, 5, count).astype(np.int32)
  noise = 100.0 if weights == "random" else 2.5 if output == "pixels" else 0.6
  features = (np.eye(7)[labels] + noise * rng.normal(size=(count, 7))) * rng.uniform(1, scale, (count, 1)) + 0.3
  return Features(features.astype(np.float32), labels, np.arange(count), source="5 axes")


def by_loop(train, test, *, cosine):
  """Percent right, one image and one class at a time."""
  hits = 0
  for x, label in zip(test.features.astype(float), test.labels, strict=True):
    best, chosen = np.inf, None
    for c in sorted(set(train.labels.tolist())):
      members = train.features[train.labels == c].astype(float)
      if cosine:
        mean = sum(m / np.sqrt(m @ m) for m in members) / len(members)
        distance = -(x @ mean) / np.sqrt(mean @ mean) / np.sqrt(x @ x)
      else:
        distance = np.sum((x - sum(members) / len(members)) ** 2)
      if distance < best:
        best, chosen = distance, c
    hits += chosen == label
  return 100 * hits / len(test.labels)


def test_accuracies_are_those_of_a_loop_over_images_and_classes():
  m = ClassMean()(noisy).metrics
  train, test = noisy("train"), noisy("eval")
  assert m["top1_cosine"] == pytest.approx(by_loop(train, test, cosine=True)), m
  assert m["top1_euclidean"] == pytest.approx(by_loop(train, test, cosine=False)), m
  assert m["top1_cosine"] != m["top1_euclidean"]


def test_separable_features_are_exact_and_better_than_baselines_and_the_protocol_is_told():
  report = ClassMean(baselines=True)(noisy)
  m = report.metrics
  assert m["top1_cosine"] > m["raw_pixels/top1_cosine"] > m["random_init/top1_cosine"] - 15, m
  assert m["random_init/top1_cosine"] < 40, m
  for word in ("5 classes", "150 training", "150 held-out", "'pooled'", "7 dimensions", "5 axes", "Euclidean"):
    assert word in report.protocol, report.protocol


def test_a_class_without_a_training_image_is_wrong_and_named():
  def without_class_2(split, **kwargs):
    f = noisy(split, **kwargs)
    exact = dataclasses.replace(f, features=np.eye(7, dtype=np.float32)[f.labels])
    keep = f.labels != 2 if split == "train" else np.full(len(f.labels), True)
    return Features(exact.features[keep], f.labels[keep], f.index[keep])

  report = ClassMean()(without_class_2)
  share = np.mean(noisy("eval").labels == 2)
  assert report.metrics["top1_cosine"] == pytest.approx(100 * (1 - share)) and 0 < share < 1
  assert "classes [2] without a training image" in report.protocol


def test_without_labels_there_is_no_number_and_the_protocol_says_why():
  report = ClassMean()(lambda split, **kw: dataclasses.replace(noisy(split, **kw), labels=None))
  assert report.metrics == {} and "no labels" in report.protocol


def test_nearest_mean_keeps_its_digits_far_from_the_origin_and_over_chunks():
  rng = np.random.default_rng(0)
  means = rng.normal(size=(4, 3))
  x = rng.normal(size=(50, 3))
  near = nearest_mean(x, means=means)
  np.testing.assert_array_equal(near, np.argmin(((x[:, None] - means) ** 2).sum(2), axis=1))
  np.testing.assert_array_equal(nearest_mean(x + 1e6, means=means + 1e6, chunk=7), near)
  np.testing.assert_array_equal(nearest_mean(np.zeros((1, 2)), means=np.array([[1.0, 0], [-1, 0]])), [0])


def test_class_means_are_means():
  x, rows = np.arange(12.0).reshape(4, 3), np.array([1, 0, 1, 1])
  np.testing.assert_allclose(class_means(x, rows=rows), [x[1], x[[0, 2, 3]].mean(0)])
