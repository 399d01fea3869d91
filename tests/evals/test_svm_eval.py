"""The SVM evaluator: targets of one or several classes, the choice of C, low-shot draws, and missing annotations."""

import dataclasses

import numpy as np
import pytest
from sklearn import metrics
from sklearn import model_selection as selection
from sklearn.svm import LinearSVC

from big_ssl.core.config import build_named
from big_ssl.core.types import UserError
from big_ssl.evals import svm
from big_ssl.evals.base import Evaluator, Features
from big_ssl.evals.svm import Svm
from big_ssl.ops import average_precision
from big_ssl.ops import svm as machines

ONE = Svm(c=(1.0,))


@dataclasses.dataclass
class Source:
  extras: dict


class Planted:
  """Extracts features of images that show one or several of four classes."""

  def __init__(self, *, multi=False, noise=0.3, count=60, stages=None):
    self.multi, self.noise, self.count, self.stages = multi, noise, count, stages or {}

  def targets(self, split):
    rng = np.random.default_rng([7, split == "train"])
    present = (rng.random((self.count, 4)) < 0.35).astype(np.int8)
    present[:8] = np.tile(np.eye(4), (2, 1))
    present[rng.random((self.count, 4)) < 0.1] = -1
    return present

  def images(self, split):
    return Source({"labels_multi": self.targets(split)} if self.multi else {})

  def __call__(self, split, *, output="pooled", weights="current"):
    rng = np.random.default_rng([split == "train", len(weights)])
    labels = np.arange(self.count, dtype=np.int32) % 4
    shown = np.abs(self.targets(split)) if self.multi else np.eye(4)[labels]
    noise = 50.0 if weights == "random" else 0.8 if output == "pixels" else self.stages.get(str(output), self.noise)
    x = np.concatenate([shown, np.zeros((self.count, 3))], axis=1) + noise * rng.normal(size=(self.count, 7))
    return Features(x.astype(np.float32), None if self.multi else labels, np.arange(self.count), source="4 axes")


def test_planted_classes_are_separated_better_than_the_baselines_and_the_protocol_says_how():
  report = Svm(c=(0.1, 10.0), baselines=True)(Planted(noise=0.1))
  m = report.metrics
  assert m["map"] == m["top1"] == 100 and m["random_init/map"] < m["raw_pixels/map"] < 100, m
  for word in (
    *("x / (norm + 1e-5)", "squared hinge", "C of 0.1, 10 per class by 3-fold", "monotone", "'pooled' (7 dimensions)"),
    *("60 training and 60 held-out", "4 axes"),
  ):
    assert word in report.protocol, (word, report.protocol)


def test_several_classes_per_image_ignored_ones_are_negatives_in_training_and_absent_from_the_test():
  extract = Planted(multi=True)
  train, test = (machines.normalize(extract(s).features) for s in ("train", "eval"))
  targets, known = extract.targets("train"), extract.targets("eval") >= 0
  present = targets == 1

  def expected(used):
    scores = machines.fit(train, present=present, cost=used * machines.costs(present, c=1.0)).decide(test)
    truth = extract.targets("eval") == 1
    return 100 * np.mean(
      [average_precision.interpolated(scores[known[:, k], k], relevant=truth[known[:, k], k]) for k in range(4)]
    )

  report = ONE(extract)
  assert report.metrics == {"map": pytest.approx(expected(np.ones_like(present)), abs=1e-9)}
  dropped = dataclasses.replace(ONE, drop_ignored_in_training=True)(extract)
  assert dropped.metrics["map"] == pytest.approx(expected(targets >= 0), abs=1e-9) != report.metrics["map"]
  assert "-1 negatives in training" in report.protocol and "-1 left out of training" in dropped.protocol


@pytest.mark.parametrize("drop", [False, True])
def test_c_is_that_of_the_best_cross_validated_average_precision(drop):
  linear = LinearSVC
  extract, grid = Planted(multi=True, noise=1.0), (10.0, 0.01, 1.0)
  evaluator = Svm(c=grid, drop_ignored_in_training=drop)
  x, targets = machines.normalize(extract("train").features), extract.targets("train")
  used = targets >= 0 if drop else np.ones(targets.shape, bool)
  found = evaluator._validate(x, targets == 1, used)
  for k in range(4):
    rows = np.flatnonzero(used[:, k])
    for i, c in enumerate(grid):
      model = linear(C=c, class_weight={1: 2, 0: 1}, tol=1e-10, max_iter=100_000, dual=False)
      labels = (targets[rows, k] == 1).astype(int)
      each = [
        metrics.average_precision_score(labels[b], model.fit(x[rows[a]], labels[a]).decision_function(x[rows[b]]))
        for a, b in selection.StratifiedKFold(3).split(rows, labels)
      ]
      assert found[i, k] == pytest.approx(np.mean(each), abs=1e-9), (k, c)


