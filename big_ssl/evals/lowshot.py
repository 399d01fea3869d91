"""Logistic regression on a few labeled images per class (MSN, arXiv 2204.07141, section 5; logistic_eval.py)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy import special

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Features, Pair, Report, pairs, unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowShot(Evaluator):
  """Accuracy in percent, mean over splits ("top1_5img") and its deviation ("top1_5img_std"); "top1_all" of all images.

  The classes are those that occur in either split.

  Attributes:
    images_per_class: how many labeled images of each class; several values are evaluated one after the other. 0 is all
      labeled training images, however many each class has, in one fit: MSN's protocol of 1 % of ImageNet's labels with
      tfds:imagenet2012_subset/1pct as the data, or that list as config.data.labels_file.
    splits: draws of the labeled images; three in the paper.
    seed: of the draws, which depend on nothing else.
    l2: lambda; the penalty is lambda / (2 n) ||W||^2 beside the mean cross-entropy of n images.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  images_per_class: int | tuple[int, ...] = (1, 2, 5)
  splits: int = 3
  seed: int = 0
  l2: float = 2.5e-4
  baselines: bool = False

  def __post_init__(self):
    if not self.counts or min(self.counts) < 0:
      raise UserError(
        f"config.evals.lowshot.images_per_class={self.images_per_class}: expected at least 1, or 0 for all images."
      )
    if self.splits < 1:
      raise UserError(f"config.evals.lowshot.splits={self.splits}: expected at least 1.")
    if self.l2 <= 0:
      raise UserError(
        f"config.evals.lowshot.l2={self.l2}: expected a positive number; without a penalty there is no minimum."
      )

  @property
  def counts(self) -> tuple[int, ...]:
    return (self.images_per_class,) if isinstance(self.images_per_class, int) else tuple(self.images_per_class)

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # a few images per class fit on the host
    metrics, protocol = {}, "low-shot logistic regression not computed: the data has no labels"
    for pair in pairs(extract, output=self.output, baselines=self.baselines):
      metrics |= self._score(pair)
      if not pair.prefix:
        protocol = self._protocol(pair)
    return Report(metrics, protocol)

  def _protocol(self, pair: Pair) -> str:
    source = f", {pair.held_out.source}" if pair.held_out.source else ""
    unseen = np.setdiff1d(pair.held_out.labels, pair.train.labels)
    source += f", classes {unseen.tolist()} without a training image" if len(unseen) else ""
    drawn, every = ",".join(str(c) for c in self.counts if c), f"all {len(pair.train.labels)} labeled training images"
    drawn = [f"{drawn} images per class, {self.splits} splits of seed {self.seed}"] if drawn else []
    return (
      f"logistic regression without intercept, lambda={self.l2:g}, {' and '.join(drawn + [every] * (0 in self.counts))},"
      f" output '{self.output}' ({pair.train.features.shape[1]} dimensions,"
      f" each image centered by its own mean and l2-normalized) of the evaluation view without augmentation,"
      f" {len(pair.held_out.features)} held-out images{source}"
    )

  def _score(self, pair: Pair) -> dict[str, float]:
    train, classes = pair.train, np.union1d(pair.train.labels, pair.held_out.labels)
    test, out = preprocess(pair.held_out.features), {}

    def accuracy(rows: np.ndarray) -> float:
      labels = np.searchsorted(classes, train.labels[rows])
      fitted = fit_logistic(preprocess(train.features[rows]), labels=labels, num_classes=len(classes), l2=self.l2)
      return 100.0 * float(np.mean(classes[np.argmax(test @ fitted.weights, axis=1)] == pair.held_out.labels))

    for count in self.counts:
      if not count:
        out[f"{pair.prefix}top1_all"] = accuracy(np.arange(len(train.labels)))
        continue
      draws = [draw(train, count=count, classes=classes, seed=(self.seed, count, s)) for s in range(self.splits)]
      accuracies = [accuracy(rows) for rows in draws]
      out[f"{pair.prefix}top1_{count}img"] = float(np.mean(accuracies))
      out[f"{pair.prefix}top1_{count}img_std"] = float(np.std(accuracies))
    return out


def draw(train: Features, *, count: int, classes: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
  """Rows of `count` images of each of the labels `classes` [C].

  Raises:
    UserError: a class has fewer images than that.
  """
  rng = np.random.default_rng(seed)
  rows = []
  for label in classes:
    members = np.flatnonzero(train.labels == label)
    if len(members) < count:
      raise UserError(
        f"config.evals.lowshot.images_per_class={count}: class {label} of {len(classes)} has {len(members)} training images."
      )
    rows.append(rng.permutation(members)[:count])
  return np.concatenate(rows)


def preprocess(features: np.ndarray) -> np.ndarray:
  """Each row [N, D] less its OWN mean over the dimensions, then l2-normalized; float64."""
  x = np.asarray(features, np.float64)
  return unit(x - x.mean(axis=1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Fitted:
  """weights [D, C] float64 and the objective there."""

  weights: np.ndarray
  objective: float


def fit_logistic(
  x: np.ndarray,
  *,
  labels: np.ndarray,
  num_classes: int,
  l2: float,
  tolerance: float = 1e-14,
  start: np.ndarray | None = None,
  path: str = "config.evals.lowshot",
) -> Fitted:
  """The unique minimum of (1/n) sum cross-entropy + l2 / (2 n) ||W||^2, no intercept (scikit-learn's C = 1 / l2).

  Args:
    x: [n, D] preprocessed features.
    labels: [n] integers below C; the penalty gives a class without an image a finite, low logit.
    num_classes: C, at least 2.
    l2: lambda.
    start: [D, C] weights near the minimum, to be there sooner; the minimum does not depend on them.
    tolerance: relative decrease of the objective at which the search ends.
    path: of the evaluator, for the messages.

  Raises:
    UserError: fewer than two classes.
  """
  if num_classes < 2:
    raise UserError(f"{path}: the data has one class, at least 2 are needed.")
  n, dims = x.shape
  x = np.asarray(x, np.float64)
  target = np.eye(num_classes)[labels]  # [n, C]

  def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
    weights = flat.reshape(dims, num_classes)
    logits = x @ weights
    log_mass = special.logsumexp(logits, axis=1)
    value = np.mean(log_mass - np.sum(logits * target, axis=1)) + l2 / (2 * n) * np.sum(weights**2)
    gradient = x.T @ (np.exp(logits - log_mass[:, None]) - target) / n + l2 / n * weights
    return value, gradient.ravel()

  from scipy import optimize  # slow to load

  found = optimize.minimize(
    objective,
    np.zeros(dims * num_classes) if start is None else start.ravel(),
    jac=True,
    method="L-BFGS-B",
    options={"maxiter": 20_000, "maxfun": 40_000, "ftol": tolerance, "gtol": 1e-8, "maxcor": 20},
  )
  return Fitted(found.x.reshape(dims, num_classes), float(found.fun))
