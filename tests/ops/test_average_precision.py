"""Average precision: the recorded figures, and the definitions where they differ."""

import numpy as np
import pytest
from sklearn import metrics

from big_ssl.ops import average_precision as ap


def test_voc_classification_of_deepcluster_matches_the_reference(golden):
  z = golden("deepcluster_voc_ap")
  found = []
  for labels, scores in zip(z["labels"].T, z["scores"].T, strict=True):
    known = labels != 255
    found.append(ap.step_against_ties(scores[known], relevant=labels[known] == 1))
  np.testing.assert_allclose(found, z["AP"], atol=1e-6)
  assert np.mean(found) == pytest.approx(float(z["mAP"]), abs=1e-6)


def test_the_definitions_on_a_ranking_by_hand():
  scores, relevant = np.array([5.0, 4, 3, 2, 1]), np.array([0, 1, 0, 1, 1], bool)
  assert ap.step(scores, relevant=relevant) == pytest.approx((1 / 2 + 2 / 4 + 3 / 5) / 3)
  assert ap.interpolated(scores, relevant=relevant) == pytest.approx(3 / 5)  # precision never falls behind rank 2


def test_ties_share_a_threshold_go_by_row_or_count_against_the_model():
  scores, relevant = np.zeros(4), np.array([1, 0, 0, 1], bool)
  assert ap.step(scores, relevant=relevant) == 0.5
  assert ap.interpolated(scores, relevant=relevant) == pytest.approx((1 + 2 / 4) / 2)
  assert ap.step_against_ties(scores, relevant=relevant) == 0.5
  one = np.array([1, 0, 0, 0], bool)
  assert ap.step_against_ties(scores, relevant=one) == 0.25 and ap.interpolated(scores, relevant=one) == 1


@pytest.mark.parametrize("of", [ap.step, ap.interpolated, ap.step_against_ties])
def test_nothing_relevant_is_no_number_and_scores_that_are_none_are_refused(of):
  assert np.isnan(of(np.arange(3.0), relevant=np.zeros(3, bool)))
  with pytest.raises(ValueError, match="not numbers"):
    of(np.array([1.0, np.nan]), relevant=np.ones(2, bool))


def test_the_step_function_is_that_of_scikit_learn():
  rng = np.random.default_rng(0)
  for count in (1, 7, 60):
    scores, relevant = rng.integers(0, 9, count) / 4, rng.random(count) < 0.4
    relevant[0] = True
    expected = metrics.average_precision_score(relevant, scores)
    assert ap.step(scores, relevant=relevant) == pytest.approx(expected, abs=1e-12)
