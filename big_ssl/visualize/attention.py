"""Where the class token looks: attention per head of a block (arXiv 2104.14294, section 4.2.2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from big_ssl.core.types import Array
from big_ssl.models.dense import class_attention
from big_ssl.visualize import drawing
from big_ssl.visualize.drawing import Picture
from big_ssl.visualize.subject import Options, Subject

_TILE = 120  # pixels of the shorter side of the tallest tile


@dataclasses.dataclass(frozen=True)
class _Attention:
  """As a function of the layer, equal to others of it, so that it is compiled once."""

  layer: int

  def __call__(self, trunk: Any, images: Array) -> Array:
    return class_attention(trunk, images, layer=self.layer)


def draw(subject: Subject, options: Options) -> list[Picture]:
  """A row per image: the image, the mean of the heads on it, and every head.

  Raises:
    UserError: the backbone has no attention of CLS to patches, or not this block.
  """
  chosen = subject.choose(options.count)
  images = [subject.seen(c.pixels, options.size) for c in chosen]
  maps = subject.maps(_Attention(options.layer), images)
  rows = [[drawing.words(t, width=_TILE) for t in ("image", "all heads", *(f"head {i + 1}" for i in range(len(maps[0]))))]]
  rows += [_row(image, heads) for image, heads in zip(images, maps, strict=True)]
  module = subject.run.method.model
  block = options.layer % module.size().depth + 1
  whose = "the class token" if module.class_token else "the mean of all queries (there is no class token)"
  registers = f" The {module.registers} registers are left out." if module.registers else ""
  shapes = sorted({f"{h}x{w}" for h, w in (i.shape[:2] for i in images)})
  caption = (
    f"Attention of {whose} to the patches in block {block} of {module.size().depth}, brightest from each map's"
    f" own 97th percentile on; patches of {module.patch} px, images seen at {', '.join(shapes[:3])}{' and other sizes' if len(shapes) > 3 else ''} px.{registers}"
  )
  return [Picture("attention", drawing.grid(rows), caption)]


def scaled(weights: np.ndarray) -> np.ndarray:
  """[0, 1], where 1 is the 97th percentile and above: single patches often take most of the attention."""
  return np.clip(weights / max(float(np.percentile(weights, 97)), 1e-12), 0, 1)


def overlay(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """The image [h, w, C] in [0, 1], lit where `weights` [h', w'] are large; uint8."""
  light = drawing.enlarge(scaled(weights), height=image.shape[0], width=image.shape[1])[..., None]
  return drawing.to_rgb(drawing.to_rgb(image) / 255 * (0.15 + 0.85 * light))


def _row(image: np.ndarray, heads: np.ndarray) -> list[np.ndarray]:
  height, width = image.shape[:2]
  shape = {"height": max(1, round(_TILE * min(1.0, height / width) * max(1.0, min(height / width, 2.0)))), "width": _TILE}
  maps = [drawing.enlarge(drawing.heat(scaled(head)), height=height, width=width) for head in heads]
  parts = [image, overlay(image, heads.mean(axis=0)), *maps]
  return [drawing.tile(p, **shape) for p in parts]
