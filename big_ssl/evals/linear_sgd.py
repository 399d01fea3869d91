"""Linear classifiers by SGD on frozen features: published protocols, and a sweep of learning rates in one pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Crop, Evaluator, Extract, Features, Pair, Report, pairs, part_tenth, take
from big_ssl.models.readouts import Kind, Output, readouts
from big_ssl.ops import linear_heads
from big_ssl.ops.linear_heads import Heads, Recipe, Schedule

Name = Literal["dino", "msn", "swav", "deepcluster", "benchmark", "seer"]
PATH = "config.evals.linear_sgd"
TEN_CROPS = tuple(  # of images resized to 256 for crops of 224, as torchvision's
  Crop(kind="center", place=place, flip=flip, center_fraction=224 / 256)
  for flip in (0.0, 1.0)
  for place in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.5, 0.5))
)
SWEEP = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # times the published rate, made for augmented ImageNet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
  """The constants of a published linear probe.

  Attributes:
    recipe: head and SGD.
    readout: of the backbone, see `models.readouts.Readout`.
    lr: at `batch_size`.
    scaled: the rate is that at 256 images and proportional to the batch.
    batch_size, epochs, weight_decay, schedule: of the training.
    milestones: of the schedule, as shares of the epochs.
    grids: of the stages; () is the published pooling.
    crop: of the training images, in every epoch.
  """

  recipe: Recipe
  readout: Kind
  lr: float
  scaled: bool
  weight_decay: float
  epochs: int
  schedule: Schedule
  batch_size: int = 256
  milestones: tuple[float, ...] = ()
  grids: tuple[tuple[int, int], ...] = ()
  crop: Crop = Crop()


def constants(name: Name) -> Preset:
  """Of DINO (arXiv 2104.14294), MSN (2204.07141), SwAV (2006.09882), DeepCluster (1807.05520), the benchmark of Goyal
  et al. (1905.01235; its PyTorch release) and SEER 10B (2202.08360), each as in its released code."""
  if name == "dino":
    return Preset(
      recipe=Recipe(), readout="cls", lr=1e-3, scaled=True, weight_decay=0.0, epochs=100, schedule="cosine_epochs"
    )
  if name == "msn":
    recipe = Recipe(norm="layer", unit=True, nesterov=True, lr_in_buffer=True, decayed="kernel")
    settings = {"lr": 6.4, "scaled": False, "weight_decay": 0.0, "epochs": 100, "schedule": "cosine_steps"}
    return Preset(recipe=recipe, readout="cls_unnormed", batch_size=16384, **settings)
  if name == "swav":
    settings = {"lr": 0.3, "scaled": False, "weight_decay": 1e-6, "epochs": 100, "schedule": "cosine_epochs"}
    return Preset(recipe=Recipe(), readout="output", **settings)
  if name == "deepcluster":
    settings = {"lr": 0.01, "scaled": False, "weight_decay": 1e-7, "epochs": 90, "schedule": "inverse_sqrt"}
    crop = Crop(kind="scaled", square=True, scale=(1.0, 1.0), center_fraction=224 / 256)
    return Preset(recipe=Recipe(), readout="stages", crop=crop, **settings)
  drops = {"schedule": "milestones", "milestones": (8 / 28, 16 / 28, 24 / 28), "readout": "stages"}
  settings = {"lr": 0.01, "scaled": True, "weight_decay": 5e-4, "epochs": 28} | drops
  if name == "benchmark":
    return Preset(recipe=Recipe(norm="batch", nesterov=True), **settings)
  recipe = Recipe(norm="batch_affine", nesterov=True, decayed="linear")
  return Preset(recipe=recipe, grids=((2, 1), (1, 2), (1, 1)), **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSGD(Evaluator):
  """Top-1 in percent of the head that is best on a tenth of the training images after the last epoch.

  The tenth is drawn class by class. The other training images are trained on, all rates and decays side by side on the
  same batches. "top1" is the chosen head of the chosen layer, "lr/0.001" each head of a layer ("lr/0.001_wd/0" with
  several decays), and where several layers are read "conv3/top1" is the chosen head of one. A head that diverged is left
  out, and named. Training of the heads happens on one device, for any mesh.

  The published probes crop and flip the training images anew in every epoch (`augment`), and those of DINO and SwAV
  report the best epoch (`report`). The defaults do neither (own choice), so that figures are somewhat other ones: the
  features are extracted once and kept for other evaluators, and no held-out image chooses anything. DeepCluster's
  probe is tested on ten crops (`ten_crops`), the others on the evaluation view.

  Attributes:
    preset: the protocol whose constants hold where a field below is empty.
    readout: of the backbone: "output" is the method's `output`, others see `models.readouts.Readout`. Published: dino
      "cls" with 4 layers (ViT-S) and "cls_average" (ViT-B); msn "cls_unnormed"; swav "output"; others "stages".
    layers: of "cls".
    stages: of "stages", from 1; a head for each.
    lr: base learning rates, before the scaling by the batch where the preset has one; () sweeps around the preset's.
    weight_decay: each is combined with each rate.
    epochs, batch_size: 0 is the preset's; no more images than there are go into a batch.
    seed: of the weights, of the order and of the crops.
    baselines: also report the same protocol on standardized raw pixels and on the random initialization.
    augment: "none", or "published": the training images are cropped and flipped anew in every epoch, as the preset's
      probe does. This takes a pass of all training images through the backbone for every epoch and every layer, thrice
      as many with `baselines`, and memory for the features of one epoch beside those of the evaluation view.
    report: of the "last" epoch; or of the "best", in which a head gets most held-out images right. Its figure is too
      good by that choice.
    ten_crops: held-out images are judged by the mean softmax of their corners and center and of these flipped: ten passes
      of the held-out images, and memory for the probabilities of every image, class and head. Needs report="last".
  """

  preset: Name = "dino"
  readout: Kind | None = None
  layers: int = 4
  stages: tuple[int, ...] = (1, 2, 3, 4, 5)
  lr: tuple[float, ...] = ()
  weight_decay: tuple[float, ...] = ()
  epochs: int = 0
  batch_size: int = 0
  seed: int = 0
  baselines: bool = False
  augment: Literal["none", "published"] = "none"
  report: Literal["last", "best"] = "last"
  ten_crops: bool = False

  def __post_init__(self):
    for field, accepted in (("epochs", "a number of epochs"), ("batch_size", "a number of images")):
      if getattr(self, field) < 0:
        value = getattr(self, field)
        raise UserError(f"{PATH}.{field}={value}: expected {accepted}, or 0 for the preset's.")
    if self.lr and min(self.lr) <= 0:
      raise UserError(f"{PATH}.lr={self.lr}: expected positive numbers.")
    if self.weight_decay and min(self.weight_decay) < 0:
      raise UserError(f"{PATH}.weight_decay={self.weight_decay}: expected numbers of at least 0.")
    if len(set(self.grid())) < len(self.grid()):
      raise UserError(f"{PATH}.lr={self.lr}: expected each rate and each weight decay once.")
    if self.ten_crops and self.report == "best":
      raise UserError(f"{PATH}.ten_crops=True: expected report='last', each epoch of 'best' would take ten passes; it is 'best'.")
    if not self.stages:
      raise UserError(f"{PATH}.stages=(): expected at least one stage.")

  def grid(self) -> tuple[tuple[float, float], ...]:
    """(base learning rate, weight decay) of every head."""
    chosen = constants(self.preset)
    rates = self.lr or tuple(float(f"{chosen.lr * factor:.6g}") for factor in SWEEP)
    return tuple((lr, wd) for wd in self.weight_decay or (chosen.weight_decay,) for lr in rates)

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # the heads are small, and one device gives one answer
    metrics, best, described = {}, {}, None
    for layer, pair in self._pairs(extract):
      probe = self._train(pair, layer)
      single = layer == "" or pair.prefix == "raw_pixels/"
      name = pair.prefix if single else f"{pair.prefix}{layer}/"
      metrics[f"{name}top1"] = probe.top1
      if not pair.prefix:
        metrics |= {f"{name}{k}": v for k, v in probe.every.items()}
      if pair.prefix not in best or probe.tenth > best[pair.prefix].tenth:
        best[pair.prefix] = probe
        described = (pair, probe) if not pair.prefix else described
    if described is None:
      return Report({}, "linear probe by SGD not computed: the data has no labels")
    metrics |= {f"{prefix}top1": probe.top1 for prefix, probe in best.items()}
    return Report(metrics, self._protocol(*described))

  def _pairs(self, extract: Extract) -> Iterator[tuple[str, Pair]]:
    """Name of the layer, "" of an only one, and its features; raw pixels once."""
    for i, output in enumerate(self._outputs()):
      for pair in pairs(extract, output=output, baselines=self.baselines):
        if i == 0 or pair.prefix != "raw_pixels/":
          yield (str(output) if len(self._outputs()) > 1 else ""), pair

  def _outputs(self) -> tuple[Output, ...]:
    chosen = constants(self.preset)
    kind = self.readout or chosen.readout
    return readouts(kind, output=self.output, layers=self.layers, stages=self.stages, grids=chosen.grids)

  def _train(self, pair: Pair, layer: str) -> _Probe:
    chosen, train, epochs = constants(self.preset), pair.train, self._length()
    if len(train.labels) < 2:
      raise UserError(f"{PATH}: the data has one labeled training image, at least 2 are needed.")
    classes = int(max(train.labels.max(), pair.held_out.labels.max())) + 1
    part = part_tenth(train.labels)
    batch = min(self.batch_size or chosen.batch_size, int(part.fit.sum()))
    per_epoch = int(part.fit.sum()) // batch
    base, decay = (np.array(v) for v in zip(*self.grid(), strict=True))
    rates = linear_heads.learning_rates(
      base * batch / 256 if chosen.scaled else base,
      schedule=chosen.schedule,
      steps=per_epoch * epochs,
      per_epoch=per_epoch,
      milestones=chosen.milestones,
      weight_decay=decay,
    )
    settings = {"recipe": chosen.recipe, "shape": train.shape}
    heads = linear_heads.init_heads(**settings, count=len(base), classes=classes, seed=self.seed)
    held_out = np.zeros(len(base))
    for span, seen in self._seen(pair, part.fit):
      heads = linear_heads.train_heads(
        seen.features,
        labels=seen.labels,
        heads=heads,
        **settings,
        lr=rates[span.start * per_epoch : span.stop * per_epoch],
        weight_decay=decay,
        batch_size=batch,
        seed=self.seed,
        first_epoch=span.start,
      )
      del seen  # before those of the next epoch are made
      if self.report == "best" or span.stop == epochs:
        held_out = np.maximum(held_out, self._held_out(heads, pair, **settings))
    tenth = take(train, part.judge)
    score = np.where(_finite(heads), _accuracy(linear_heads.predict(heads, tenth.features, **settings), tenth), -1.0)
    if score.max() < 0:
      raise UserError(f"{PATH}.lr={self.lr}: every head diverged; expected smaller rates.")
    return _Probe(layer, int(np.argmax(score)), batch, score, held_out, self.grid())

  def _held_out(self, heads: Heads, pair: Pair, **settings: Any) -> np.ndarray:
    """Accuracy [H] in percent."""
    if not self.ten_crops:
      return _accuracy(linear_heads.predict(heads, pair.held_out.features, **settings), pair.held_out)
    together = sum(linear_heads.probabilities(heads, pair.cropped("eval", c).features, **settings) for c in TEN_CROPS)
    return _accuracy(np.argmax(together, axis=-1), pair.held_out)

  def _length(self) -> int:
    return self.epochs or constants(self.preset).epochs

  def _seen(self, pair: Pair, rows: np.ndarray) -> Iterator[tuple[range, Features]]:
    """Epochs that are trained in one go, and the features that their images `rows` have."""
    if self.augment == "published":
      crop = dataclasses.replace(constants(self.preset).crop, seed=self.seed)
      for epoch in range(self._length()):
        yield range(epoch, epoch + 1), take(pair.cropped("train", dataclasses.replace(crop, epoch=epoch)), rows)
      return
    together, found = self._length() if self.report == "last" else 1, take(pair.train, rows)
    for epoch in range(0, self._length(), together):
      yield range(epoch, epoch + together), found

  def _protocol(self, pair: Pair, probe: _Probe) -> str:
    chosen, recipe = constants(self.preset), constants(self.preset).recipe
    lr, wd = self.grid()[probe.best]
    at_edge = len({r for r, _ in self.grid()}) > 1 and lr in (min(self.grid())[0], max(self.grid())[0])
    norm = {"none": "", "layer": "LayerNorm, ", "batch": "BN without scale, ", "batch_affine": "BN, "}[recipe.norm]
    outputs = [f"'{o}'" for o in self._outputs()]
    layer = f", of {', '.join(outputs)} the best on that tenth is {probe.layer}"
    layer = layer if probe.layer else f", output {outputs[0]}"
    scaled = f" * {probe.batch}/256" if chosen.scaled else ""
    source = f", {pair.held_out.source}" if pair.held_out.source else ""
    ten = " by the mean softmax of ten crops, the corners and the center of images resized to the view's size / 0.875 and these flipped"
    once = "of the evaluation view without augmentation (own choice)"
    anew = f"of {chosen.crop}, anew in every epoch, and for the tenth{'' if self.ten_crops else ' and the held-out images'} of the evaluation view"
    epoch = "last epoch" if self.report == "last" else "accuracy of the epoch with the best on the held-out images"
    part, unseen = part_tenth(pair.train.labels), np.setdiff1d(pair.held_out.labels, pair.train.labels)
    source += f", classes {unseen.tolist()} without a training image" if len(unseen) else ""
    lost = [f"{k[0]:g}" for k, s in zip(self.grid(), probe.score, strict=True) if s < 0]
    return (
      f"linear probe by SGD, preset {self.preset}: {norm}{'l2-normalized, ' if recipe.unit else ''}one linear map,"
      f" momentum {recipe.momentum:g}{' (Nesterov)' if recipe.nesterov else ''}, batch {probe.batch},"
      f" {self._length()} epochs, {chosen.schedule.replace('_', ' ')}, lr {lr:g}"
      f"{scaled} and weight decay {wd:g} chosen among {len(self.grid())} heads by"
      f" {part.words}{' (at the edge of the sweep)' if at_edge else ''}"
      f"{', diverged: lr ' + ', '.join(lost) if lost else ''}{layer} ({pair.train.features.shape[1]} dimensions)"
      f" {once if self.augment == 'none' else anew}, {epoch}, seed {self.seed}, trained on {part.fit.sum()} of"
      f" {len(pair.train.features)} training images, {len(pair.held_out.features)} held-out images{ten if self.ten_crops else ''}{source}"
    )


@dataclasses.dataclass(frozen=True)
class _Probe:
  """The heads of one layer: accuracies in percent on the tenth (-1 where diverged) and on the held-out images."""

  layer: str
  best: int
  batch: int
  score: np.ndarray
  held_out: np.ndarray
  grid: tuple[tuple[float, float], ...]

  @property
  def top1(self) -> float:
    return float(self.held_out[self.best])

  @property
  def tenth(self) -> float:
    return float(self.score[self.best])

  @property
  def every(self) -> dict[str, float]:
    """Held-out accuracy of the heads that did not diverge."""
    several = len({wd for _, wd in self.grid}) > 1
    names = [f"lr/{lr:g}" + (f"_wd/{wd:g}" if several else "") for lr, wd in self.grid]
    return {n: float(a) for n, a, s in zip(names, self.held_out, self.score, strict=True) if s >= 0}


def _accuracy(predicted: np.ndarray, truth: Features) -> np.ndarray:
  """[H] in percent of predictions [H, N]."""
  return 100.0 * np.mean(predicted == truth.labels, axis=1)


def _finite(heads: Heads) -> np.ndarray:
  """Which heads [H] have finite numbers only."""
  leaves = jax.tree.leaves((heads.params, heads.stats))
  return np.all([np.isfinite(np.asarray(x)).reshape(len(x), -1).all(axis=1) for x in leaves], axis=0)
