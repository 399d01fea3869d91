"""Does a linear classifier hold among other classes and for every group of images? (arXiv 2202.08360)"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals import class_maps
from big_ssl.evals.base import Evaluator, Extract, Features, Pair, Report, pairs
from big_ssl.evals.lowshot import fit_logistic
from big_ssl.ops.group_scores import Share, by_group, difference, masked_prediction, shape_bias, wilson

PATH = "config.evals.robustness"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robustness(Evaluator):
  """Accuracy in percent of a logistic regression on the training images, on a held-out set of its own kind.

  Reports "top1" over all classes and "top1_masked" among the classes that the held-out set has, with its interval of
  95 % (the published scores of ImageNet-A, -R and ObjectNet are masked); then, of the masked predictions,
  "group/NAME/top1" with "low", "high" and the size "n", "worst_group" and "disparity", the largest less the smallest, with
  its interval. Groups under `min_group` images are withheld and named.

  Held-out folders with the names of training classes, such as ImageNet's wnids, need no map: of data with the folders
  train and imagenet-a, --config.data.eval_split=imagenet-a. At most one of the three maps may be given.

  Attributes:
    l2: lambda; the penalty is lambda / (2 n) ||W||^2 beside the mean cross-entropy of n standardized images.
    label_map: entry i is the training class of held-out label i, or -1 to leave its images out.
    class_map: text file with a line "FOLDER CLASS CLASS ..." for each held-out folder, CLASS being a training folder; any
      of them is a hit. Images of other folders are left out (ObjectNet).
    label_sets: JSON file of a list of training class numbers for each held-out image of the source; any is a hit, and
      images with an empty list are left out (ImageNet-ReaL, arXiv 2006.07159).
    textures: text file whose line i is the class number of the texture of held-out image i, empty for none: adds
      "shape_bias", the share of the decisions for the label where the two differ (arXiv 1811.12231).
    groups: text file whose line i is the group of held-out image i of the source, empty for none; "" groups by class.
    min_group: images that a group needs to be reported.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  l2: float = 100.0
  label_map: tuple[int, ...] = ()
  class_map: str = ""
  label_sets: str = ""
  textures: str = ""
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
    maps = [name for name in ("label_map", "class_map", "label_sets") if getattr(self, name)]
    if len(maps) > 1:
      raise UserError(f"{PATH}.{maps[1]}={getattr(self, maps[1])}: there is also {maps[0]}; expected one of them.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh
    metrics, protocol, images = {}, "robustness not computed: the data has no labels", 0
    every = extract("eval", output=self.output)
    accepted, classes = self._accepted(extract, every), extract.images("train").class_names
    for pair in pairs(class_maps.relabeled(extract, accepted), output=self.output, baselines=self.baselines):
      targets = accepted[pair.held_out.index]
      unseen = np.setdiff1d(targets[targets >= 0], pair.train.labels)
      if len(unseen):
        raise UserError(f"{PATH}.{self._map() or 'label_map=()'}: no training image of classes {unseen.tolist()}.")
      names = self._names(pair.held_out, classes)
      withheld = [n for n, c in zip(*np.unique(names, return_counts=True), strict=True) if n and c < self.min_group]
      scores = self._score(pair, targets, np.where(np.isin(names, withheld), "", names))
      metrics |= {f"{pair.prefix}{k}": v for k, v in scores.items()}
      if not pair.prefix:
        images, protocol = len(targets), self._protocol(pair, targets, total=len(every.index), withheld=[str(n) for n in withheld])
    if not metrics and self._map():
      raise UserError(f"{PATH}.{self._map()}: every held-out image is left out, none is left.")
    return Report(metrics, protocol, images=images)

  def _map(self) -> str:
    return next((f"{n}={getattr(self, n)}" for n in ("label_map", "class_map", "label_sets") if getattr(self, n)), "")

  def _accepted(self, extract: Extract, every: Features) -> np.ndarray:
    """The training classes that are a hit for each row of the source, [N, S], padded with -1."""
    if self.class_map:
      return class_maps.by_folder(self.class_map, held_out=extract.images("eval"), train=extract.images("train"), path=f"{PATH}.class_map")
    if self.label_sets:
      return class_maps.by_image(self.label_sets, count=int(every.index.max()) + 1, path=f"{PATH}.label_sets")
    accepted = np.full((int(every.index.max()) + 1, 1), -1, np.int32)
    if every.labels is None:
      return accepted
    labels = every.labels
    if self.label_map:
      if labels.max() >= len(self.label_map):
        raise UserError(
          f"{PATH}.label_map: {len(self.label_map)} entries, but the held-out images have label"
          f" {labels.max()}; expected an entry for each label, -1 to leave its images out."
        )
      labels = np.append(np.array(self.label_map, np.int32), -1)[labels]  # a label of -1 stays one
    accepted[every.index, 0] = labels
    return accepted

  def _names(self, held_out: Features, classes: Sequence[str]) -> np.ndarray:
    if not self.groups:
      return np.array([classes[c] if c < len(classes) else f"class_{c}" for c in held_out.labels])
    return np.array(class_maps.lines(self.groups, index=held_out.index, path=f"{PATH}.groups"))

  def _score(self, pair: Pair, targets: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    train, held_out = pair.train, pair.held_out
    mean, std = train.features.mean(0), train.features.std(0) + 1e-6
    with_one = lambda f: np.concatenate([(f - mean) / std, np.ones((len(f), 1))], axis=1)
    classes = int(train.labels.max()) + 1
    x = with_one(train.features)
    fit = fit_logistic(x, labels=train.labels, num_classes=classes, l2=self.l2, tolerance=1e-9, path=PATH)
    logits = with_one(held_out.features) @ fit.weights
    hit = lambda predicted: np.any(targets == predicted[:, None], axis=1)
    correct = hit(masked_prediction(logits, present=targets[targets >= 0]))
    top1 = wilson(int(correct.sum()), count=len(correct))
    out = {"top1": 100.0 * float(np.mean(hit(np.argmax(logits, axis=1))))}
    out |= {"top1_masked": top1.percent, "top1_masked_low": top1.low, "top1_masked_high": top1.high}
    return out | _group_metrics(by_group(correct, groups=groups)) | self._bias(logits, held_out)

  def _bias(self, logits: np.ndarray, held_out: Features) -> dict[str, float]:
    if not self.textures:
      return {}
    path = f"{PATH}.textures"
    textures = class_maps.numbers(self.textures, index=held_out.index, classes=logits.shape[1], path=path)
    cues = np.concatenate([held_out.labels, textures[textures >= 0]])
    predictions = masked_prediction(logits, present=cues)
    try:
      share = shape_bias(predictions, shapes=held_out.labels, textures=textures)
    except ValueError as error:
      raise UserError(f"{path}={self.textures}: {error}.") from error
    return {"shape_bias": share.percent, "shape_bias_low": share.low, "shape_bias_high": share.high}

  def _protocol(self, pair: Pair, targets: np.ndarray, *, total: int, withheld: list[str]) -> str:
    source = f", {pair.held_out.source}" if pair.held_out.source else ""
    few = f", withheld for fewer than {self.min_group} images: {', '.join(withheld)}" if withheld else ""
    mapped = f", mapped by {self._map()}" if self._map() else ""
    several = ", any of an image's classes is a hit" if targets.shape[1] > 1 else ""
    textures = f", shape bias against {self.textures}" if self.textures else ""
    return (
      f"logistic regression to convergence, lambda={self.l2:g}, output '{self.output}'"
      f" ({pair.train.features.shape[1]} dimensions, standardized) of the evaluation view without augmentation,"
      f" {len(pair.train.features)} training images of {len(np.unique(pair.train.labels))} classes,"
      f" {len(targets)} of {total} held-out images of {len(np.unique(targets[targets >= 0]))} classes{mapped}"
      f"{' (the others have no training class)' if len(targets) < total else ''}{several}; masked: only these classes;"
      f" groups of {self.groups or 'one class'} by the masked prediction, 95 % Wilson intervals, of the disparity"
      f" Newcombe's{few}{textures}{source}"
    )


def _group_metrics(shares: dict[str, Share]) -> dict[str, float]:
  out: dict[str, float] = {}
  for name, share in shares.items():
    values = {"top1": share.percent, "low": share.low, "high": share.high, "n": float(share.count)}
    out |= {f"group/{name}/{k}": v for k, v in values.items()}
  if shares:
    worst, best = (pick(shares.values(), key=lambda s: s.percent) for pick in (min, max))
    gap = difference(best, b=worst)
    out |= {"worst_group": worst.percent, "disparity": gap.percent, "disparity_low": gap.low, "disparity_high": gap.high}
  return out
