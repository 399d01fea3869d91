"""Linear segmentation: a probe on the frozen features of the patches, scored by mIoU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array, PyTree, Size, UserError
from big_ssl.evals import dense_probe
from big_ssl.evals.base import Evaluator, Extract, Images, Report, Weights
from big_ssl.evals.windows import Reader, filled
from big_ssl.models.dense import pad_to_stride, patch_map
from big_ssl.ops import segmentation as ops

_MOST_CLASSES = 1000  # where nothing says how many there are, a larger label is taken for a mistake


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Evaluator):
  """ "miou", "mean_dice", "pixel_accuracy", "mean_accuracy" and "iou/<class>", in percent, of a linear probe on the frozen
  patches.

  The head of dinov3's linear protocol (dropout of channels, BN, 1x1 convolution; AdamW, warm-up, cosine; public code) is
  trained on features that are cached in half precision: without augmentation, and with fewer steps, own choices that
  make it a matter of minutes. Logits are enlarged to the size of the labels before the loss. Predictions are scored at
  the size of the masks as they are in the data, over all images together; ignored pixels count for nothing.

  head="trained" scores the decoder of the method "segmentation" instead, and fits nothing.

  Attributes:
    head: "probe" or "trained".
    layers: how many of the last blocks or stages are read, concatenated.
    size: to which images are resized, antialiased bilinear: pixels of the shorter side, (height, width), or 0 for their
      own size. Masks of training images are resized with them, to the nearest pixel.
    window: side of square windows into which resized images are cut, for training and for scoring; 0 takes them whole.
    stride: of the windows, 0 is two thirds of `window` (Segmenter, dinov3). Where they overlap, logits are averaged.
    scales, flip: also score at so many times `size` and mirrored, and average the probabilities; training has neither.
    steps, batch_size: updates of the head, and windows or images of one; also images per pass of the backbone.
    lrs: learning rates; the best mIoU on a tenth of the training images wins. With one, all images are trained on.
    weight_decay, dropout: of the head.
    ignore: label, as in the masks, that counts for nothing; -1 is none. CamVid's is 11 here.
    drop_first: neither does label 0, and label 1 is the first class (ADE20K).
    num_classes: 0 is the largest label of the training masks and one.
    class_names: for the metrics, instead of numbers.
    max_images: of either split, evenly spaced; 0 is all.
    memory_gib: at most so much for the cached features; training images that do not fit are left out, at random.
    baselines: also report the same protocol on the random initialization and on the mean color of each patch.
  """

  head: Literal["probe", "trained"] = "probe"
  layers: int = 1
  size: Size = 0
  window: int = 0
  stride: int = 0
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False
  steps: int = 500
  batch_size: int = 16
  lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
  weight_decay: float = 1e-3
  dropout: float = 0.1
  ignore: int = 255
  drop_first: bool = False
  num_classes: int = 0
  class_names: tuple[str, ...] = ()
  max_images: int = 0
  memory_gib: float = 4.0
  baselines: bool = False

  def __post_init__(self):
    least = {
      "layers": 1,
      "window": 0,
      "stride": 0,
      "steps": 1,
      "batch_size": 1,
      "weight_decay": 0,
      "num_classes": 0,
      "max_images": 0,
    }
    for name, bound in least.items():
      self._need(getattr(self, name) >= bound, name, f"at least {bound}")
    sides = self.size if isinstance(self.size, tuple) else (self.size or 1,)
    self._need(min(sides) >= 1, "size", "pixels of the shorter side, (height, width), or 0 for the images' own size")
    self._need(self.window > 0 or not self.stride, "stride", "0 without config.evals.segmentation.window")
    self._need(self.stride <= self.window, "stride", f"at most config.evals.segmentation.window={self.window}, or pixels are left out")
    self._need(bool(self.scales) and min(self.scales) > 0, "scales", "positive numbers")
    self._need(bool(self.lrs) and min(self.lrs) > 0, "lrs", "positive numbers")
    self._need(0 <= self.dropout < 1, "dropout", "a rate in [0, 1)")
    self._need(self.memory_gib > 0, "memory_gib", "a positive number")
    self._need(self.output == "pooled", "output", "nothing: the map of the patches is read")

  def _need(self, ok: bool, name: str, accepted: str) -> None:
    if not ok:
      raise UserError(f"config.evals.segmentation.{name}={getattr(self, name)}: expected {accepted}.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # the backbone runs on all devices, the fit of the small head on one, on every process alike
    if not all(extract.images(split).has_masks for split in ("train", "eval")):
      return Report({}, "segmentation not computed: the data has no masks")
    metrics, protocol, scored = {}, "", 0
    for prefix, function, weights in self._kinds():
      apply = functools.partial(extract.apply, function, weights=weights)
      stride = self.stride or max(2 * self.window // 3, 1)
      read = Reader(apply, extract.stride, self.batch_size, size=self.size, window=self.window, stride=stride)
      fitted = None if self.head == "trained" else self._fit(read, extract.images("train"))
      unreadable: list[str] = []
      counts = self._score(read, extract.images("eval"), fitted, unreadable)
      if counts is None or not counts.sum():
        why = f", {len(unreadable)} of the images cannot be read, {unreadable[0]}" if unreadable else ""
        return Report({}, f"segmentation not computed: no pixel of the held-out masks counts{why}")
      metrics |= {f"{prefix}{k}": v for k, v in self._metrics(counts, classes=not prefix).items()}
      scored = len(self._rows(extract.images("eval"))) - len(unreadable)
      protocol = protocol or self._protocol(extract.images("eval"), fitted, counts, scored)
    return Report(metrics, protocol, images=scored)

  def _kinds(self) -> list[tuple[str, Callable[..., Any], Weights]]:
    """Prefix, what is read of the backbone, and its weights."""
    if self.head == "trained":
      return [
        ("", trained_logits, "current"),
        *([("random_init/", trained_logits, "random")] if self.baselines else []),
      ]
    yardsticks = [("random_init/", self.features, "random"), ("raw_colors/", self.colors, "current")]
    return [("", self.features, "current"), *(yardsticks if self.baselines else [])]

  def features(self, trunk: Any, images: Array) -> Array:
    """[N, h, w, D]"""
    return patch_map(trunk, images, layers=self.layers)

  def colors(self, trunk: Any, images: Array) -> Array:
    """The mean color of what is under each patch, [N, h, w, C]."""
    grid = self.features(trunk, images).shape[:3]
    return jax.image.resize(
      pad_to_stride(images, module=trunk.module), (*grid, images.shape[-1]), "linear", antialias=True
    )

  # Training

  def _fit(self, read: Reader, images: Images) -> _Fitted:
    cached = self._cache(read, images)
    recipe = dense_probe.Recipe(
      classes=cached.classes,
      steps=self.steps,
      batch_size=self.batch_size,
      lrs=self.lrs,
      weight_decay=self.weight_decay,
      dropout=self.dropout,
    )
    tenth = (cached.image % 10 == 0) & (len(self.lrs) > 1)
    train = ~tenth if not tenth.all() else tenth
    heads = dense_probe.fit(cached.maps[train], labels=cached.labels[train], padded=cached.padded, recipe=recipe)
    best = self._best(heads, cached, tenth, recipe) if len(self.lrs) > 1 else 0
    head = jax.tree.map(lambda x: x[best], heads)
    return _Fitted(head, recipe, self.lrs[best], cached)

  def _best(self, heads: PyTree, cached: _Cached, rows: np.ndarray, recipe: dense_probe.Recipe) -> int:
    """The head with the largest mIoU on the windows `rows`, as they were cached."""
    shape, rows = cached.labels.shape[1:], np.flatnonzero(rows)
    counts = np.zeros((len(self.lrs), cached.classes, cached.classes), np.int64)
    for start in range(0, len(rows), self.batch_size):
      now = rows[start : start + self.batch_size]
      found = dense_probe.predict(
        heads, filled(cached.maps[now], self.batch_size), padded=cached.padded, shape=shape, recipe=recipe
      )
      found = np.asarray(found)[:, : len(now)]
      counts += np.stack([ops.confusion(f, labels=cached.labels[now], num_classes=cached.classes) for f in found])
    return int(np.argmax([np.nan_to_num(ops.scores(c).mean_iou) for c in counts]))

  def _cache(self, read: Reader, images: Images) -> _Cached:
    """Features and classes of the windows of the training images, in a fixed random order, until the memory is full."""
    maps, labels, numbers, size, used = [], [], [], 0, 0
    rows = np.random.default_rng(0).permutation(self._rows(images))
    unreadable: list[str] = []
    for part in read.parts(images, rows, self._classes, unreadable=unreadable):
      resized = ops.cut_windows(ops.resize_mask(part.mask, shape=part.plan.shape), plan=part.plan).astype(np.int16)
      if maps and resized.shape[1:] != labels[0].shape[1:]:
        sizes = " and ".join(f"{h}x{w}" for h, w in (labels[0].shape[1:], resized.shape[1:]))
        raise UserError(
          f"config.evals.segmentation.size={self.size}: training images become {sizes}; give (height, width), or a window."
        )
      half = part.maps.astype(np.float16)
      if not np.isfinite(half).all():
        raise UserError(
          f"config.evals: features of {images.name(part.index)} are not finite in half precision; the weights diverged."
        )
      size += half.nbytes + resized.nbytes
      if maps and size > self.memory_gib * 2**30:
        break
      maps.append(half)
      labels.append(resized)
      numbers.append(np.full(len(resized), used))
      used += 1
    if not maps:
      raise UserError(f"config.evals.segmentation: none of {len(rows)} training images can be read, {unreadable[0]}.")
    joined = np.concatenate(labels)
    if joined.max() < 0:
      raise UserError(f"config.evals.segmentation.ignore={self.ignore}: no pixel of the training masks counts.")
    classes = self.num_classes or int(joined.max()) + 1
    return _Cached(
      np.concatenate(maps),
      joined,
      np.concatenate(numbers),
      read.padded(part.plan.window),
      classes,
      used,
      len(rows),
      len(unreadable),
    )

  # Scoring

  def _score(self, read: Reader, images: Images, fitted: _Fitted | None, unreadable: list[str]) -> np.ndarray | None:
    """Confusion counts of the held-out images, at the sizes of their masks."""
    counts = None
    sums: dict[int, Any] = {}
    variants = len(self.scales) * (1 + self.flip)
    for part in read.parts(
      images, self._rows(images), self._classes, scales=self.scales, flip=self.flip, unreadable=unreadable
    ):
      logits = part.maps if fitted is None else dense_probe.apply(fitted.head, part.maps, recipe=fitted.recipe)
      counts = np.zeros((logits.shape[-1],) * 2, np.int64) if counts is None else counts
      found = _probabilities(
        logits, padded=read.padded(part.plan.window), plan=part.plan, shape=part.mask.shape, flipped=part.flipped
      )
      done, total = sums.pop(part.index, (0, 0.0))
      if done + 1 < variants:
        sums[part.index] = (done + 1, total + found)
        continue
      known = max(len(counts), int(part.mask.max()) + 1)  # a class without a training pixel is missed everywhere
      new = ops.confusion(np.asarray(jnp.argmax(total + found, -1)), labels=part.mask, num_classes=known)
      counts = np.pad(counts, (0, known - len(counts))) + new
    return counts

  # Images

  def _rows(self, images: Images) -> np.ndarray:
    count = min(len(images), self.max_images or len(images))
    return np.linspace(0, len(images) - 1, count).astype(int)

  def _classes(self, images: Images, index: int) -> np.ndarray:
    """The mask as classes, int32, -1 where a pixel does not count."""
    mask = ops.to_classes(np.asarray(images.mask(index)), ignore=self.ignore, drop_first=self.drop_first)
    limit = self.num_classes or _MOST_CLASSES
    if mask.max() >= limit or mask.min() < -1:
      wrong = int(mask.max() if mask.max() >= limit else mask.min()) + self.drop_first
      path = f"config.evals.segmentation.num_classes={self.num_classes}"
      raise UserError(f"{path}: the mask of {images.name(index)} holds the label {wrong}; ignored is {self.ignore}.")
    return mask

  # Reporting

  def _metrics(self, counts: np.ndarray, *, classes: bool) -> dict[str, float]:
    found = ops.scores(counts)
    out = {"miou": found.mean_iou, "mean_dice": found.mean_dice, "mean_accuracy": found.mean_accuracy}
    out["pixel_accuracy"] = found.pixel_accuracy
    if classes:
      names = [*self.class_names, *map(str, range(len(self.class_names), len(counts)))]
      out |= {f"iou/{name}": iou for name, iou in zip(names, found.iou, strict=False) if not np.isnan(iou)}
    return {name: 100.0 * float(value) for name, value in out.items()}

  def _protocol(self, held_out: Images, fitted: _Fitted | None, counts: np.ndarray, scored: int) -> str:
    size = f"{self.size} px on the shorter side" if isinstance(self.size, int) else f"{self.size[0]}x{self.size[1]} px"
    size = size if self.size else "their own size"
    windows = f", windows of {self.window} px every {self.stride or 2 * self.window // 3}" if self.window else ""
    averaged = f", probabilities averaged over scales {self.scales}{' and mirrored' if self.flip else ''}"
    averaged = averaged if self.scales != (1.0,) or self.flip else ""
    ignored = f"label {self.ignore} ignored" + (", label 0 dropped" if self.drop_first else "")
    return (
      f"{'segmentation by the trained decoder' if fitted is None else self._fit_protocol(fitted)}, images at {size}{windows},"
      f" mIoU over all pixels of {scored} held-out images at the size of their masks{averaged},"
      f" {len(counts)} classes, {ignored}, {int(counts.sum())} pixels, {held_out.describe()['name']}"
    )

  def _fit_protocol(self, fitted: _Fitted) -> str:
    cached = fitted.cached
    edge = " (at the edge of these)" if fitted.lr in (min(self.lrs), max(self.lrs)) else ""
    lr = (
      f"{fitted.lr:g} of {self.lrs} by a tenth of the training images{edge}, fitted on the others"
      if len(self.lrs) > 1
      else f"{fitted.lr:g}"
    )
    left_out = f", {cached.unreadable} unreadable" if cached.unreadable else ""
    return (
      f"linear segmentation, {cached.maps.shape[-1]} dimensions of the patches (last {self.layers} layers, BN, 1x1 convolution, dropout"
      f" {self.dropout:g}), {self.steps} AdamW steps of {min(self.batch_size, len(cached.maps))}, decay {self.weight_decay:g}, lr {lr},"
      f" {cached.used} of {cached.of} training images{left_out}, no augmentation"
    )


def trained_logits(trunk: Any, images: Array) -> Array:
  """[N, h, w, classes] by the decoder of the method "segmentation"."""
  if not hasattr(trunk, "segment"):
    raise UserError(
      "config.evals.segmentation.head='trained': config.method has no decoder; 'probe' fits one, or use the method 'segmentation'."
    )
  return trunk.segment(images)


@dataclasses.dataclass(frozen=True)
class _Cached:
  """maps [N, h, w, D], labels [N, H, W] and the number of the image of each window; `used` images `of` those there are."""

  maps: np.ndarray
  labels: np.ndarray
  image: np.ndarray
  padded: tuple[int, int]
  classes: int
  used: int
  of: int
  unreadable: int


@dataclasses.dataclass(frozen=True)
class _Fitted:
  """The head, the learning rate it had, and what it was fitted on."""

  head: PyTree
  recipe: dense_probe.Recipe
  lr: float
  cached: _Cached


@functools.partial(jax.jit, static_argnames=("padded", "plan", "shape", "flipped"))
def _probabilities(
  logits: Array, *, padded: tuple[int, int], plan: ops.Windows, shape: tuple[int, int], flipped: bool
) -> Array:
  full = dense_probe.upsampled(logits, padded=padded, shape=plan.window)
  return ops.probabilities(full, plan=plan, shape=shape, flipped=flipped)
