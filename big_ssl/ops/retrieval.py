"""Descriptors and scores of image retrieval: GeM, R-MAC, whitening, revisited Oxford/Paris (arXiv 1803.11285)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from big_ssl.ops.whitening import Whitening


def gem(x: np.ndarray, *, power: float = 4.0, floor: float = 1e-6, xp: Any = np) -> np.ndarray:
  """Generalized mean (mean max(x, floor)^p)^(1/p), [N, D], over positions of x [N, positions, D] (arXiv 1711.02512).

  `xp` is numpy or jax.numpy.
  """
  return xp.mean(xp.maximum(x, floor) ** power, axis=1) ** (1 / power)


def l2_normalize(x: np.ndarray, *, epsilon: float = 1e-6) -> np.ndarray:
  """Rows of x [..., D] divided by norm + epsilon, as GeM's released code does it."""
  return x / (np.linalg.norm(x, axis=-1, keepdims=True) + epsilon)


def copy_descriptor(cls: np.ndarray, *, patches: np.ndarray, power: float = 4.0) -> np.ndarray:
  """[CLS ; GeM of the patch tokens], [N, 2 D], neither half normalized (DINO, arXiv 2104.14294; released code).

  Args:
    cls: [N, D].
    patches: [N, positions, D].
    power: of GeM.
  """
  return np.concatenate([cls, gem(patches, power=power)], axis=1)


def fit_uncentered_whitening(x: np.ndarray, *, floor: float = 1e-5) -> Whitening:
  """Whitening of copy detection in DINO's release: axes of the UNCENTERED second moment, for rows less their mean.

  Use with `pca.whiten`. All dimensions are kept.

  Args:
    x: [N, D] descriptors of other images.
    floor: smaller eigenvalues are raised to this share of the largest.

  Raises:
    ValueError: no row.
  """
  if not len(x):
    raise ValueError("whitening of no row")
  x = np.asarray(x, np.float64)
  values, vectors = np.linalg.eigh(x.T @ x / len(x))
  values, vectors = values[::-1], vectors[:, ::-1]
  axes = vectors / np.sqrt(np.maximum(values, floor * values[0]))
  sign = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(len(values))])
  return Whitening(x.mean(axis=0).astype(np.float32), (axes * sign).astype(np.float32), np.maximum(values, 0.0))


def rmac_regions(height: int, width: int, *, levels: int = 3) -> np.ndarray:
  """Squares [R, 4] of R-MAC as x, y, width, height, level by level (arXiv 1511.05879, section 3.2; released code).

  At level l there are l squares of side floor(2 w / (l + 1)) along the shorter side w, and as many more along the
  longer one as bring the overlap of the first level nearest to 40 %, the fewer of two as near but for their rounding.
  """
  short, long = min(height, width), max(height, width)
  counts = np.arange(2, 8)
  # (w^2 - w b) / w^2 and float64, as there: at 3x11 and others two counts are equally near, and the rounding decides.
  overlaps = (short**2 - short * ((long - short) / (counts - 1))) / short**2
  more = 0 if height == width else int(np.argmin(np.abs(overlaps - 0.4))) + 1
  out = []
  for level in range(1, levels + 1):
    side = 2 * short // (level + 1)
    if side:
      xs = _starts(width, side=side, count=level + (more if width > height else 0))
      ys = _starts(height, side=side, count=level + (more if height > width else 0))
      out += [(x, y, side, side) for y in ys for x in xs]
  return np.array(out, int)


def _starts(length: int, *, side: int, count: int) -> list[int]:
  half = side / 2 - 1
  step = (length - side) / (count - 1) if count > 1 else 0.0
  return [math.floor(math.floor(half) + i * step) - math.floor(half) for i in range(count)]


def rmac_region_descriptors(maps: np.ndarray, *, levels: int = 3, xp: Any = np) -> np.ndarray:
  """l2-normalized maxima [N, R, D] over the regions of feature maps [N, H, W, D]; `xp` is numpy or jax.numpy."""
  regions = rmac_regions(maps.shape[1], maps.shape[2], levels=levels)
  maxima = xp.stack([maps[:, y : y + h, x : x + w].max(axis=(1, 2)) for x, y, w, h in regions], axis=1)
  return maxima / xp.maximum(xp.linalg.norm(maxima, axis=-1, keepdims=True), 1e-12)


def rmac(descriptors: np.ndarray) -> np.ndarray:
  """R-MAC [N, D]: the l2-normalized sum of the l2-normalized region descriptors [N, R, D], whitened or not."""
  return _unit(_unit(descriptors).sum(axis=1))


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Judged:
  """relevant and junk, [Q, N] bool: what a query should find, and what is taken out of its ranking."""

  relevant: np.ndarray
  junk: np.ndarray


def revisited(
  protocol: Literal["easy", "medium", "hard"], *, easy: np.ndarray, hard: np.ndarray, junk: np.ndarray
) -> Judged:
  """The protocols of revisited Oxford/Paris (arXiv 1803.11285, section 2.4) from [Q, N] bool annotations.

  Easy: easy found, hard is junk. Medium: easy and hard found. Hard: hard found, easy is junk.

  Raises:
    ValueError: another protocol.
  """
  if protocol not in ("easy", "medium", "hard"):
    raise ValueError(f"retrieval protocol '{protocol}': expected easy, medium or hard")
  if protocol == "medium":
    return Judged(easy | hard, junk)
  return Judged(easy, junk | hard) if protocol == "easy" else Judged(hard, junk | easy)


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """Scores of Q queries, as shares.

  Attributes:
    average_precision: [Q], NaN for a query without anything relevant, which no mean counts.
    precision: [Q, len(ks)] at min(k, rank of the last relevant item), NaN likewise.
    recall: [Q, len(ks)] whether anything relevant is among the first k, NaN likewise.
  """

  average_precision: np.ndarray
  precision: np.ndarray
  recall: np.ndarray


def score(similarity: np.ndarray, *, judged: Judged, ks: tuple[int, ...] = (1, 5, 10), top: int = 0) -> Retrieval:
  """Scores of the rankings by descending `similarity` [Q, N], of equal ones the lower index first, without the junk.

  The average precision is the trapezoidal one of revisited Oxford/Paris: the mean over the relevant items of the mean
  of the precision just before and at the item, with 1 before the first rank. With `top`, items at later ranks add
  nothing to it (copy detection takes 20).
  """
  order = np.argsort(-similarity, axis=1, kind="stable")
  found = np.take_along_axis(judged.relevant & ~judged.junk, order, axis=1)
  shown = np.take_along_axis(~judged.junk, order, axis=1)
  rank = np.cumsum(shown, axis=1)  # from 1, among what is not junk
  hits = np.cumsum(found, axis=1)
  total = hits[:, -1].astype(np.float64)
  with np.errstate(invalid="ignore", divide="ignore"):
    before = np.where(rank > 1, (hits - 1) / (rank - 1), 1.0)
    average = np.sum((before + hits / rank) / 2, axis=1, where=found & (rank <= (top or rank.shape[1]))) / total
    last = np.max(np.where(found, rank, 0), axis=1)
    precision, recall = [], []
    for k in ks:
      cut = np.minimum(last, k)
      inside = np.sum(found & (rank <= cut[:, None]), axis=1)
      precision.append(inside / cut)
      recall.append(np.where(total > 0, inside > 0, np.nan))
  return Retrieval(average, np.stack(precision, axis=1), np.stack(recall, axis=1))
