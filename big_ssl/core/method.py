"""The protocol of a self-supervised system: what it wants to see, what it minimizes, what it remembers."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from big_ssl.core.packing import Packing
from big_ssl.core.types import (
  Array,
  Extra,
  Interval,
  Metrics,
  Params,
  Rule,
  Size,
  TrainState,
  UserError,
  nearest,
  sides,
)

Augment = Callable[[Array, Array], Array]  # (key, image [H, W, C] float32 in [0, 1]) -> image; a frozen dataclass


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
  """One kind of crop of an image; the method finds it as `batch[name]`, [B, count, H, W, C].

  Attributes:
    name: key in the batch.
    size: output side in pixels, or (height, width).
    count: how many independent copies are drawn per image.
    crop: how the box is chosen: "random_resized" as torchvision's RandomResizedCrop (10 tries, then a clamped
      center crop); "clipped" one draw, its sides clipped to the image (BYOL); "center" the largest box of the output's
      aspect, shrunk by `center_fraction`; "none" the whole image, squashed; "scaled" the output's pixels of the image
      resized, its shorter side to that of the output / `center_fraction` times a factor out of `scale`; the place is
      drawn, and what the image does not fill is black on the right and at the bottom (on the left where flipped).
    place: of the box of "center", shares of the room above it and to its left: (0, 0) is a corner instead.
    square: the box of "scaled" is inside the central square of the image.
    scale: range of the crop's share of the image area; for "scaled" of the factor.
    ratio: range of the crop's width/height, drawn log-uniformly.
    flip: probability of a left-right flip.
    interpolation: "bilinear" or "bicubic".
    antialias: the filter is stretched when shrinking, as in PIL; False is tf.image.resize's default.
    center_fraction: for "center": 224/256 is "resize the shorter side to 256, cut the center 224".
    return_box: adds `batch[name + "_box"]`, [B, count, 4]: y0, x0, y1, x1 as shares of the image's height and width;
      `batch[name + "_flip"]`, [B, count] bool; and `batch["size"]`, [B, 2] height and width in pixels of the image (as
      decoded into the canvas). Boxes of "random_resized" are whole pixels: round(box * size) is exact.
    augment: photometric operations, per image, on the device, in this order.
    packing: crops keep their aspect and get the size that their packing gives them, in the top left of `size`;
      `batch[name + "_plan"]` says where their patches go (`augment.patches.pack_native`). Needs count=1, and a batch of
      whole shards on every device.
    like: name of another view of the same stream whose boxes and flips this one has, at its own size.
  """

  name: str
  size: Size
  count: int = 1
  crop: Literal["random_resized", "clipped", "center", "none", "scaled"] = "random_resized"
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: float = 0.5
  interpolation: Literal["bilinear", "bicubic"] = "bilinear"
  antialias: bool = True
  center_fraction: float = 1.0
  place: tuple[float, float] = (0.5, 0.5)
  square: bool = False
  return_box: bool = False
  augment: tuple[Augment, ...] = ()
  packing: Packing | None = None
  like: str = ""

  @property
  def shape(self) -> tuple[int, int]:
    return sides(self.size)


@dataclasses.dataclass(frozen=True)
class Shuffle:
  """Every epoch visits each example once, in an order that is a function of (seed, epoch) alone."""


@dataclasses.dataclass(frozen=True)
class Sequential:
  """Examples in the order of the source, once: evaluation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassBalanced:
  """Every step holds `classes_per_step` classes and `images_per_class` labeled images of each, all different.

  A stream with it has its own batch size. Rows are interleaved, [a, b, c, a, b, c, ...]: the first `classes_per_step` are
  one image of each class. Classes are permuted anew in every pass over them (where they do not divide into steps, a pass
  leaves some out), and so are the images of a class. A method names its own fields like these; errors cite
  config.method.

  Attributes:
    classes_per_step, images_per_class: of the global batch.
    labels_per_class: images of each class whose label is known; 0 is all that have one.
    labels_seed: of the draw of these; the run's seed has no part in it.
    labels_file: instead, a text file with one image per line: its name in the source, the last part of that, or its
      number (then in every line).
  """

  classes_per_step: int
  images_per_class: int
  labels_per_class: int = 0
  labels_seed: int = 0
  labels_file: str = ""

  @property
  def batch_size(self) -> int:
    return self.classes_per_step * self.images_per_class


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """What one stream of batches holds: views of images, and the extra keys (`label`, `mask`, ...) that come along.

  "mask" is [B, H, W], the class of every pixel of the image as decoded: its height and width are `batch["size"]` of a view
  with `return_box`, and 255 lies around it.

  `batch["index"]` [B] int32 is always there.
  """

  views: tuple[View, ...]
  source: str = "train"
  keys: tuple[str, ...] = ()
  mask_labels: tuple[int, ...] = ()  # all that may be in a mask besides 255; () is any
  sampler: Shuffle | Sequential | ClassBalanced = Shuffle()

  def __post_init__(self):
    views = {view.name: view for view in self.views}
    for view in self.views:
      if view.like:
        _check_like(view, views)

  @property
  def batch_size(self) -> int:
    """Images of one step where the sampler decides; 0 is the run's batch."""
    return getattr(self.sampler, "batch_size", 0)


