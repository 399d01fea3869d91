"""Clustering of planted features: exact scores, what the fields change, and the errors."""

import dataclasses

import jax
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.evals.base import Features
from big_ssl.evals.clustering import Clustering


def planted(split="train", *, output="pooled", weights="current", noise=0.05, count=120):
  """Four classes around axes."""
  rng = np.random.default_rng([split == "train", len(output), len(weights)])
  labels = np.arange(count, dtype=np.int32) % 4
  noise = 100.0 if weights == "random" else 0.6 if output == "pixels" else noise
  features = np.eye(6)[labels] + noise * rng.normal(size=(count, 6))
  return Features(features.astype(np.float32), labels, np.arange(count), source="4 axes")


def test_separate_classes_are_found_exactly_and_baselines_score_less():
  report = Clustering(restarts=8, baselines=True)(planted)
  m = report.metrics
  assert m["nmi"] == pytest.approx(100) and m["ari"] == pytest.approx(100) and m["accuracy"] == 100, m
  assert m["random_init/accuracy"] < 60 and m["random_init/nmi"] < m["raw_pixels/nmi"] < 100, m
  for word in ("K=4", "best of 8", "'pooled'", "6 dimensions", "120 training", "120 held-out images, 4 axes"):
    assert word in report.protocol, report.protocol


def test_more_clusters_than_classes_cost_accuracy_more_than_information():
  m = Clustering(clusters=8, restarts=4)(planted).metrics
  assert m["accuracy"] < 80 and m["nmi"] > 70 and m["ari"] < 90, m


def test_labels_of_the_training_images_only_choose_the_number_of_clusters():
  def shuffled(split, **kwargs):
    f = planted(split, **kwargs)
    return dataclasses.replace(f, labels=np.roll(f.labels, split == "train"))

  assert Clustering()(shuffled).metrics == Clustering()(planted).metrics


def test_scores_are_a_function_of_the_fields_alone():
  loose = lambda split, **kw: planted(split, noise=0.7, **kw)
  base = Clustering(restarts=1, iterations=20)
  first = base(loose).metrics
  assert base(loose).metrics == first
  for change in ({"seed": 5}, {"iterations": 1}, {"clusters": 3}, {"restarts": 12}):
    assert dataclasses.replace(base, **change)(loose).metrics != first, change


def test_scores_do_not_depend_on_the_devices(mesh8):
  loose = lambda split, **kw: planted(split, noise=0.4, count=101, **kw)
  assert len(jax.devices()) == 8
  assert Clustering(restarts=2)(loose, mesh=mesh8).metrics == Clustering(restarts=2)(loose).metrics


def test_without_labels_there_is_no_number_and_the_protocol_says_why():
  report = Clustering()(lambda split, **kw: dataclasses.replace(planted(split, **kw), labels=None))
  assert report.metrics == {} and "no labels" in report.protocol


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Clustering(clusters=1), "config.evals.clustering.clusters=1"),
    (lambda: Clustering(clusters=-2), "config.evals.clustering.clusters=-2"),
    (lambda: Clustering(restarts=0), "config.evals.clustering.restarts=0"),
    (lambda: Clustering(iterations=0), "config.evals.clustering.iterations=0"),
    (lambda: Clustering(clusters=121)(planted), "clusters=121: 121 clusters of 120 training images"),
  ],
)
def test_user_mistakes_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()
