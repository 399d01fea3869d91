"""Attention of CLS as a mask of the objects (DINO, arXiv 2104.14294, figure 4 and appendix; released code, dino issue 54)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Images, Report, Weights
from big_ssl.evals.descriptors import resize, spread
from big_ssl.models.dense import class_attention
from big_ssl.models.vit import ViT
from big_ssl.ops import mask_scores
from big_ssl.ops.segmentation import resize_mask

PATH = "config.evals.attention_masks"


@dataclasses.dataclass(frozen=True)
class _Picture:
  """image float32 [H, W, C] in [0, 1], and labels [H, W], of the same size, which patches divide."""

  image: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMasks(Evaluator):
  """Jaccard index of the patches that hold most of a head's attention with the objects of an image, in percent.

  "jaccard" takes the best head for each object, "jaccard_mean_head" the mean over heads, "jaccard_head_2" one of them; means
  over the objects of an image, then over images. An object is a label of the mask other than 0, the background, and
  `ignore`, which is part of no object. The defaults are for small images; DINO's figures (VOC 2012: 45.9, random 22.0) are of size=480.

  Attributes:
    output: the attention of CLS to the patches, or its mean over the patches in a backbone without CLS.
    layer: block whose attention is taken, -1 is the last.
    keep: share of a head's attention that its mask holds.
    ignore: label, as in the masks, that is no object, and counts against a mask that covers it; -1 is none.
    size: side in pixels to which images are squashed, or (height, width); 0 leaves them as they are, and compiles for each
      size. What patches do not divide is cut off.
    max_images: use only so many held-out images, evenly spaced; 0 is all.
    batch_size: images at a time.
    baselines: also report the random initialization.
  """

  output: Literal["attention"] = "attention"
  layer: int = -1
  keep: float = 0.6
  ignore: int = 255
  size: int | tuple[int, int] = 96
  max_images: int = 1000
  batch_size: int = 32
  baselines: bool = False

  def __post_init__(self):
    if not 0 < self.keep < 1:
      raise UserError(f"{PATH}.keep={self.keep}: expected a share between 0 and 1.")
    for name, low in (("max_images", 0), ("batch_size", 1)):
      if getattr(self, name) < low:
        raise UserError(f"{PATH}.{name}={getattr(self, name)}: expected at least {low}.")
    if (self.size if isinstance(self.size, int) else min(self.size) - 1) < 0:
      raise UserError(f"{PATH}.size={self.size}: expected pixels, or 0 for the size of each image.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # the images are spread over the devices
    images = extract.images("eval")
    if not images.has_masks:
      return Report({}, "attention masks not computed: the data has no masks")
    unreadable: list[str] = []
    scores = self._score(extract, images, "current", unreadable)
    if scores is None:
      return Report({}, "attention masks not computed: the backbone has no attention of CLS to patches in every block")
    if not len(scores):
      why = f", {len(unreadable)} of the images cannot be read, {unreadable[0]}" if unreadable else ""
      return Report({}, f"attention masks not computed: no object in any mask{why}")
    metrics = {f"jaccard_head_{i}": float(value) for i, value in enumerate(scores[:, 1:].mean(axis=0))} | _summary(scores)
    if self.baselines:
      random = _summary(self._score(extract, images, "random", []))
      metrics |= {f"random_init/{name}": value for name, value in random.items()}
    protocol = self._protocol(extract, images, count=len(scores), heads=scores.shape[1] - 1)
    return Report(metrics, f"{protocol}, {len(unreadable)} cannot be read" if unreadable else protocol, images=len(scores))

  def _score(self, extract: Extract, images: Images, weights: Weights, unreadable: list[str]) -> np.ndarray | None:
    """Percent [images, 1 + heads]: of the best head for each object, and of every head; None without attention.

    An image that cannot be read, and one without an object, has no row; `unreadable` gets the names of the former, with
    the reasons.
    """
    rows = []
    for group in self._groups(extract, images, unreadable):
      filled = [p.image for p in group] + [np.zeros_like(group[0].image)] * (self.batch_size - len(group))
      attention = extract.apply(self.attention, np.stack(filled), weights=weights).get("attention")
      if attention is None:
        return None
      for picture, maps in zip(group, attention):
        masks = mask_scores.mass_masks(maps, keep=self.keep)
        steps = [full // n for full, n in zip(picture.labels.shape, masks.shape[1:], strict=True)]
        found = mask_scores.jaccard(masks.repeat(steps[0], axis=1).repeat(steps[1], axis=2), labels=picture.labels, void=self.ignore)
        rows.append([found.max(axis=1).mean(), *found.mean(axis=0)])
    return 100.0 * np.asarray(rows)

  def _groups(self, extract: Extract, images: Images, unreadable: list[str]) -> Iterator[list[_Picture]]:
    """Yields pictures of one size, at most `batch_size` of them."""
    waiting: dict[tuple[int, ...], list[_Picture]] = {}
    for index in spread(len(images), most=self.max_images):
      try:
        picture = self._prepared(images.pixels(int(index)), images.mask(int(index)), extract.stride)
      except UserError:
        raise
      except ValueError as error:  # cannot be read
        unreadable.append(f"{images.name(int(index))}: {error}")
        continue
      if not len(mask_scores.object_labels(picture.labels, void=self.ignore)):
        continue
      group = waiting.setdefault(picture.image.shape, [])
      group.append(picture)
      if len(group) == self.batch_size:
        yield waiting.pop(picture.image.shape)
    yield from waiting.values()

  def _prepared(self, pixels: np.ndarray, labels: np.ndarray, stride: tuple[int, int]) -> _Picture:
    from PIL import Image

    shape = pixels.shape[:2] if self.size == 0 else (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
    height, width = (side - side % step for side, step in zip(shape, stride, strict=True))
    if not height or not width:
      raise UserError(f"{PATH}.size={self.size}: an image of {shape} is smaller than a patch of {stride}.")
    image = resize(pixels, change=lambda x: x.resize(shape[::-1], Image.Resampling.BILINEAR))
    return _Picture(image[:height, :width] / np.float32(255), resize_mask(labels, shape=shape)[:height, :width])

  def attention(self, trunk: Any, images: Any) -> dict[str, Any]:
    """{"attention": [B, heads, h, w]} of normalized images [B, H, W, C]; {} for a backbone that has none."""
    return {"attention": class_attention(trunk, images, layer=self.layer)} if isinstance(trunk.module, ViT) else {}

  def _protocol(self, extract: Extract, images: Images, *, count: int, heads: int) -> str:
    layer = "the last block" if self.layer == -1 else f"block {self.layer}"
    size = "at their own size" if self.size == 0 else f"squashed to {self.size}, antialiased bilinear"
    return (
      f"attention masks: attention of CLS to the patches (without CLS, its mean over them) in {layer}, {heads} heads, the patches"
      f" with {self.keep:g} of its mass, enlarged by nearest neighbors ({'x'.join(map(str, extract.stride))}); Jaccard with the"
      f" labels other than 0 and {self.ignore}, best head for each object, mean over the objects of an image, then over {count} of"
      f" {len(images)} held-out images, {size}, normalized as in evaluation, of {images.describe()['name']}"
    )


def _summary(scores: np.ndarray) -> dict[str, float]:
  return {"jaccard": float(scores[:, 0].mean()), "jaccard_mean_head": float(scores[:, 1:].mean())}
