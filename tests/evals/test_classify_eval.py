"""The accuracy of a run's own classifier, on planted logits."""

import dataclasses

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.evals.base import Features
from big_ssl.evals.classify import Classify


def planted(classes=8, *, labels=None):
  rng = np.random.default_rng(0)
  labels = np.arange(200, dtype=np.int32) % classes if labels is None else labels
  logits = rng.normal(size=(200, classes)).astype(np.float32)
  logits[np.arange(200), np.maximum(labels, 0)] += 1.5

  def extract(split, *, output="pooled", weights="current"):
    assert (split, output, weights) == ("eval", "logits", "current")
    return Features(logits, labels, np.arange(200), source="planted")

  return extract, logits, labels


def test_top_1_and_top_5_are_those_of_a_sort_and_the_protocol_is_told():
  extract, logits, labels = planted()
  report = Classify()(extract)
  order = np.argsort(-logits, axis=1, kind="stable")
  m = report.metrics
  assert m["top1"] == pytest.approx(100 * np.mean(order[:, 0] == labels)) and 30 < m["top1"] < 90
  assert m["top5"] == pytest.approx(100 * np.mean(np.any(order[:, :5] == labels[:, None], axis=1)))
  assert m["top1_low"] < m["top1"] < m["top1_high"] and "top1_masked" not in m
  for word in ("own classifier of 8 classes", "'logits'", "200 of 200", "Wilson", "planted"):
    assert word in report.protocol
  assert "top5" not in Classify()(planted(classes=4)[0]).metrics


def test_of_equal_logits_the_first_class_counts():
  flat = lambda split, **kw: Features(np.zeros((16, 8), np.float32), np.arange(16, dtype=np.int32) % 8, np.arange(16))
  m = Classify()(flat).metrics
  assert (m["top1"], m["top5"]) == (12.5, 62.5)


def test_mapped_classes_are_masked_and_images_without_one_are_left_out():
  labels = np.arange(200, dtype=np.int32) % 4
  extract, logits, _ = planted(labels=np.array([5, 1, 3, 0], np.int32)[labels])
  relabeled = lambda split, **kw: dataclasses.replace(extract(split, **kw), labels=labels)
  report = Classify(label_map=(5, 1, 3, -1))(relabeled)
  keep = labels < 3
  truth = np.array([5, 1, 3])[labels[keep]]
  assert report.metrics["top1"] == pytest.approx(100 * np.mean(logits[keep].argmax(1) == truth))
  allowed = np.array([1, 3, 5])
  assert report.metrics["top1_masked"] == pytest.approx(100 * np.mean(allowed[logits[keep][:, allowed].argmax(1)] == truth))
  assert report.metrics["top1_masked"] > report.metrics["top1"]
  assert "150 of 200 labeled held-out images of 3 classes, mapped; masked: only the 3" in report.protocol


def test_images_without_a_label_do_not_count_and_without_any_there_is_no_number():
  extract, logits, labels = planted(labels=np.where(np.arange(200) < 50, -1, np.arange(200) % 8).astype(np.int32))
  assert Classify()(extract).metrics["top1"] == pytest.approx(100 * np.mean(logits[50:].argmax(1) == labels[50:]))
  none = lambda split, **kw: dataclasses.replace(extract(split, **kw), labels=None)
  report = Classify()(none)
  assert report.metrics == {} and "not computed: the held-out data has no labels" in report.protocol


def no_classifier(split, **kw):
  raise KeyError("MSN has no output 'logits'; it has cls, pooled")


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: Classify(label_map=(1, -2)), "classify.label_map: -2 is no class"),
    (lambda: Classify(label_map=(1,))(planted()[0]), "label_map: 1 entries, but the held-out images have label 7"),
    (lambda: Classify(label_map=(9,) * 8)(planted()[0]), "held-out label 9, but the head has classes 0 to 7"),
    (lambda: Classify()(no_classifier), "output='logits': MSN has no output 'logits'; it has cls, pooled; only a run with"),
  ],
)
def test_user_mistakes_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()
