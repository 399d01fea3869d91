"""Does a linear classifier hold among other classes and for every group of images? (arXiv 2202.08360)"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Features, Pair, Report, pairs, take
from big_ssl.evals.lowshot import fit_logistic
from big_ssl.ops.group_scores import by_group, masked_prediction, wilson

PATH = "config.evals.robustness"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robustness(Evaluator):
  """Accuracy in percent of a logistic regression on the training images, on a held-out set of its own kind.

  Reports "top1" over all classes and "top1_masked" among the classes that the held-out set has, with its interval of
  95 %; then, of the masked predictions, "group/NAME/top1" with "low", "high" and the size "n", "worst_group" and
  "disparity", the largest less the smallest. Groups under `min_group` images are withheld and named.

  Attributes:
    l2: lambda; the penalty is lambda / (2 n) ||W||^2 beside the mean cross-entropy of n standardized images.
    label_map: entry i is the training class of held-out label i, or -1 to leave its images out; () is the same classes.
    groups: text file whose line i is the group of held-out image i of the source, empty for none; "" groups by class.
    min_group: images that a group needs to be reported.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  l2: float = 100.0
  label_map: tuple[int, ...] = ()
  groups: str = ""
  min_group: int = 10
  baselines: bool = False

  def __post_init__(self):
    if self.l2 <= 0:
      raise UserError(f"{PATH}.l2={self.l2}: expected a positive number.")
    if self.min_group < 1:
      raise UserError(f"{PATH}.min_group={self.min_group}: expected at least 1.")
    if any(c < -1 for c in self.label_map):
      raise UserError(f"{PATH}.label_map: {min(self.label_map)} is no class; expected training classes or -1.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh
    metrics, protocol = {}, "robustness not computed: the data has no labels"
    for pair in pairs(extract, output=self.output, baselines=self.baselines):
      held_out = self._mapped(pair)
      names = self._names(held_out)
      withheld = [n for n, c in zip(*np.unique(names, return_counts=True), strict=True) if n and c < self.min_group]
      scores = self._score(pair.train, held_out, np.where(np.isin(names, withheld), "", names))
      metrics |= {f"{pair.prefix}{k}": v for k, v in scores.items()}
      if not pair.prefix:
        protocol = self._protocol(pair, held_out, [str(n) for n in withheld])
    return Report(metrics, protocol)

  def _mapped(self, pair: Pair) -> Features:
    """The held-out images with labels of the training classes."""
    held_out = pair.held_out
    if self.label_map:
      if held_out.labels.max() >= len(self.label_map):
        raise UserError(
          f"{PATH}.label_map: {len(self.label_map)} entries, but the held-out images have label"
          f" {held_out.labels.max()}; expected an entry for each label, -1 to leave its images out."
        )
      labels = np.array(self.label_map, np.int32)[held_out.labels]
      held_out = take(dataclasses.replace(held_out, labels=labels), labels >= 0)
      if not len(held_out.labels):
        raise UserError(f"{PATH}.label_map: every label of the held-out images is -1, none is left.")
    unseen = np.setdiff1d(held_out.labels, pair.train.labels)
    if len(unseen):
      raise UserError(f"{PATH}.label_map={self.label_map or '()'}: no training image of classes {unseen.tolist()}.")
    return held_out

  def _names(self, held_out: Features) -> np.ndarray:
    if not self.groups:
      return np.array([f"class_{c}" for c in held_out.labels])
    try:
      lines = pathlib.Path(self.groups).read_text(encoding="utf-8").splitlines()
    except OSError as error:
      raise UserError(f"{PATH}.groups={self.groups}: cannot be read ({error.strerror}).") from error
    if held_out.index.max() >= len(lines):
      raise UserError(
        f"{PATH}.groups={self.groups}: {len(lines)} lines, but there is a held-out image {held_out.index.max()};"
        " expected one line for each image, empty for no group."
      )
    return np.array([line.strip() for line in lines])[held_out.index]

  def _score(self, train: Features, held_out: Features, groups: np.ndarray) -> dict[str, float]:
    mean, std = train.features.mean(0), train.features.std(0) + 1e-6
    with_one = lambda f: np.concatenate([(f - mean) / std, np.ones((len(f), 1))], axis=1)
    classes = int(train.labels.max()) + 1
    x = with_one(train.features)
    fit = fit_logistic(x, labels=train.labels, num_classes=classes, l2=self.l2, tolerance=1e-9, path=PATH)
    logits = with_one(held_out.features) @ fit.weights
    correct = masked_prediction(logits, present=held_out.labels) == held_out.labels
    top1 = wilson(int(correct.sum()), count=len(correct))
    out = {"top1": 100.0 * float(np.mean(np.argmax(logits, axis=1) == held_out.labels))}
    out |= {"top1_masked": top1.percent, "top1_masked_low": top1.low, "top1_masked_high": top1.high}
    shares = by_group(correct, groups=groups)
    for name, share in shares.items():
      values = {"top1": share.percent, "low": share.low, "high": share.high, "n": float(share.count)}
      out |= {f"group/{name}/{k}": v for k, v in values.items()}
    if shares:
      percents = [share.percent for share in shares.values()]
      out |= {"worst_group": min(percents), "disparity": max(percents) - min(percents)}
    return out

  def _protocol(self, pair: Pair, held_out: Features, withheld: list[str]) -> str:
    source = f", {pair.held_out.source}" if pair.held_out.source else ""
    few = f", withheld for fewer than {self.min_group} images: {', '.join(withheld)}" if withheld else ""
    return (
      f"logistic regression to convergence, lambda={self.l2:g}, output '{self.output}'"
      f" ({pair.train.features.shape[1]} dimensions, standardized) of the evaluation view without augmentation,"
      f" {len(pair.train.features)} training images of {len(np.unique(pair.train.labels))} classes,"
      f" {len(held_out.labels)} of {len(pair.held_out.labels)} held-out images of"
      f" {len(np.unique(held_out.labels))} classes{', mapped' if self.label_map else ''}; masked: only these classes;"
      f" groups of {self.groups or 'one class'} by the masked prediction, 95 % Wilson intervals{few}{source}"
    )
