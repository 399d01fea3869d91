"""Alignment, uniformity and ranks against their definitions over all pairs, and on features of known spread."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist

from big_ssl.core.health import embedding
from big_ssl.core.types import UserError
from big_ssl.evals import health
from big_ssl.evals.base import Features, unit
from big_ssl.evals.health import FeatureHealth


def features(split="eval", *, output="pooled", weights="current", count=90):
  rng = np.random.default_rng(3)
  x = rng.normal(size=(count, 8)) * np.array([3, 2, 1, 1, 0.5, 0.1, 0.01, 0]) + 0.5
  return Features(x.astype(np.float32), (np.arange(count) % 3).astype(np.int32), np.arange(count), source="8 axes")


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("t", [2.0, 0.5])
def test_uniformity_is_that_of_the_definition_over_all_pairs(chunk, t):
  x = unit(features().features.astype(float))
  expected = math.log(np.mean(np.exp(-t * pdist(x, "sqeuclidean"))))
  assert health.uniformity(x, t=t, chunk=chunk) == pytest.approx(expected, abs=1e-10)


def test_class_alignment_is_the_mean_squared_distance_over_pairs_of_a_class():
  f = features()
  x, labels = unit(f.features.astype(float)), f.labels.copy()
  labels[:5] = -1
  squared = np.concatenate([pdist(x[labels == c], "sqeuclidean") for c in range(3)])
  assert health.class_alignment(x, labels=labels) == pytest.approx(squared.mean(), abs=1e-10)
  with pytest.raises(ValueError, match="no two rows"):
    health.class_alignment(x[:3], labels=np.arange(3))


def test_ranks_are_those_of_the_definitions_also_with_fewer_rows_than_dimensions():
  rng = np.random.default_rng(0)
  for shape in ((40, 6), (5, 30)):
    x = rng.normal(size=shape)
    s = np.linalg.svd(x - x.mean(0), compute_uv=False)
    p = s / s.sum()
    p = p[p > 1e-12]
    values = health.spectrum(x)
    assert health.effective_rank(values) == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-6)
    assert health.participation_ratio(values) == pytest.approx(np.sum(s**2) ** 2 / np.sum(s**4), rel=1e-6)


def test_participation_ratio_is_the_rank_that_training_logs():
  f = features()
  expected = float(embedding(jnp.asarray(f.features))["rank"])
  assert FeatureHealth()(features).metrics["participation_ratio"] == pytest.approx(expected, rel=1e-4)


def test_features_on_k_equal_axes_have_rank_k_and_use_k_dimensions():
  axes = np.concatenate([np.eye(16)[:5], -np.eye(16)[:5]]).astype(np.float32)
  f = Features(np.tile(axes, (4, 1)), None, np.arange(40))
  report = FeatureHealth()(lambda split, **kw: f)
  m = report.metrics
  assert m["effective_rank"] == pytest.approx(5) and m["participation_ratio"] == pytest.approx(5), m
  assert m["used_dimensions"] == 5 and "class_alignment" not in m, m
  assert "no labels" in report.protocol


def test_collapsed_features_have_rank_zero_and_no_uniformity():
  f = Features(np.full((30, 8), 0.3, np.float32), np.zeros(30, np.int32), np.arange(30))
  m = FeatureHealth()(lambda split, **kw: f).metrics
  expected = {"uniformity": 0.0, "effective_rank": 0.0, "participation_ratio": 0.0, "used_dimensions": 0.0}
  assert m == pytest.approx(expected | {"class_alignment": 0.0}, abs=1e-6), m


def test_the_protocol_names_what_was_measured_and_max_images_and_t_have_an_effect():
  report = FeatureHealth()(features)
  for word in ("'pooled'", "8 dimensions", "90 of 90", "t=2", "8 axes", "pairs of a class"):
    assert word in report.protocol, report.protocol
  fewer = FeatureHealth(max_images=30)(features)
  assert "30 of 90" in fewer.protocol and fewer.images == 30 and fewer.metrics["uniformity"] != report.metrics["uniformity"]
  assert FeatureHealth(t=1.0)(features).metrics["uniformity"] > report.metrics["uniformity"]


def test_too_few_images_give_no_number_and_diverged_ones_an_error():
  one = lambda split, **kw: Features(np.ones((1, 4), np.float32), None, np.arange(1))
  report = FeatureHealth()(one)
  assert report.metrics == {} and "1 evaluation images" in report.protocol
  bad = features().features.copy()
  bad[4, 2] = np.inf
  with pytest.raises(UserError, match="'pooled' is not finite for 1 of 90"):
    FeatureHealth()(lambda split, **kw: dataclasses.replace(features(), features=bad))


@pytest.mark.parametrize(("field", "value"), [("max_images", 1), ("max_images", -3), ("t", 0.0)])
def test_impossible_options_are_clear_errors(field, value):
  with pytest.raises(UserError, match=f"config.evals.health.{field}={value}"):
    FeatureHealth(**{field: value})
