"""The order of an epoch in which every cluster is seen alike, on the host."""

from __future__ import annotations

import numpy as np


def quotas(sizes: np.ndarray, *, total: int, max_repeats: int = 0) -> np.ndarray:
  """Draws per cluster before the order is cut to `total`: int(total / non-empty) + 1 of each that has members.

  With `max_repeats`, a cluster gives at most that many draws per member (more only where `total` cannot be reached
  otherwise), and the others make up for it.

  Args:
    sizes: [K] members.
    total: draws that are needed.

  Returns:
    [K] integers whose sum is at least `total`.

  Raises:
    ValueError: no cluster has members.
  """
  sizes = np.asarray(sizes, np.int64)
  filled = np.count_nonzero(sizes)
  if not filled:
    raise ValueError("no image has a cluster")
  limit = sizes * (max(max_repeats, -(-total // sizes.sum())) if max_repeats else total + 1)
  quota = total // filled + 1
  low, high = quota, max(int(limit.max()), quota)
  while low < high:  # the smallest quota that gives enough
    middle = (low + high) // 2
    low, high = (low, middle) if np.minimum(middle, limit).sum() >= total else (middle + 1, high)
  return np.where(sizes > 0, np.minimum(low, limit), 0)


def uniform_over_clusters(
  assignments: np.ndarray, *, rng: np.random.Generator, total: int = 0, max_repeats: int = 0
) -> np.ndarray:
  """Indices of images such that the clusters are equally frequent (arXiv 1807.05520, section 3; public code).

  Each cluster that has members gives `quotas` draws, with replacement where it has no more members than that, else
  without. All are shuffled, then cut to `total`. With `max_repeats`, draws with replacement become whole permutations of
  the members one after another, so that no image comes oftener than allowed (own choice).

  Args:
    assignments: [N] integers; images with a negative one are never drawn.
    rng: of the draws and of the shuffle.
    total: length of the order; 0 is N.
    max_repeats: how often one image may come; 0 is without limit, as published.

  Returns:
    [total] int64.
  """
  assignments = np.asarray(assignments)
  total = total or len(assignments)
  members = np.argsort(assignments, kind="stable")[np.count_nonzero(assignments < 0) :]
  sizes = np.bincount(assignments[members]) if len(members) else np.zeros(1, np.int64)
  draws = quotas(sizes, total=total, max_repeats=max_repeats)
  parts = []
  for group, quota in zip(np.split(members, np.cumsum(sizes)[:-1]), draws, strict=True):
    if len(group) > quota:
      parts.append(rng.choice(group, quota, replace=False))
    elif len(group) and max_repeats:
      parts.append(np.concatenate([rng.permutation(group) for _ in range(-(-quota // len(group)))])[:quota])
    elif len(group):
      parts.append(rng.choice(group, quota))
  return rng.permutation(np.concatenate(parts))[:total]