def test_of_several_stages_the_best_in_cross_validation_is_reported_beside_each():
  extract = Planted(stages={"conv1": 3.0, "conv2": 0.3})
  report = Svm(c=(0.1, 1.0), readout="stages", stages=(1, 2))(extract)
  assert report.metrics["map"] == report.metrics["conv2/map"] > report.metrics["conv1/map"]
  assert "'conv2' (of 2, best in cross-validation)" in report.protocol


@pytest.mark.parametrize("multi", [False, True])
def test_low_shot_statistics_are_over_the_samples_and_grow_with_the_images(multi):
  evaluator = dataclasses.replace(ONE, shots=(1, 4), samples=3)
  m = evaluator(Planted(multi=multi)).metrics
  for k in (1, 4):
    mean, low, high = (m[f"map_{k}shot{end}"] for end in ("", "_min", "_max"))
    assert low <= mean <= high and m[f"map_{k}shot_std"] > 0
  assert m["map_1shot"] < m["map_4shot"] < m["map"]
  assert ("top1_4shot" in m) != multi
  assert dataclasses.replace(evaluator, seed=1)(Planted(multi=multi)).metrics["map_1shot"] != m["map_1shot"]
  several = dataclasses.replace(evaluator, shot_c=(1.0, 50.0))(Planted(multi=multi)).metrics
  assert several["map_4shot_c1"] == m["map_4shot"] != several["map_4shot_c50"]


@pytest.mark.parametrize("multi", [False, True])
def test_draws_have_exact_counts_and_are_a_function_of_the_seed(multi):
  (task,) = svm._tasks(Planted(multi=multi), "pooled", baselines=False)
  chosen = svm.draw(task, count=3, seed=(0, 3, 1))
  for k in range(4):
    of_class = task.train_targets[chosen[:, k], k]
    assert np.sum(of_class == 1) == 3 and np.sum(of_class == 0) == 9 and len(of_class) == 12
  np.testing.assert_array_equal(chosen, svm.draw(task, count=3, seed=(0, 3, 1)))
  assert not np.array_equal(chosen, svm.draw(task, count=3, seed=(0, 3, 2)))


def test_without_labels_and_targets_there_is_no_number_and_the_protocol_says_why():
  class Unlabeled(Planted):
    def __call__(self, split, **kwargs):
      return dataclasses.replace(super().__call__(split, **kwargs), labels=None)

  report = ONE(Unlabeled())
  assert report.metrics == {} and "neither labels nor 'labels_multi'" in report.protocol


def test_a_class_without_a_held_out_image_is_left_out_of_the_mean_and_named():
  class Missing(Planted):
    def targets(self, split):
      out = super().targets(split)
      out[:, 2] = out[:, 2] if split == "train" else 0
      return out

  report = ONE(Missing(multi=True))
  assert 0 < report.metrics["map"] <= 100 and "classes [2] without a held-out image" in report.protocol


class OneSplit(Planted):
  def images(self, split):
    return super().images(split) if split == "eval" else Source({})


class Values(Planted):
  def targets(self, split):
    return super().targets(split) * 2


class Diverged(Planted):
  def __call__(self, split, **kwargs):
    found = super().__call__(split, **kwargs)
    found.features[3] = np.nan
    return found


class Rare(Planted):
  def targets(self, split):
    out = super().targets(split)
    out[:, 1] = 0
    out[:2, 1] = 1
    return out


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: ONE(OneSplit(multi=True)), "the train images have no 'labels_multi', the others have"),
    (lambda: ONE(Values(multi=True)), r"'labels_multi' of the train images .* expected \[images, classes\] of 1"),
    (lambda: ONE(Diverged()), "'pooled' is not finite for 1 of 60 images"),
    (lambda: ONE(Diverged(multi=True)), "'pooled' is not finite for 1 of 60 images"),
    (lambda: Svm()(Rare(multi=True)), "class 1 has 2 positive training images, the choice of C in 3 folds needs 3"),
    (
      lambda: dataclasses.replace(ONE, shots=3)(Rare(multi=True)),
      "config.evals.svm.shots=3: class 1 of 4 has 2 positive training images of the 3",
    ),
    (lambda: dataclasses.replace(ONE, shots=16)(Planted()), "shots=16: class 0 of 4 has 15 positive"),
    (lambda: Svm(c=()), "config.evals.svm.c="),
    (lambda: Svm(c=(0.0,)), "config.evals.svm.c="),
    (lambda: Svm(shot_c=-1.0), "config.evals.svm.shot_c=-1.0"),
    (lambda: Svm(shots=(0,)), "config.evals.svm.shots="),
    (lambda: Svm(samples=0), "config.evals.svm.samples=0"),
    (lambda: Svm(stages=()), "config.evals.svm.stages="),
  ],
)
def test_user_mistakes_and_missing_annotations_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_it_is_found_by_name_and_built_from_a_config():
  fields = {"name": "svm", "shots": [1, 2], "c": [1.0], "shot_c": 5.0}
  assert build_named("evals", fields, Evaluator, path="config.evals.svm") == Svm(shots=(1, 2), c=(1.0,), shot_c=5.0)
