"""Support vector machines: the recorded optimum, liblinear's, and what the problems must not depend on."""

import numpy as np
import pytest
import sklearn.model_selection
import sklearn.svm

from big_ssl.ops import average_precision, svm


def planted(count=120, dims=10, classes=4, seed=0):
  rng = np.random.default_rng(seed)
  x = svm.normalize(rng.normal(size=(count, dims)) + 0.5)
  return x, x[:, :classes] + 0.3 * rng.normal(size=(count, classes)) > 0.2


def test_weights_decisions_and_average_precision_match_the_reference(golden):
  z = golden("ssl_benchmark_svm")
  train, test = svm.normalize(z["train_features"]), svm.normalize(z["test_features"])
  np.testing.assert_allclose(train, z["normalized_train"], atol=1e-6)
  present = z["train_targets"] == 1  # ignored images are negatives in the published training
  found = svm.fit(train, present=present, cost=svm.costs(present, c=float(z["C"])))
  np.testing.assert_allclose(found.weights.T, z["weights"], atol=1e-4)
  np.testing.assert_allclose(found.intercepts, z["intercepts"], atol=1e-4)
  np.testing.assert_allclose(found.objective, z["objective"], rtol=1e-6)
  scores = found.decide(test)
  np.testing.assert_allclose(scores, z["test_decision"], atol=1e-4)
  known = z["test_targets"] >= 0
  each = [
    average_precision.interpolated(scores[r, k], relevant=z["test_targets"][r, k] == 1) for k, r in enumerate(known.T)
  ]
  np.testing.assert_allclose(each, z["average_precision"], atol=1e-6)
  assert np.mean(each) == pytest.approx(float(z["mean_ap"]), abs=1e-6)


@pytest.mark.parametrize(("dims", "count"), [(10, 120), (90, 40)])
@pytest.mark.parametrize("c", [0.01, 1.0, 1000.0])
def test_the_minimum_is_that_of_liblinear_also_with_more_dimensions_than_rows(dims, count, c):
  linear = sklearn.svm.LinearSVC
  x, present = planted(count, dims)
  found = svm.fit(x, present=present, cost=svm.costs(present, c=c))
  assert np.all(found.gradient <= 1e-8)
  for k in range(present.shape[1]):
    other = linear(C=c, class_weight={1: 2, 0: 1}, tol=1e-12, max_iter=100_000, dual=False).fit(x, present[:, k])
    scale = np.abs(other.coef_).max()
    np.testing.assert_allclose(found.weights[:, k], other.coef_[0], atol=1e-5 * scale)
    np.testing.assert_allclose(found.intercepts[k], other.intercept_[0], atol=1e-5 * scale)


def test_a_row_of_no_cost_is_not_there_and_problems_do_not_touch_each_other():
  x, present = planted()
  cost = svm.costs(present, c=5.0)
  cost[::3, 0] = 0
  both = svm.fit(x, present=present, cost=cost)
  kept = np.arange(len(x)) % 3 > 0
  alone = svm.fit(x[kept], present=present[kept, :1], cost=svm.costs(present[kept, :1], c=5.0))
  np.testing.assert_allclose(both.weights[:, 0], alone.weights[:, 0], atol=1e-6)
  assert not np.allclose(both.weights[:, 0], svm.fit(x, present=present, cost=svm.costs(present, c=5.0)).weights[:, 0])


def test_a_start_changes_the_way_and_not_the_end():
  x, present = planted()
  cold = svm.fit(x, present=present, cost=svm.costs(present, c=100.0))
  start = svm.fit(x, present=~present, cost=svm.costs(present, c=0.1))
  warm = svm.fit(x, present=present, cost=svm.costs(present, c=100.0), start=start)
  np.testing.assert_allclose(warm.weights, cold.weights, atol=1e-5)


def test_c_may_differ_from_problem_to_problem():
  x, present = planted()
  several = svm.fit(x, present=present, cost=svm.costs(present, c=np.array([0.1, 1.0, 10.0, 100.0])))
  for k, c in enumerate((0.1, 1.0, 10.0, 100.0)):
    one = svm.fit(x, present=present[:, k : k + 1], cost=svm.costs(present[:, k : k + 1], c=c))
    np.testing.assert_allclose(several.weights[:, k], one.weights[:, 0], atol=1e-5)


def test_folds_are_those_of_scikit_learn():
  folds_of = sklearn.model_selection.StratifiedKFold
  rng = np.random.default_rng(1)
  for count in (7, 10, 23, 50):
    present = rng.random((count, 5)) < 0.4
    present[:3], present[3:6] = True, False
    found = svm.stratified_folds(present, folds=3)
    for k in range(5):
      for i, (_, held_out) in enumerate(folds_of(3).split(present, present[:, k])):
        np.testing.assert_array_equal(np.flatnonzero(found[:, k] == i), held_out)


def test_folds_of_the_used_rows_are_those_of_the_rows_alone():
  present, used = planted()[1][:, :1], np.arange(120)[:, None] % 4 > 0
  found = svm.stratified_folds(present, folds=3, used=used)
  assert np.all(found[~used] == -1)
  np.testing.assert_array_equal(found[used], svm.stratified_folds(present[used[:, 0]], folds=3)[:, 0])


@pytest.mark.parametrize("size", [1e-20, 1e-14, 1e-8])
def test_features_next_to_zero_of_kinds_that_weigh_the_same_have_a_minimum_too(size):
  x = svm.normalize((size * np.random.default_rng(0).normal(size=(30, 6))).astype(np.float32))
  present = np.arange(30)[:, None] % 3 == np.arange(3)  # a third, which weighs twice
  found = svm.fit(x, present=present, cost=svm.costs(present, c=10.0))
  np.testing.assert_allclose(found.objective, 400.0, rtol=1e-3)  # hardly below the hinge of 1 of every row
  assert np.abs(found.intercepts).max() < 0.01
