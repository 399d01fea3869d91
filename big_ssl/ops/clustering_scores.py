"""Numbers about clusterings, on the host: how two of them agree, how a single one is spread."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np


def normalized_mutual_information(
  first: np.ndarray, second: np.ndarray, *, average: Literal["geometric", "arithmetic"] = "geometric"
) -> float:
  """NMI(A; B) = I(A; B) / mean(H(A), H(B)), between 0 (independent) and 1 (equal up to names).

  The geometric mean is DeepCluster's (arXiv 1807.05520, section 4), the arithmetic one is the other common choice. Two
  clusterings of which one has a single cluster agree by 1 where both have, else by 0.

  Args:
    first, second: [N] integers; rows with a negative entry in either (no assignment) do not count.

  Raises:
    ValueError: the lengths differ, or no row counts.
  """
  table = _count(first, second)
  count = int(table.joint.sum())
  entropy_a, entropy_b = _entropy(table.first), _entropy(table.second)
  if min(len(table.first), len(table.second)) == 1:
    return float(len(table.first) == len(table.second))
  independent = table.first[table.rows] * (table.second[table.columns] / count)
  information = float(np.sum(table.joint / count * np.log(table.joint / independent)))
  mean = math.sqrt(entropy_a * entropy_b) if average == "geometric" else (entropy_a + entropy_b) / 2
  return float(np.clip(information / mean, 0.0, 1.0))


def adjusted_rand_index(first: np.ndarray, second: np.ndarray) -> float:
  """ARI (Hubert and Arabie, 1985): pairs in one cluster of both, less their number by chance; 1 equal, 0 by chance.

  Args:
    first, second: [N] integers; rows with a negative entry in either (no assignment) do not count.

  Raises:
    ValueError: the lengths differ, or no row counts.
  """
  table = _count(first, second)
  pairs = lambda sizes: float(np.sum(sizes.astype(np.float64) * (sizes - 1.0) / 2))
  both, in_first, in_second = pairs(table.joint), pairs(table.first), pairs(table.second)
  total = pairs(table.joint.sum())
  chance = in_first * in_second / total if total else 0.0
  most = (in_first + in_second) / 2
  # All pairs together in both, or none in either: the same clustering.
  return 1.0 if most == chance else (both - chance) / (most - chance)


def matched_accuracy(assignments: np.ndarray, *, labels: np.ndarray) -> float:
  """Percent of rows whose cluster is matched to their class, by the best one-to-one matching (Hungarian algorithm).

  With more clusters than classes the rows of the clusters left over are wrong (arXiv 2005.12320, section 3).

  Args:
    assignments, labels: [N] integers; rows with a negative entry in either do not count.

  Raises:
    ValueError: the lengths differ, or no row counts.
  """
  from scipy.optimize import linear_sum_assignment  # slow to load

  table = _count(assignments, labels)
  cells = np.zeros((len(table.first), len(table.second)), np.int64)
  cells[table.rows, table.columns] = table.joint
  return 100.0 * float(cells[linear_sum_assignment(cells, maximize=True)].sum() / table.joint.sum())


def size_entropy(counts: np.ndarray) -> float:
  """Entropy of the cluster sizes [K] over ln K: 1 when all are alike, 0 when one holds everything."""
  return _entropy(np.asarray(counts)) / math.log(max(len(counts), 2))


def _entropy(counts: np.ndarray) -> float:
  p = counts[counts > 0] / max(counts.sum(), 1)
  return float(-np.sum(p * np.log(p)))


@dataclasses.dataclass(frozen=True)
class _Table:
  """Sizes of the clusters of both, and of every pair that occurs: of rows[i] and columns[i] there are joint[i]."""

  first: np.ndarray
  second: np.ndarray
  rows: np.ndarray
  columns: np.ndarray
  joint: np.ndarray


def _count(first: np.ndarray, second: np.ndarray) -> _Table:
  first, second = np.asarray(first), np.asarray(second)
  if first.shape != second.shape:
    raise ValueError(f"two clusterings of {first.shape} and {second.shape} rows")
  both = (first >= 0) & (second >= 0)
  if not both.any():
    raise ValueError("no row has an assignment in both clusterings")
  _, a, sizes_a = np.unique(first[both], return_inverse=True, return_counts=True)
  _, b, sizes_b = np.unique(second[both], return_inverse=True, return_counts=True)
  # Only the pairs that occur: the table of N images holds at most N of the Ka * Kb cells.
  cells, joint = np.unique(a.astype(np.int64) * len(sizes_b) + b, return_counts=True)
  return _Table(sizes_a, sizes_b, cells // len(sizes_b), cells % len(sizes_b), joint)
