"""The protocol of an evaluator: features in, numbers and the protocol they were measured under out."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from big_ssl.core.method import View
from big_ssl.core.types import Interval, UserError


@dataclasses.dataclass(frozen=True)
class Features:
  """Features of a split.

  Attributes:
    features: [N, D] float32.
    labels: [N] int32, -1 for an image without one; None where the data has none.
    index: [N] rows of the source.
    source: data and transform in words, for the protocol; may be "".
    used_in_training: [N] bool, whether a semi-supervised training may use the image's label; None where nothing says.
    shape: of a row before it was made flat, such as (channels, positions); (D,) where nothing says.
  """

  features: np.ndarray
  labels: np.ndarray | None
  index: np.ndarray
  source: str = ""
  used_in_training: np.ndarray | None = None
  shape: tuple[int, ...] = ()

  def __post_init__(self):
    if math.prod(self.shape) != self.features.shape[-1] or not self.shape:
      object.__setattr__(self, "shape", self.features.shape[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crop:
  """How images are cropped and flipped anew instead of being seen in the evaluation view, whose size and photometric
  operations they keep.

  Attributes:
    kind, scale, ratio, flip, interpolation, center_fraction, place, square: `crop` and the others of a `core.method.View`; the values
      here are those of torchvision's RandomResizedCrop and RandomHorizontalFlip.
    seed, epoch: each has its own boxes and flips, which are also a function of the run's seed and the image's number.
  """

  kind: Literal["random_resized", "scaled", "center"] = "random_resized"
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: float = 0.5
  interpolation: Literal["bilinear", "bicubic"] = "bilinear"
  center_fraction: float = 1.0
  place: tuple[float, float] = (0.5, 0.5)
  square: bool = False
  seed: int = 0
  epoch: int = 0

  def __str__(self) -> str:
    low, high = self.scale
    if self.kind == "scaled":
      share = f"{low:g}" if low == high else f"{low:g} to {high:g}"
      part = "the central square of " if self.square else ""
      size = f"the view's size out of {part}images resized to {share} times it / {self.center_fraction:g}"
    else:
      size = f"{low:g} to {high:g} of the area, aspect {self.ratio[0]:.3g} to {self.ratio[1]:.3g}, resized"
    return f"random crops ({size}, {self.interpolation}), flipped with p {self.flip:g}"

  def of(self, view: View) -> View:
    """The evaluation view `view` with this geometry."""
    names = ("scale", "ratio", "flip", "interpolation", "center_fraction", "place", "square")
    return dataclasses.replace(view, crop=self.kind, **{name: getattr(self, name) for name in names})


def seen(view: View) -> str:
  """The geometry of an evaluation view in words, for the protocol: what of an image is seen, and at which size."""
  height, width = view.shape
  how = "whole images, squashed" if view.crop == "none" else "largest center crop"
  if view.crop == "center" and view.center_fraction < 1:
    how = f"center of images resized to {round(min(view.shape) / view.center_fraction)} on the shorter side"
  return f"{how}, {height}x{width}, {view.interpolation}{'' if view.antialias else ' without antialiasing'}"


# A key of `Method.features` or a function of a `core.method.Trunk` and the images of the evaluation view, with a name
# as its str(): hashable, and one object (or equal ones) for every call, as it is compiled.
Output = str | Callable[[Any, Any], Any]
Weights = Literal["current", "random"]
Split = Literal["train", "eval"]


class Images(Protocol):
  """The decoded images of a split: a `data.source.DataSource`.

  Attributes:
    labels: int32 [N], -1 where an image has none; or None.
    class_names: of the labels, or ().
    has_masks: whether `mask` gives one for every image.
    extras: further arrays [N, ...] by key, such as "box".
  """

  labels: np.ndarray | None
  class_names: Sequence[str]
  has_masks: bool
  extras: dict[str, np.ndarray]

  def __len__(self) -> int: ...

  def pixels(self, index: int) -> np.ndarray:
    """uint8 or uint16 [h, w, C]; raises a ValueError that gives the reason for an image that cannot be read."""
    ...

  def mask(self, index: int) -> np.ndarray:
    """Class of every pixel, integers [h, w]; raises as `pixels`."""
    ...

  def name(self, index: int) -> str: ...

  def describe(self) -> dict[str, Any]: ...


class Clip(Protocol):
  """A video whose objects are marked: a `data.clips.Clip`, read frame by frame."""

  name: str

  def __len__(self) -> int: ...

  def frame(self, index: int) -> np.ndarray:
    """uint8 [h, w, C]."""
    ...

  def mask(self, index: int) -> np.ndarray:
    """Integers [h, w]: 0 is background, 1 and on are the objects, 255 is not judged."""
    ...


class Extract(Protocol):
  """What an evaluator sees of a run: features of whole splits, and for dense evaluations the images and the backbone.

  `output` is a key of `Method.features`, a function of the trunk (`Output`), or "pixels", the evaluation view itself;
  `weights` "random" is the initialization. With a `crop` the images are cropped and flipped by it: the same rows, the same
  numbers for any mesh, computed at every call and never kept.
  """

  def __call__(
    self, split: Split, *, output: Output = "pooled", weights: Weights = "current", crop: Crop | None = None
  ) -> Features: ...

  def images(self, split: Split) -> Images:
    """The images as decoded, at their own sizes."""
    ...

  @property
  def stride(self) -> tuple[int, int]:
    """Pixels per token of the backbone, vertically and horizontally; (1, 1) for one that takes any size."""
    ...

  @property
  def size(self) -> tuple[int, int]:
    """Height and width of the evaluation view."""
    ...

  def folder(self, path: str, *, field: str) -> Images:
    """Every image below another folder than the run's data, in the order of their relative paths, which are the names.

    Raises:
      UserError: no such folder, or no image in it; `field` is the config path that names it.
    """
    ...

  def clips(self, path: str = "", *, field: str) -> Sequence[Clip]:
    """The clips of a folder in the layout of DAVIS, or where `path` is "" those of the held-out data, () where it has none.

    Raises:
      UserError: another layout, or a sequence with frames or masks missing; `field` is the config path that names it.
    """
    ...

  def apply(self, function: Callable[[Any, Any], Any], images: np.ndarray, *, weights: Weights = "current") -> Any:
    """`function(trunk, images)` on the devices, its outputs on the host, the same on every process and for any mesh.

    Args:
      function: of a `core.method.Trunk` and the normalized images; compiled once per function and shape, so give a
        function of a module or a method of the frozen evaluator, not a new lambda each time. Its outputs have a row per
        image.
      images: [B, H, W, C] float32 in [0, 1]; they get the photometric operations of the evaluation view, which normalize.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Report:
  """What an evaluator found.

  Attributes:
    metrics: by name.
    protocol: in words, which is printed next to them.
    images: that the metrics are shares or means of, or the queries or objects where they are of these; by metric where
      they differ. None is all held-out images with a label.
  """

  metrics: dict[str, float]
  protocol: str
  images: int | Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(abc.ABC):
  """An evaluation of frozen features.

  Attributes:
    every: cadence in training; None is once, at the end.
    output: which output of `Method.features` is read.
    unlabeled: left out where a held-out image has a label.
  """

  every: Interval | None = None
  output: str = "pooled"
  unlabeled: bool = False

  @abc.abstractmethod
  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    """Evaluates the features that `extract` gives; every process calls it and gets the same report."""


