"""Evaluators on labels as data have them: cyclic, sorted, with gaps, of unequal classes, one image in all."""

import dataclasses

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.evals.base import Features, part_tenth
from big_ssl.evals.linear import LinearProbe
from big_ssl.evals.linear_sgd import LinearSGD
from big_ssl.evals.lowshot import LowShot, fit_logistic, preprocess
from big_ssl.evals.svm import Svm


class Images:
  extras: dict = {}


class Planted:
  """Ten classes around axes: `labels` of the training images, 0, ..., 9, 0, ... of the held-out ones, all + `first`."""

  def __init__(self, labels=None, *, noise=0.05, first=0):
    self.labels = {"train": np.arange(100) % 10 if labels is None else np.array(labels), "eval": np.arange(40) % 10}
    self.noise, self.first = noise, first

  def images(self, split):
    return Images()

  def __call__(self, split, *, output="pooled", weights="current"):
    labels, rng = self.labels[split], np.random.default_rng(split == "train")
    x = np.eye(10)[labels] + self.noise * rng.normal(size=(len(labels), 10))
    return Features(x.astype(np.float32), (labels + self.first).astype(np.int32), np.arange(len(labels)), source="axes")


@pytest.mark.parametrize("labels", [np.arange(200) % 10, np.arange(200) // 20, np.arange(200) % 10 * 7 - 3])
def test_a_tenth_is_that_of_every_class_however_the_rows_are_ordered(labels):
  part = part_tenth(labels)
  classes, counts = np.unique(labels[part.judge], return_counts=True)
  np.testing.assert_array_equal(classes, np.unique(labels))
  assert set(counts) == {2} and not np.any(part.fit & part.judge) and np.all(part.fit | part.judge)
  np.testing.assert_array_equal(part_tenth(labels).judge, part.judge)  # the same on every process


@pytest.mark.parametrize(
  ("labels", "count"), [([3, 3], 1), ([0, 5, 5, 9], 1), ([*range(9), 8, 8], 1), ([0] * 7 + [1] * 33, 4)]
)
def test_few_images_leave_one_to_choose_by_and_every_class_to_fit_on(labels, count):
  labels = np.array(labels)
  part = part_tenth(labels)
  assert part.judge.sum() == count and set(labels[part.fit]) == set(labels), part


def test_classes_of_one_image_each_are_fitted_and_judged_by_these_images_and_this_is_said():
  part = part_tenth(np.arange(30))
  assert part.fit.all() and part.judge.all() and "themselves" in part.words
  extract = Planted(np.arange(10))
  small = LinearSGD(readout="output", epochs=15, lr=(30.0,), batch_size=5)
  for report in (LinearProbe()(extract), small(extract)):
    assert report.metrics["top1"] == 100 and part.words in report.protocol, report


def test_cyclic_labels_train_every_class_and_choose_the_penalty_by_all_of_them():
  report = LinearSGD(readout="output", epochs=15, batch_size=9, lr=(3.0,))(Planted())
  assert report.metrics["top1"] == 100 and "trained on 90 of 100 training images" in report.protocol, report

  def hidden(split, **kwargs):
    """The axes under a disturbance that is also given alone: a strong penalty cannot take the difference."""
    f, shared = Planted()(split), np.random.default_rng([5, split == "train"]).normal(size=(100, 10))
    shared = shared[: len(f.labels)]
    return dataclasses.replace(f, features=np.append(f.features + shared, shared, axis=1), shape=())

  assert LinearProbe(l2=(1e4,))(hidden).metrics["top1"] < 50
  chosen = LinearProbe(l2=(1e4, 0.01))(hidden)
  assert chosen.metrics["top1"] == 100, chosen
  assert "lambda=0.01 of (10000.0, 0.01) by a tenth of the training images, drawn class by class" in chosen.protocol


@pytest.mark.parametrize("evaluator", [LinearProbe(), LinearSGD(readout="output")])
def test_one_labeled_training_image_is_a_clear_error(evaluator):
  with pytest.raises(UserError, match=r"config.evals.linear(_sgd)?: the data has one labeled training image"):
    evaluator(Planted([4]))


@pytest.mark.parametrize(
  "evaluator", [LowShot(images_per_class=(0, 2), splits=1), Svm(c=(0.1, 1.0), shots=1, samples=1)]
)
def test_labels_with_a_gap_score_as_those_without(evaluator):
  noisy = {"noise": 0.4}
  expected, gap = evaluator(Planted(**noisy)), evaluator(Planted(**noisy, first=4))
  assert gap.metrics == expected.metrics and 20 < gap.metrics.get("top1_all", gap.metrics.get("top1")) < 100
  few = Planted([*range(10), *range(9)] * 3, first=4)
  with pytest.raises(UserError, match="class 13 of 10 has 3"):
    dataclasses.replace(evaluator, **{"images_per_class" if isinstance(evaluator, LowShot) else "shots": 4})(few)


def test_all_images_of_unequal_classes_are_fitted_once():
  labels = [0] * 20 + [1] * 2 + [*range(2, 9)] * 3  # none of class 9
  extract = Planted(labels, noise=0.5)
  train, held_out = extract("train"), extract("eval")
  fitted = fit_logistic(preprocess(train.features), labels=train.labels, num_classes=10, l2=0.01)
  hits = np.argmax(preprocess(held_out.features) @ fitted.weights, axis=1) == held_out.labels
  report = LowShot(images_per_class=0, l2=0.01)(extract)
  assert report.metrics == {"top1_all": pytest.approx(100 * hits.mean())} and 0.2 < hits.mean() < 1
  for words in ("all 43 labeled training images,", "classes [9] without a training image"):
    assert words in report.protocol, report.protocol
  assert "splits" not in report.protocol
  both = LowShot(images_per_class=(1, 0), splits=2)(Planted())
  assert set(both.metrics) == {"top1_all", "top1_1img", "top1_1img_std"}
  assert "1 images per class, 2 splits of seed 0 and all 100 labeled training images," in both.protocol
  with pytest.raises(UserError, match="images_per_class=-1: expected at least 1, or 0 for all"):
    LowShot(images_per_class=-1)
