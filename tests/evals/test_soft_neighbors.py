"""Soft nearest neighbors against the release, over the labels that training may use; and the errors."""

import dataclasses

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.evals.base import Features
from big_ssl.evals.soft_neighbors import SoftNeighbors


def recorded(z):
  def extract(split, *, output="prediction", weights="current"):
    name = {"train": "support", "eval": "query"}[split]
    features, labels = z[f"{name}_embeddings"], z[f"{name}_labels"]
    return Features(features, labels, np.arange(len(labels)), source="the recording")

  return extract


@pytest.mark.parametrize("chunk", [7, 512])
def test_accuracies_and_probabilities_are_the_recorded_ones(golden, chunk):
  z = golden("paws_snn_eval")
  evaluator = SoftNeighbors(temperature=float(z["tau"]), query_chunk=chunk)
  report = evaluator(recorded(z))
  assert report.metrics == {"top1": pytest.approx(float(z["top1"]), abs=1e-4), "top5": pytest.approx(float(z["top5"]), abs=1e-4)}
  probabilities = evaluator.classify(z["query_embeddings"], bank=recorded(z)("train"), classes=int(z["num_classes"]))
  np.testing.assert_allclose(probabilities, z["probs"], atol=1e-5)
  np.testing.assert_array_equal(probabilities.argmax(1), z["pred"])
  for word in ("T=0.1", "'prediction'", "12 dimensions", "60 of 60", "50 held-out", "the recording"):
    assert word in report.protocol, report.protocol


def clusters(split, *, output="prediction", weights="current"):
  """Four classes around axes; of the training images the first 8 have the right label, the others a wrong one."""
  rng = np.random.default_rng([split == "train", len(output), len(weights)])
  true = np.arange(40, dtype=np.int32) % 4
  noise = 100.0 if weights == "random" else 0.6 if output == "pixels" else 0.05
  features = (np.eye(8)[true] + noise * rng.normal(size=(40, 8))).astype(np.float32)
  if split == "eval":
    return Features(features, true, np.arange(40))
  labels = np.where(np.arange(40) < 8, true, (true + 1) % 4).astype(np.int32)
  return Features(features, labels, np.arange(40), used_in_training=np.arange(40) < 8)


def test_only_labels_that_training_may_use_are_used():
  report = SoftNeighbors()(clusters)
  assert report.metrics == {"top1": 100.0} and "labels of 8 of 40" in report.protocol
  everything = lambda split, **kw: dataclasses.replace(clusters(split, **kw), used_in_training=None)
  assert SoftNeighbors()(everything).metrics["top1"] < 1


def test_baselines_are_below_separable_features():
  m = SoftNeighbors(baselines=True)(clusters).metrics
  assert m["top1"] == 100 and m["random_init/top1"] < 60, m
  assert "raw_pixels/top1" in m


def test_data_without_labels_gives_no_number():
  report = SoftNeighbors()(lambda split, **kw: dataclasses.replace(clusters(split, **kw), labels=None))
  assert report.metrics == {} and "no labels" in report.protocol


@pytest.mark.parametrize("field,value", [("temperature", 0.0), ("query_chunk", 0)])
def test_impossible_options_are_clear_errors(field, value):
  with pytest.raises(UserError, match=f"config.evals.soft_neighbors.{field}={value}"):
    SoftNeighbors(**{field: value})
