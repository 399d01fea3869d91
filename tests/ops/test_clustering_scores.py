"""Scores of clusterings against their definitions over all pairs of clusters, and against hand-made cases."""

import math

import numpy as np
import pytest
from scipy.stats import entropy

from big_ssl.ops.clustering_scores import normalized_mutual_information, size_entropy


def by_definition(first, second, average):
  """I(A; B) = H(A) + H(B) - H(A, B) from the whole table of pairs, empty cells included."""
  table = np.array([[np.sum((first == a) & (second == b)) for b in range(second.max() + 1)] for a in range(first.max() + 1)])
  h_first, h_second = entropy(table.sum(1)), entropy(table.sum(0))
  mean = {"geometric": math.sqrt(h_first * h_second), "arithmetic": (h_first + h_second) / 2}[average]
  return (h_first + h_second - entropy(table.ravel())) / mean


@pytest.mark.parametrize("average", ["geometric", "arithmetic"])
@pytest.mark.parametrize("rows,share", [(200, 0.6), (37, 0.0), (1000, 0.95)])
def test_nmi_is_that_of_the_definition(average, rows, share):
  rng = np.random.default_rng(rows)
  first = rng.integers(0, 7, rows)
  second = np.where(rng.random(rows) < share, first * 2, rng.integers(0, 20, rows))
  found = normalized_mutual_information(first, second, average=average)
  assert found == pytest.approx(by_definition(first, second, average), abs=1e-12)
  assert found == pytest.approx(normalized_mutual_information(second, first, average=average), abs=1e-12)


def test_nmi_of_four_images_is_the_one_computed_by_hand():
  # The table of pairs is [[2, 0], [1, 1]]: I = 1/2 ln 4/3 + 1/4 ln 2/3 + 1/4 ln 2, H(A) = ln 2, H(B) = ln 4 - 3/4 ln 3.
  information = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
  h_first, h_second = math.log(2), math.log(4) - 0.75 * math.log(3)
  first, second = [0, 0, 1, 1], [0, 0, 0, 1]
  geometric = normalized_mutual_information(first, second)
  arithmetic = normalized_mutual_information(first, second, average="arithmetic")
  assert geometric == pytest.approx(information / math.sqrt(h_first * h_second)) == pytest.approx(0.34559, abs=1e-5)
  assert arithmetic == pytest.approx(2 * information / (h_first + h_second)) == pytest.approx(0.34371, abs=1e-5)


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


def test_size_entropy_of_unequal_sizes_is_that_of_the_definition():
  assert size_entropy(np.array([6, 3, 0, 1])) == pytest.approx(entropy([0.6, 0.3, 0.1]) / math.log(4))


def test_size_entropy_is_one_for_equal_sizes_and_zero_for_one_cluster():
  assert size_entropy(np.array([5, 5, 5])) == pytest.approx(1.0)
  assert size_entropy(np.array([9, 0, 0])) == 0.0
