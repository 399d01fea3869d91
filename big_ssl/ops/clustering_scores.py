"""Numbers about clusterings, on the host: how two of them agree, how a single one is spread."""

from __future__ import annotations

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
  count = len(a)
  entropy_a, entropy_b = _entropy(sizes_a), _entropy(sizes_b)
  if min(len(sizes_a), len(sizes_b)) == 1:
    return float(len(sizes_a) == len(sizes_b))
  independent = sizes_a[cells // len(sizes_b)] * (sizes_b[cells % len(sizes_b)] / count)
  information = float(np.sum(joint / count * np.log(joint / independent)))
  mean = math.sqrt(entropy_a * entropy_b) if average == "geometric" else (entropy_a + entropy_b) / 2
  return float(np.clip(information / mean, 0.0, 1.0))


def size_entropy(counts: np.ndarray) -> float:
  """Entropy of the cluster sizes [K] over ln K: 1 when all are alike, 0 when one holds everything."""
  return _entropy(np.asarray(counts)) / math.log(max(len(counts), 2))


def _entropy(counts: np.ndarray) -> float:
  p = counts[counts > 0] / max(counts.sum(), 1)
  return float(-np.sum(p * np.log(p)))
