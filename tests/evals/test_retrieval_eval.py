"""Retrieval by class against a loop over queries, on planted features, and the errors."""

import dataclasses

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.evals.base import Features
from big_ssl.evals.retrieval import ClassRetrieval


def planted(split="eval", *, output="pooled", weights="current", noise=0.05):
  assert split == "eval", "training images are not needed"
  rng = np.random.default_rng([len(output), len(weights)])
  labels = np.arange(61, dtype=np.int32) % 6
  labels[60] = 6  # a class of one image
  noise = 100.0 if weights == "random" else 0.4 if output == "pixels" else noise
  features = np.eye(8)[labels] + noise * rng.normal(size=(61, 8))
  return Features(features.astype(np.float32), labels, np.arange(61), source="8 axes")


def by_loop(f, k):
  """mAP (trapezoid) and recall at k, one query at a time."""
  x = f.features.astype(float)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  averages, recalls = [], []
  for q in range(len(x)):
    others = [i for i in sorted(range(len(x)), key=lambda i: -(x[q] @ x[i])) if i != q]
    right = [f.labels[i] == f.labels[q] for i in others]
    if any(right):
      precision = [1.0] + [np.mean(right[: r + 1]) for r in range(len(right))]
      averages.append(np.mean([(precision[r] + precision[r + 1]) / 2 for r in range(len(right)) if right[r]]))
      recalls.append(any(right[:k]))
  return 100 * np.mean(averages), 100 * np.mean(recalls)


@pytest.mark.parametrize("chunk", [7, 256])
def test_scores_are_those_of_a_loop_over_queries(chunk):
  loose = lambda split, **kw: planted(split, noise=0.4)
  m = ClassRetrieval(k=(1, 3), query_chunk=chunk)(loose).metrics
  mean, recall = by_loop(loose("eval"), 3)
  assert m["map"] == pytest.approx(mean, abs=1e-3) and m["recall_at_3"] == pytest.approx(recall), m
  assert m["recall_at_1"] == pytest.approx(by_loop(loose("eval"), 1)[1]) and 20 < m["map"] < 95, m


def test_separate_classes_are_exact_and_baselines_score_less_and_the_protocol_is_told():
  report = ClassRetrieval(k=1, baselines=True)(planted)
  m = report.metrics
  assert m["map"] == pytest.approx(100) and m["recall_at_1"] == 100, m
  assert m["random_init/map"] < m["raw_pixels/map"] < 100, m
  assert report.images == 60
  for word in ("each of 60 held-out images against the other 60", "'pooled'", "8 dimensions", "trapezoidal", "8 axes"):
    assert word in report.protocol, report.protocol


def test_without_labels_or_pairs_there_is_no_number_and_the_protocol_says_why():
  unlabeled = ClassRetrieval()(lambda split, **kw: dataclasses.replace(planted(split, **kw), labels=None))
  alone = ClassRetrieval()(lambda split, **kw: dataclasses.replace(planted(split, **kw), labels=np.arange(61)))
  assert unlabeled.metrics == alone.metrics == {}
  assert "no labels" in unlabeled.protocol and "no class has two" in alone.protocol


@pytest.mark.parametrize(("field", "value"), [("k", 0), ("query_chunk", 0)])
def test_impossible_options_are_clear_errors(field, value):
  with pytest.raises(UserError, match=f"config.evals.retrieval.{field}={value}"):
    ClassRetrieval(**{field: value})
