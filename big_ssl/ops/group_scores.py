"""Scores by group of images, with sizes and confidence intervals, and fairness indicators (arXiv 2202.07603)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

Z_95 = 1.959964  # normal quantile of a two-sided interval of 95 %


@dataclasses.dataclass(frozen=True)
class Share:
  """A share of `count` images in percent, with its interval of 95 % (Wilson)."""

  percent: float
  low: float
  high: float
  count: int


def wilson(hits: float, *, count: int) -> Share:
  """Wilson's interval of a binomial share; unlike the normal one it stays inside 0 ... 100 and is never empty.

  Raises:
    ValueError: no image.
  """
  if count < 1:
    raise ValueError("a share of no image")
  p, z2 = hits / count, Z_95**2
  center = (p + z2 / (2 * count)) / (1 + z2 / count)
  half = Z_95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
  return Share(100 * p, 100 * max(center - half, 0.0), 100 * min(center + half, 1.0), count)


def difference(a: Share, *, b: Share) -> Share:
  """a less b in points of percent, with Newcombe's interval of 95 % from those of both (1998, method 10).

  `count` is the smaller of both groups'.
  """
  low = math.hypot(a.percent - a.low, b.high - b.percent)
  high = math.hypot(a.high - a.percent, b.percent - b.low)
  gap = a.percent - b.percent
  return Share(gap, gap - low, gap + high, min(a.count, b.count))


def by_group(correct: np.ndarray, *, groups: np.ndarray) -> dict[str, Share]:
  """Share of `correct` [N] bool in every group of `groups` [N] str, by name; rows with "" are in none."""
  names = np.unique(groups[groups != ""])
  return {str(n): wilson(int(correct[groups == n].sum()), count=int(np.sum(groups == n))) for n in names}


def shape_bias(predictions: np.ndarray, *, shapes: np.ndarray, textures: np.ndarray) -> Share:
  """Of the images predicted as their shape or as their texture, the percent predicted as their shape (arXiv 1811.12231).

  Args:
    predictions, shapes, textures: [N] classes; images whose two cues agree, or without a texture (-1), do not count.

  Raises:
    ValueError: no image was predicted as either.
  """
  conflict = (shapes != textures) & (textures >= 0)
  as_shape, as_texture = (int(np.sum(conflict & (predictions == cue))) for cue in (shapes, textures))
  if not as_shape + as_texture:
    raise ValueError("no image with two cues was predicted as either")
  return wilson(as_shape, count=as_shape + as_texture)


def masked_prediction(logits: np.ndarray, *, present: np.ndarray) -> np.ndarray:
  """Argmax [N] of `logits` [N, C] among the classes `present` [P] alone (ImageNet-A, -R; arXiv 2202.08360)."""
  allowed = np.unique(present)
  return allowed[np.argmax(logits[:, allowed], axis=1)]


def association_rate(predictions: np.ndarray, *, classes: np.ndarray) -> float:
  """Percent of images with at least one of `classes` among their predictions [N, k] (arXiv 2202.07603, section 3.1)."""
  return 100.0 * float(np.mean(np.isin(predictions, classes).any(axis=1)))


def confident_rate(predictions: np.ndarray, *, confidences: np.ndarray, label: int, threshold: float) -> float:
  """Percent of images that have `label` among their predictions [N, k] with a confidence [N, k] of at least `threshold`."""
  return 100.0 * float(np.mean(np.any((predictions == label) & (confidences >= threshold), axis=1)))


def mean_top_confidence(confidences: np.ndarray) -> float:
  """Mean of the largest confidence of each image, of [N, k]."""
  return float(np.mean(np.max(confidences, axis=1), dtype=np.float64))


def rate_differences(predictions: np.ndarray, *, groups: np.ndarray, num_classes: int) -> dict[int, np.ndarray]:
  """How much more often a class is predicted in a group than, on the mean, in the other groups of one attribute.

  Args:
    predictions: [N, k] classes.
    groups: [N] integers, at least two different ones.
    num_classes: C.

  Returns:
    By group [C]: its percent of all predictions of the group, less the mean of the other groups' percents.

  Raises:
    ValueError: a single group.
  """
  names = np.unique(groups)
  if len(names) < 2:
    raise ValueError("rate differences need two groups")
  counts = {n: np.bincount(predictions[groups == n].ravel(), minlength=num_classes) for n in names}
  rates = {n: 100.0 * c / c.sum() for n, c in counts.items()}
  return {int(n): rates[n] - np.mean([rates[m] for m in names if m != n], axis=0) for n in names}


def set_hits(predicted_sets: np.ndarray, *, concepts: np.ndarray, confidences: np.ndarray | None = None) -> np.ndarray:
  """[N] bool, whether concept i is in any of image i's predicted sets [N, k, S], which are padded with -1.

  A prediction whose confidence [N, k] is not above 0 does not count.
  """
  found = np.any(predicted_sets == concepts[:, None, None], axis=2)  # [N, k]
  if confidences is not None:
    found &= confidences > 0
  return np.any(found, axis=1) & (concepts >= 0)


AGES = (("<18", 0, 18), ("18-30", 18, 30), ("30-45", 30, 45), ("45-70", 45, 70), ("70+", 70, math.inf))


def attribute_groups(*, gender: np.ndarray, skin: np.ndarray, age: np.ndarray) -> dict[str, np.ndarray]:
  """Masks [N] of the groups of arXiv 2202.07603: genders, skin tones, both together, and ages.

  The attributes are what annotators saw, social categories and no facts about a person.

  Args:
    gender: [N] 0 female, 1 male; others are in no group of gender.
    skin: [N] Fitzpatrick type: 1 to 3 lighter, 4 to 6 darker.
    age: [N] years; NaN or negative is in no group of age.
  """
  genders = {"female": gender == 0, "male": gender == 1}
  skins = {"lighter": (skin >= 1) & (skin <= 3), "darker": (skin >= 4) & (skin <= 6)}
  both = {f"{g}_{s}": genders[g] & skins[s] for g in genders for s in skins}
  ages = {name: (age >= low) & (age < high) for name, low, high in AGES}
  return {"overall": np.ones(len(gender), bool)} | genders | skins | both | ages


def household_rate(hits: np.ndarray, *, households: np.ndarray, buckets: np.ndarray) -> dict[int, float]:
  """Mean hit by bucket, over households, of the mean over the household's images (Dollar Street; arXiv 2202.07603).

  Args:
    hits, households: [N], of images.
    buckets: [H] bucket of each household; households without an image do not count.
  """
  counts = np.bincount(households, minlength=len(buckets))
  sums = np.bincount(households, weights=hits, minlength=len(buckets))
  seen = counts > 0
  rates = sums / np.maximum(counts, 1)
  return {int(b): float(np.mean(rates[seen & (buckets == b)])) for b in np.unique(buckets[seen])}


def income_bucket(monthly: np.ndarray) -> np.ndarray:
  """round(ln(monthly income) / 3): 1 low, 2 medium, 3 high (Dollar Street; arXiv 2202.08360)."""
  return np.round(np.log(monthly) / 3).astype(int)


def retrieval_precision(
  queries: np.ndarray, *, database: np.ndarray, query_labels: np.ndarray, database_labels: np.ndarray, k: int
) -> np.ndarray:
  """[Q] share of the k nearest rows of `database`, by cosine, with the query's attribute; its mean is precision@k.

  Args:
    queries, database: [Q, D], [N, D], of any length.
    query_labels, database_labels: [Q], [N] the attribute.
    k: at most N.

  Raises:
    ValueError: k is out of range.
  """
  if not 1 <= k <= len(database):
    raise ValueError(f"precision at {k} of {len(database)} images")
  unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  order = np.argsort(-(unit(queries) @ unit(database).T), axis=1, kind="stable")[:, :k]
  return np.mean(database_labels[order] == query_labels[:, None], axis=1)
