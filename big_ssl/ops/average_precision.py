"""Average precision of one class, by the definitions that differ from paper to paper."""

from __future__ import annotations

import dataclasses

import numpy as np


def interpolated(scores: np.ndarray, *, relevant: np.ndarray) -> float:
  """Area under the monotone precision-recall curve, all points (VOC from 2010; arXiv 1905.01235, public code).

  The precision at a recall is the largest one at that recall or above. Of equal scores the first row ranks first.

  Args:
    scores: [N], higher first.
    relevant: [N] bool.

  Returns:
    A share; NaN without a relevant row.

  Raises:
    ValueError: a score that is not a number.
  """
  found = _ranked(scores, relevant).found
  if not found.any():
    return float("nan")
  precision = np.cumsum(found) / np.arange(1, len(found) + 1)
  best = np.maximum.accumulate(precision[::-1])[::-1]
  return float(np.mean(best[found]))


def step(scores: np.ndarray, *, relevant: np.ndarray) -> float:
  """Sum of precision times the rise of recall, without interpolation; equal scores are one threshold (scikit-learn).

  Args, Returns and Raises as `interpolated`.
  """
  ranked = _ranked(scores, relevant)
  if not ranked.found.any():
    return float("nan")
  ends = np.append(np.flatnonzero(np.diff(ranked.scores)), len(ranked.scores) - 1)
  hits = np.cumsum(ranked.found)[ends]
  return float(np.sum(np.diff(hits, prepend=0) * hits / (ends + 1)) / hits[-1])


def step_against_ties(scores: np.ndarray, *, relevant: np.ndarray, margin: float = 1e-5) -> float:
  """`step` with `margin` taken from the relevant scores, so that ties count against the model.

  VOC 2007 classification of DeepCluster (arXiv 1807.05520, public code); Args, Returns and Raises as `interpolated`.
  """
  return step(np.asarray(scores, np.float64) - margin * np.asarray(relevant, bool), relevant=relevant)


@dataclasses.dataclass(frozen=True)
class _Ranked:
  """scores [N] in descending order, and found [N] bool in that order."""

  scores: np.ndarray
  found: np.ndarray


def _ranked(scores: np.ndarray, relevant: np.ndarray) -> _Ranked:
  if np.isnan(scores).any():
    raise ValueError("average precision of scores that are not numbers")
  order = np.argsort(-np.asarray(scores), kind="stable")
  return _Ranked(np.asarray(scores)[order], np.asarray(relevant, bool)[order])
