"""Linear SVMs on frozen features, one against all, as VOC 2007 classification reports them (arXiv 1905.01235)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Features, Report, Split, pairs
from big_ssl.models.readouts import Kind, Output, readouts
from big_ssl.ops import average_precision, svm

MULTI = "labels_multi"  # extras of a source: [N, K], 1 present, 0 absent, -1 difficult
FOLDS = 3


@dataclasses.dataclass(frozen=True)
class Task:
  """Features of both splits, their targets [N, K]: 1 present, 0 absent, -1 ignored, and the labels of the K `classes`."""

  prefix: str
  train: Features
  held_out: Features
  train_targets: np.ndarray
  held_out_targets: np.ndarray
  classes: np.ndarray
  multi: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Svm(Evaluator):
  """Mean average precision "map" in percent, and with one label per image the "top1" of the highest score.

  Rows are divided by their norm + 1e-5; squared hinge, positives weigh twice, the intercept is penalized; C of a class
  is the one with the best average precision (scikit-learn's) over stratified folds of the training images, then all of
  them are fitted. The held-out AP is the area under the monotone precision-recall curve, all points: not VOC 2007's
  11-point one; classes without a held-out positive are not in the mean. Images are those of the evaluation view; the
  publication distorts them to a square without a crop. The published solver does not converge for C >= 100, ours does,
  which may change 0.3 points. Memory is about 300 bytes for each pair of a training image and a class.

  With `shots` of k: per class k positive and (classes - 1) k negative images train, all others are left out; k of
  every class where images have one label. "map_4shot" is the mean over `samples` draws at C = `shot_c`, which is not
  chosen on the held-out images, "map_4shot_min", "_max" and "_std" likewise.

  Attributes:
    c: candidates of C.
    shots: k of the low-shot runs; () is none.
    samples: draws of each.
    shot_c: C of the low-shot runs; several are reported one by one, as in "map_4shot_c10".
    seed: of the draws.
    drop_ignored_in_training: leave images out where a class is marked -1; the publication trains them as negatives, and
      drops them in low-shot runs only.
    readout, layers, stages: of the backbone as in `linear_sgd`; of several stages "map" is that of the best by cross-
      validation, and "conv3/map" each.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
  """

  c: tuple[float, ...] = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)
  shots: int | tuple[int, ...] = ()
  samples: int = 5
  shot_c: float | tuple[float, ...] = 1.0
  seed: int = 0
  drop_ignored_in_training: bool = False
  readout: Kind = "output"
  layers: int = 4
  stages: tuple[int, ...] = (1, 2, 3, 4, 5)
  baselines: bool = False

  def __post_init__(self):
    for field, values in (("c", self.c), ("shot_c", _several(self.shot_c))):
      if not values or min(values) <= 0:
        raise UserError(f"config.evals.svm.{field}={getattr(self, field)}: expected positive numbers.")
    if any(k < 1 for k in _several(self.shots)):
      raise UserError(f"config.evals.svm.shots={self.shots}: expected images per class, at least 1.")
    if self.samples < 1:
      raise UserError(f"config.evals.svm.samples={self.samples}: expected at least 1.")
    if not self.stages:
      raise UserError("config.evals.svm.stages=(): expected at least one stage.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # float64 on the host
    outputs = readouts(self.readout, output=self.output, layers=self.layers, stages=self.stages)
    metrics, best, protocol = {}, {}, ""
    for i, output in enumerate(outputs):
      for task in _tasks(extract, output, baselines=self.baselines):
        once = len(outputs) == 1 or task.prefix == "raw_pixels/"
        if once and i:
          continue
        validated, found = self._evaluate(task)
        if not once:
          metrics |= {f"{task.prefix}{output}/{k}": v for k, v in found.items()}
        if task.prefix not in best or validated > best[task.prefix][0]:
          best[task.prefix] = (validated, found, output)
          protocol = protocol if task.prefix else self._protocol(task, outputs, output)
    if not protocol:
      return Report({}, f"SVM not computed: the data has neither labels nor '{MULTI}'")
    for prefix, (_, found, _) in best.items():
      metrics |= {f"{prefix}{k}": v for k, v in found.items()}
    return Report(metrics, protocol)

  def _evaluate(self, task: Task) -> tuple[float, dict[str, float]]:
    """Mean average precision of the cross-validation, and the metrics on the held-out images."""
    train, test = svm.normalize(task.train.features), svm.normalize(task.held_out.features)
    present = task.train_targets == 1
    used = np.ones_like(present) if not self.drop_ignored_in_training else task.train_targets >= 0
    chosen, validated = np.full(present.shape[1], self.c[0]), 0.0
    if len(self.c) > 1:
      self._check(present, used, task.classes)
      table = self._validate(train, present, used)
      chosen, validated = np.array(self.c)[table.argmax(axis=0)], float(table.max(axis=0).mean())
    fitted = svm.fit(train, present=present, cost=used * svm.costs(present, c=chosen))
    metrics = _scores(fitted.decide(test), task)
    for k in _several(self.shots):
      metrics |= self._low_shot(task, train, test, k)
    return validated, metrics

  def _check(self, present: np.ndarray, used: np.ndarray, classes: np.ndarray) -> None:
    """Raises UserError where a class has too few images for the folds."""
    for kind, count in (("positive", np.sum(present & used, axis=0)), ("negative", np.sum(~present & used, axis=0))):
      short = np.flatnonzero(count < FOLDS)
      if len(short):
        raise UserError(
          f"config.evals.svm.c={self.c}: class {classes[short[0]]} has {count[short[0]]} {kind} training images, the choice"
          f" of C in {FOLDS} folds needs {FOLDS}; expected more images, or a single C."
        )

  def _validate(self, x: np.ndarray, present: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Average precision [len(c), K], the mean over the folds, all classes and folds fitted side by side."""
    folds = svm.stratified_folds(present, folds=FOLDS, used=used)
    tiled = np.tile(present, (1, FOLDS))
    inside = np.concatenate([used & (folds != f) for f in range(FOLDS)], axis=1)
    fitted, table = None, []
    classes = range(present.shape[1])
    for c in sorted(self.c):  # each starts where the one before ended
      fitted = svm.fit(x, present=tiled, cost=inside * svm.costs(tiled, c=c), start=fitted)
      out = np.split(fitted.decide(x), FOLDS, axis=1)
      scores = [[_step(out[f][:, k], present[:, k], folds[:, k] == f) for k in classes] for f in range(FOLDS)]
      table.append(np.mean(scores, axis=0))
    return np.array(table)[np.argsort(np.argsort(self.c))]

  def _low_shot(self, task: Task, train: np.ndarray, test: np.ndarray, count: int) -> dict[str, float]:
    """Statistics over the samples of each C."""
    several, out, fitted = len(_several(self.shot_c)) > 1, {}, [None] * self.samples
    drawn = [draw(task, count=count, seed=(self.seed, count, sample)) for sample in range(self.samples)]
    for c in sorted(_several(self.shot_c)):
      found = []
      for i, chosen in enumerate(drawn):
        rows = np.flatnonzero(chosen.any(axis=1))
        present = task.train_targets[rows] == 1
        cost = chosen[rows] * svm.costs(present, c=c)
        fitted[i] = svm.fit(train[rows], present=present, cost=cost, start=fitted[i])
        found.append(_scores(fitted[i].decide(test), task))
      for name in found[0]:
        values, key = np.array([f[name] for f in found]), f"{name}_{count}shot" + (f"_c{c:g}" if several else "")
        out |= {key: values.mean(), f"{key}_min": values.min(), f"{key}_max": values.max(), f"{key}_std": values.std()}
    return {k: float(v) for k, v in out.items()}

  def _protocol(self, task: Task, outputs: tuple[Output, ...], output: Output) -> str:
    source = f", {task.held_out.source}" if task.held_out.source else ""
    absent = task.classes[~np.any(task.held_out_targets == 1, axis=0)]
    source += f", classes {absent.tolist()} without a held-out image left out of the mean" if len(absent) else ""
    grid = ", ".join(f"{c:g}" for c in self.c)
    of = f" (of {len(outputs)}, best in cross-validation)" if len(outputs) > 1 else ""
    treated = "left out of" if self.drop_ignored_in_training else "negatives in"
    multi = f" targets '{MULTI}' with -1 {treated} training and left out of the test," if task.multi else ""
    return (
      f"linear SVM one against all, x / (norm + 1e-5), squared hinge to convergence in float64, positives weigh 2,"
      f" C of {grid}{f' per class by {FOLDS}-fold average precision' if len(self.c) > 1 else ''},{multi}"
      f" AP over all points of the monotone curve, output '{output}'{of} ({task.train.features.shape[1]} dimensions) of"
      f" the evaluation view, {len(task.train.features)} training and {len(task.held_out.features)} held-out"
      f" images{self._shots(task)}{source}"
    )

  def _shots(self, task: Task) -> str:
    if not _several(self.shots):
      return ""
    how = "and (classes - 1) k negatives per class" if task.multi else "images of each class"
    return (
      f", low-shot k={','.join(map(str, _several(self.shots)))} {how}, {self.samples} samples of seed {self.seed},"
      f" C={','.join(f'{c:g}' for c in _several(self.shot_c))}"
    )


def _several(value: Any) -> tuple:
  return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _tasks(extract: Extract, output: Output, *, baselines: bool) -> Iterator[Task]:
  """Features and targets, also of the yardsticks; nothing where the data has neither labels nor targets.

  Raises:
    UserError: targets of one split only, or of another shape or other values.
  """
  multi = {split: _multi(extract, split) for split in ("train", "eval")}
  if any(v is None for v in multi.values()):
    if any(v is not None for v in multi.values()):
      lacks = "train" if multi["train"] is None else "eval"
      raise UserError(f"config.data: the {lacks} images have no '{MULTI}', the others have; expected both splits to.")
    for pair in pairs(extract, output=output, baselines=baselines):
      classes = np.union1d(pair.train.labels, pair.held_out.labels)
      targets = [(f.labels[:, None] == classes).astype(np.int8) for f in (pair.train, pair.held_out)]
      yield Task(pair.prefix, pair.train, pair.held_out, *targets, classes, False)
    return
  if multi["train"].shape[1] != multi["eval"].shape[1]:
    raise UserError(
      f"config.data: '{MULTI}' has {multi['train'].shape[1]} classes in train, {multi['eval'].shape[1]} in eval."
    )
  for pair in pairs(_without_labels(extract), output=output, baselines=baselines):
    targets = [multi[split][f.index] for split, f in (("train", pair.train), ("eval", pair.held_out))]
    yield Task(pair.prefix, pair.train, pair.held_out, *targets, np.arange(multi["train"].shape[1]), True)


def _multi(extract: Extract, split: Split) -> np.ndarray | None:
  targets = extract.images(split).extras.get(MULTI)
  if targets is None:
    return None
  targets = np.asarray(targets)
  if targets.ndim != 2 or not np.isin(targets, (-1, 0, 1)).all():
    raise UserError(
      f"config.data: '{MULTI}' of the {split} images is {targets.dtype} {targets.shape} with values"
      f" {np.unique(targets)[:5].tolist()}; expected [images, classes] of 1 (present), 0 (absent), -1 (ignored)."
    )
  return targets


def _without_labels(extract: Extract) -> Callable[..., Features]:
  """Every image counts, whatever its label is."""

  def all_rows(split: Split, **kwargs: Any) -> Features:
    found = extract(split, **kwargs)
    return dataclasses.replace(found, labels=np.zeros(len(found.features), np.int32))

  return all_rows


def _step(scores: np.ndarray, present: np.ndarray, rows: np.ndarray) -> float:
  return average_precision.step(scores[rows], relevant=present[rows])


def _scores(decisions: np.ndarray, task: Task) -> dict[str, float]:
  """Percent; a class without a positive is not in the mean."""
  targets = task.held_out_targets
  known = [targets[:, k] >= 0 for k in range(targets.shape[1])]
  each = [average_precision.interpolated(decisions[r, k], relevant=targets[r, k] == 1) for k, r in enumerate(known)]
  if np.all(np.isnan(each)):
    raise UserError("config.evals.svm: no class has a positive held-out image.")
  out = {"map": 100.0 * float(np.nanmean(each))}
  if not task.multi:
    out["top1"] = 100.0 * float(np.mean(task.classes[decisions.argmax(axis=1)] == task.held_out.labels))
  return out


def draw(task: Task, *, count: int, seed: tuple[int, ...]) -> np.ndarray:
  """[N, K] bool: which training images each class is learned from; a function of the targets and the seed alone.

  Raises:
    UserError: a class has fewer images than that.
  """
  rng, targets = np.random.default_rng(seed), task.train_targets
  classes = targets.shape[1]
  out = np.zeros(targets.shape, bool)
  for k in range(classes):
    kinds = ((1, count), (0, (classes - 1) * count)) if task.multi else ((1, count),)
    for value, number in kinds:
      members = np.flatnonzero(targets[:, k] == value)
      if len(members) < number:
        kind = "positive" if value else "negative"
        raise UserError(
          f"config.evals.svm.shots={count}: class {task.classes[k]} of {classes} has {len(members)} {kind} training"
          f" images of the {number} that are drawn."
        )
      chosen = rng.permutation(members)[:number]
      out[chosen, k if task.multi else slice(None)] = True
  return out