@dataclasses.dataclass(frozen=True)
class Pair:
  """Labeled features to fit on and to score, and the prefix of their metrics.

  Attributes:
    cropped: features of the images of a split, rows as in `train` or `held_out`, when they are cropped and flipped anew.
  """

  prefix: str
  train: Features
  held_out: Features
  cropped: Callable[[Split, Crop], Features]


def pairs(extract: Extract, *, output: Output, baselines: bool) -> Iterator[Pair]:
  """The current features, then the yardsticks: the random initialization and standardized raw pixels.

  Images without a label (None, or -1) are left out; nothing is yielded where that leaves none.

  Raises:
    UserError: features that are not finite, or a label below -1.
  """
  for prefix, name, weights in _kinds(output, baselines):
    train, held_out = (labeled(extract(split, output=name, weights=weights), name=name) for split in ("train", "eval"))
    if train is None or held_out is None:
      return
    scale = _scale(train, name=name)
    cropped = functools.partial(_cropped, extract, scale=scale, output=name, weights=weights)
    train = scale(train)
    yield Pair(prefix, train, _told(scale(held_out), baselines, by="training"), cropped)


def _cropped(
  extract: Extract, split: Split, crop: Crop, *, scale: Callable[[Features], Features], output: Output, weights: Weights
) -> Features:
  return scale(labeled(extract(split, output=output, weights=weights, crop=crop), name=output))