# What a box is drawn from; the box of "center" is also rounded by the size of the view.
_GEOMETRY = ("crop", "scale", "ratio", "flip", "packing")


def _check_like(view: View, views: Mapping[str, View]) -> None:
  """Raises `UserError` where `view.like` names no view, or one whose boxes would be others."""
  where = f"view '{view.name}': like='{view.like}'"
  other = views.get(view.like)
  if other is None or other is view:
    raise UserError(f"{where}: no other view of this name.{nearest(view.like, [n for n in views if n != view.name])}")
  if other.like:
    raise UserError(f"{where}: is itself like '{other.like}'; name that one.")
  different = [name for name in _GEOMETRY if getattr(view, name) != getattr(other, name)]
  if different or view.count > other.count:
    name = different[0] if different else "count"
    raise UserError(f"{where}: has {name}={getattr(view, name)!r}, that one {getattr(other, name)!r}; their boxes would differ.")
  if view.crop in ("center", "scaled") or view.packing:
    raise UserError(f"{where}: boxes of scaled, center and packed crops depend on the size; expected a drawn crop, or 'none'.")


class Extract(Protocol):
  """Outputs of a pure function for every image of the training set, as `Method.refresh` gets it."""

  def __call__(
    self,
    state: TrainState,
    function: Callable[[Params, Extra, dict[str, Array]], Array],
    *,
    views: tuple[View, ...] = (),
    rng: Array | None = None,
  ) -> np.ndarray:
    """Row i belongs to image i of the source; an unreadable image has the row of the one that replaces it.

    Args:
      state: whose params and extra `function` is given.
      function: (params, extra, batch) -> [B, ...]; a method of the frozen `Method`, so that it is compiled once.
      views: () is the evaluation view; others are cut and augmented as in training.
      rng: key of that augmentation; also draws the boxes.

    Returns:
      [num_examples, ...] on the host, the same on every process.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Trunk:
  """The backbone that is evaluated, called as `trunk(images [N, H, W, C], attention_layers=(11,)) -> dict`.

  Attributes:
    module: the backbone; what it gives, and which keywords it takes, are its `__call__`'s.
    variables: {"params": ..., "batch_stats": ...}.
  """

  module: Any
  variables: dict[str, Any]

  def __call__(self, images: Array, **kwargs: Any) -> dict[str, Any]:
    return self.module.apply(self.variables, images, train=False, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
  """A self-supervised system as pure functions; hyper-parameters are the fields, and it holds no array.

  The fields below are filled by the engine from the config and the data, never by the user.

  Attributes:
    model: the backbone, a linen module from `models/`.
    total_steps, batch_size, num_examples: updates of the run, images of one, images of the training set.
    image_channels: of the training images.
    num_classes: of the training labels; 0 where there are none.
  """

  model: Any = None
  total_steps: int = 0
  batch_size: int = 1
  num_examples: int = 0
  image_channels: int = 3
  num_classes: int = 0

  # Class constants.
  supports_accumulation = False  # is the loss a mean over examples?
  accumulation_reason = "its loss is not a mean over examples"
  row_sharded: ClassVar[tuple[str, ...]] = ()  # entries of `extra` whose first axis, where it divides, is split over the devices

  @abc.abstractmethod
  def inputs(self) -> Inputs | dict[str, Inputs]:
    """The views of a training batch; a dict nests the batch by stream."""

  @abc.abstractmethod
  def eval_view(self) -> View:
    """The one deterministic view, named "image", under which features are evaluated."""

  @abc.abstractmethod
  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    """Parameters and extra state; `batch` gives the shapes."""

  @abc.abstractmethod
  def loss(
    self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array
  ) -> tuple[Array, tuple[Extra, Metrics]]:
    """The scalar loss as if one device held the global batch, the new extra state and scalar metrics."""

  def project(self, params: Params) -> Params:
    """Called on the parameters before the loss of every step: unit prototype rows and the like.

    The projected values replace the stored ones; gradient, clipping, decay and trust ratios see them, and the moments are
    left as they are. What the last update of a run leaves is not projected.
    """
    return params

  def post_update(self, params: Params, extra: Extra, step: Array) -> Extra:
    """Called with the NEW params: EMA and the like. `step` is the number of updates before this one."""
    del params, step
    return extra

  @abc.abstractmethod
  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """Evaluation features of `batch["image"]` [B, 1, H, W, C]; "pooled" [B, D] always. Which tree is evaluated is decided here."""

  def assignments(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array | None:
    """Scores [B, K] of `batch["image"]` for the prototypes, clusters or classes of the (first) head; None without any."""
    return self.features(params, extra, batch).get("logits")

  def trunk(self, params: Params, extra: Extra) -> Trunk:
    """The backbone under `features`, for evaluators that read tokens, attention or other image sizes; the student's here."""
    return self.trunk_of(params["encoder"], extra.get("batch_stats", {}))

  def trunk_of(self, params: Params, batch_stats: Extra) -> Trunk:
    """The backbone of one encoder's trees."""
    return Trunk(self.model, {"params": params["backbone"], "batch_stats": batch_stats.get("backbone", {})})

  def param_rules(self) -> tuple[Rule, ...]:
    """Ordered rules; every parameter must match one."""
    return (Rule(pattern=r"(bias|scale)$", weight_decay=0.0, trust_ratio=False), Rule(pattern=r".*"))

  def refresh_steps(self) -> Sequence[int]:
    """The steps right before which `refresh` is called, ascending; none by default (see `steps_every`)."""
    return ()

  def refresh(self, state: TrainState, extract: Extract, rng: Array) -> tuple[TrainState, dict[str, float]]:
    """Epoch-level work on the host: clustering, banks, new heads with their optimizer state.

    A function of its arguments alone: a run that is killed inside repeats it from the checkpoint before. `state.step`
    must not change. The numbers returned are logged with every line until the next refresh.
    """
    del extract, rng
    return state, {}

  def refresh_memory(self) -> dict[str, int]:
    """Bytes that a refresh takes besides the state, by what they are for; printed before the start."""
    return {}

  def plan(self, extra: Extra, epoch: int, seed: int) -> np.ndarray | None:
    """The index order of one epoch, [num_examples] integers, from checkpointed state only; None leaves it to the sampler.

    Asked anew after every refresh, for streams that shuffle.
    """
    del extra, epoch, seed
    return None

  @property
  def steps_per_epoch(self) -> float:
    return self.num_examples / self.batch_size

  def steps_every(self, interval: Interval) -> Sequence[int]:
    """0, every, 2 every, ... below `total_steps`: the usual `refresh_steps`.

    Each is rounded by itself: an epoch is rarely a whole number of steps, and these must not drift away from the data's.
    """
    size = {"batch_size": self.batch_size, "examples": self.num_examples}
    if interval.steps(**size) <= 1 or interval.unit == "steps":
      return range(0, self.total_steps, max(interval.steps(**size), 1))
    multiples = (dataclasses.replace(interval, value=i * interval.value).steps(**size) for i in itertools.count())
    return tuple(itertools.takewhile(lambda step: step < self.total_steps, multiples))

  def replace(self, **changes: Any) -> Method:
    return dataclasses.replace(self, **changes)


def as_streams(inputs: Inputs | dict[str, Inputs]) -> dict[str, Inputs]:
  """A single stream is the stream named ""."""
  return {"": inputs} if isinstance(inputs, Inputs) else dict(inputs)


