"""Scores of clusterings against their definitions over all pairs of clusters, and against hand-made cases."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import entropy

from big_ssl.ops.clustering_scores import (
  adjusted_rand_index,
  matched_accuracy,
  normalized_mutual_information,
  size_entropy,
)


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


def test_ari_and_nmi_are_those_of_scikit_learn():
  i = np.arange(60)
  # Values of scikit-learn 1.9.1.
  first, second = i * 7 % 11 % 4, (i // 4 * 3 + i % 5 // 3 * 2) % 6
  assert adjusted_rand_index(first, second) == pytest.approx(-0.04321600234719501, abs=1e-12)
  arithmetic = normalized_mutual_information(first, second, average="arithmetic")
  assert arithmetic == pytest.approx(0.009554014917363556, abs=1e-12)
  assert normalized_mutual_information(first, second) == pytest.approx(0.009554146805638266, abs=1e-12)
  first, second = i % 3, np.where(i % 7 == 0, (i + 1) % 3, i % 3)
  assert adjusted_rand_index(first, second) == pytest.approx(0.604078947368421, abs=1e-12)
  assert normalized_mutual_information(first, second) == pytest.approx(0.6152336068273391, abs=1e-12)


def test_ari_is_one_for_renamed_clusters_and_defined_without_pairs():
  assert adjusted_rand_index([0, 0, 1, 1, 2, -1], [5, 5, 3, 3, 9, 1]) == 1.0
  assert adjusted_rand_index([0, 0, 0], [1, 1, 1]) == 1.0 and adjusted_rand_index([0, 1, 2], [2, 1, 0]) == 1.0
  assert adjusted_rand_index([4], [2]) == 1.0 and adjusted_rand_index([0, 0, 0, 0], [0, 0, 1, 1]) == 0.0


@pytest.mark.parametrize("clusters", [2, 3, 4])
def test_matched_accuracy_is_the_best_over_all_matchings(clusters):
  rng = np.random.default_rng(clusters)
  labels, found = rng.integers(0, 3, 50), rng.integers(0, clusters, 50)
  names = list(range(max(3, clusters)))
  best = max(np.mean(np.array(p)[found] == labels) for p in itertools.permutations(names))
  assert matched_accuracy(found, labels=labels) == pytest.approx(100 * best)