def held_out_only(extract: Extract, *, output: str, baselines: bool) -> Iterator[tuple[str, Features]]:
  """As `pairs` where nothing is fitted: prefix and held-out features. Raw pixels are standardized by these images.

  Raises:
    UserError: features that are not finite.
  """
  for prefix, name, weights in _kinds(output, baselines):
    found = labeled(extract("eval", output=name, weights=weights), name=name)
    if found is None:
      return
    yield prefix, _told(_scale(found, name=name)(found), baselines, by="held-out")


def _told(features: Features, baselines: bool, *, by: str) -> Features:
  """With the yardsticks in the words that end a protocol."""
  words = f"raw_pixels: those of the view, standardized by the {by} images" if baselines else ""
  return dataclasses.replace(features, source="; ".join(filter(None, (features.source, words))))


def _kinds(output: Output, baselines: bool) -> list[tuple[str, Output, Weights]]:
  """Prefix, output and weights of what is evaluated."""
  yardsticks = [("random_init/", output, "random"), ("raw_pixels/", "pixels", "current")]
  return [("", output, "current"), *(yardsticks if baselines else [])]


def labeled(features: Features, *, name: Output) -> Features | None:
  """The rows that have a label; None where there are none."""
  if features.labels is None or not np.any(features.labels >= 0):
    return None
  check_finite(features, name=name)
  keep = features.labels >= 0
  if keep.all():
    return features
  return take(features, keep)


def check_finite(features: Features, *, name: Output) -> None:
  """Raises UserError where a row of output `name` has a NaN or an infinity."""
  bad = int(np.sum(~np.all(np.isfinite(features.features), axis=1)))
  if bad:
    raise UserError(
      f"config.evals: output '{name}' is not finite for {bad} of {len(features.features)} images; the weights diverged."
    )


def take(features: Features, rows: np.ndarray) -> Features:
  """Some rows, by a mask or by numbers."""
  arrays = ("features", "labels", "index", "used_in_training")
  values = {name: getattr(features, name) for name in arrays}
  return dataclasses.replace(features, **{k: None if v is None else v[rows] for k, v in values.items()})


@dataclasses.dataclass(frozen=True)
class Choice:
  """Training images to fit on and to choose among the fits by, and in words how they were parted.

  Attributes:
    fit, judge: [N] bool; disjoint, but the same where no class has two images.
    words: of `judge`.
  """

  fit: np.ndarray
  judge: np.ndarray
  words: str


def part_tenth(labels: np.ndarray) -> Choice:
  """A tenth of the labeled images, for choosing: drawn class by class with a fixed seed, never a class's only image.

  Rows at fixed distances would be a class of their own where the labels repeat, and the whole of one where each has one
  image. Every class is in `fit`.

  Args:
    labels: [N] integers.
  """
  every = np.arange(len(labels))
  order = np.lexsort((np.random.default_rng(0).permutation(len(labels)), labels))  # by class, shuffled inside
  first = np.append(True, np.diff(labels[order]) != 0)[: len(labels)]
  drawn = (every % 10 == 9) & ~first
  if not drawn.any():
    drawn[np.flatnonzero(~first)[-1:]] = True
  if not drawn.any():
    return Choice(drawn | True, drawn | True, "the training images themselves (no class has two)")
  judge = np.zeros(len(labels), bool)
  judge[order] = drawn
  return Choice(~judge, judge, "a tenth of the training images, drawn class by class")


def _scale(train: Features, *, name: Output) -> Callable[[Features], Features]:
  """Of pixels each dimension less its mean over the training images, divided by its deviation there; others as they are."""
  if name != "pixels":
    return lambda f: f
  mean, std = train.features.mean(0), train.features.std(0) + 1e-6
  return lambda f: dataclasses.replace(f, features=(f.features - mean) / std)


def unit(x: np.ndarray) -> np.ndarray:
  """Rows of `x` [N, D] divided by their Euclidean norm."""
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
