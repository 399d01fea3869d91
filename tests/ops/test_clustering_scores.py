"""Scores of clusterings against hand-made cases and scikit-learn."""

import numpy as np
import pytest

from big_ssl.ops.clustering_scores import normalized_mutual_information, size_entropy


@pytest.mark.parametrize("average", ["geometric", "arithmetic"])
def test_nmi_is_scikit_learns(average):
  metrics = pytest.importorskip("sklearn.metrics")
  rng = np.random.default_rng(0)
  first = rng.integers(0, 7, 200)
  second = np.where(rng.random(200) < 0.6, first * 2, rng.integers(0, 20, 200))
  wanted = metrics.normalized_mutual_info_score(first, second, average_method=average)
  assert normalized_mutual_information(first, second, average=average) == pytest.approx(wanted, abs=1e-12)


def test_nmi_is_one_for_renamed_clusters_and_ignores_rows_without_assignment():
  first = np.array([0, 0, 1, 1, 2, -100, 3])
  second = np.array([5, 5, 3, 3, 9, 4, -100])
  assert normalized_mutual_information(first, second) == pytest.approx(1.0)


def test_nmi_is_zero_for_independent_and_defined_for_single_clusters():
  assert normalized_mutual_information([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0.0, abs=1e-12)
  assert normalized_mutual_information([4, 4], [2, 2]) == 1.0
  assert normalized_mutual_information([4, 4], [2, 3]) == 0.0


def test_impossible_comparisons_are_errors():
  with pytest.raises(ValueError, match="no row"):
    normalized_mutual_information([-100, 1], [1, -100])
  with pytest.raises(ValueError, match="rows"):
    normalized_mutual_information([1, 2], [1])


def test_size_entropy_is_one_for_equal_sizes_and_zero_for_one_cluster():
  assert size_entropy(np.array([5, 5, 5])) == pytest.approx(1.0)
  assert size_entropy(np.array([9, 0, 0])) == 0.0
