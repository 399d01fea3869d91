"""Principal components of patch tokens of several images, as colors (arXiv 2304.07193, section 7.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.models.dense import patch_map
from big_ssl.ops import pca
from big_ssl.visualize import drawing
from big_ssl.visualize.drawing import Picture
from big_ssl.visualize.subject import Options, Subject

_TILE = 150
_SHARE = 0.02  # of an image's patches that its foreground, and its background, has at least


@dataclasses.dataclass(frozen=True)
class Colored:
  """Per image: foreground bool [h, w] and colors [h, w, 3] in [0, 1], and whether a foreground was found at all."""

  foreground: list[np.ndarray]
  colors: list[np.ndarray]
  masked: bool


def draw(subject: Subject, options: Options) -> list[Picture]:
  """Columns of image, foreground and colors."""
  chosen = subject.choose(options.count)
  images = [subject.seen(c.pixels, options.size) for c in chosen]
  found = color(subject.maps(patch_map, images))
  columns = []
  for image, mask, colors in zip(images, found.foreground, found.colors, strict=True):
    height, width = image.shape[:2]
    shape = {"height": round(_TILE * min(max(height / width, 0.5), 2.0)), "width": _TILE}
    lit = drawing.enlarge(mask.astype(np.float32), height=height, width=width)[..., None]
    shown = drawing.enlarge(np.where(mask[..., None], colors, 0.0), height=height, width=width)
    parts = [image, *([drawing.to_rgb(image) / 255 * (0.15 + 0.85 * lit)] if found.masked else []), shown]
    columns.append(drawing.stack([drawing.tile(p, **shape) for p in parts]))
  where = (
    "Foreground by the first component, over which black patches were left out; its next"
    if found.masked
    else "No foreground stands out by the first component, so all patches are colored; the first"
  )
  caption = (
    f"Principal components of the patch features of {len(images)} images together. {where} three components are red, green"
    " and blue: the same color means similar features."
  )
  return [Picture("pca", drawing.grid([columns]), caption)]


def color(maps: Sequence[np.ndarray]) -> Colored:
  """Foreground and colors of feature maps [h, w, D] that may differ in h and w.

  The first component of all patches is cut in two by Otsu's threshold (own choice; the paper's is set by hand). Foreground
  is the side with fewer of the patches at the borders of the images; unless it leaves both foreground and background in
  three quarters of the images, and more than three patches in all, every patch is foreground. The colors are the first
  three components of the foreground's patches alone, each from its 2nd to its 98th percentile.

  Raises:
    UserError: fewer than five patches or three features.
  """
  tokens = np.concatenate([m.reshape(-1, m.shape[-1]) for m in maps])
  if len(tokens) < 5 or tokens.shape[1] < 3:
    raise UserError(f"PCA of {len(tokens)} patches of {tokens.shape[1]} features: at least 5 of 3 are needed; try more images, or a larger --size.")
  first = _components(tokens, tokens, 1)[:, 0]
  above = first > otsu(first)
  border = np.concatenate([_border(m.shape[:2]).reshape(-1) for m in maps])
  foreground = above if above[border].mean() <= (~above)[border].mean() else ~above
  ends = np.cumsum([m.shape[0] * m.shape[1] for m in maps])[:-1]
  shares = [part.mean() for part in np.split(foreground, ends)]
  # Three components need four patches.
  masked = foreground.sum() > 3 and np.mean([_SHARE <= share <= 1 - _SHARE for share in shares]) >= 0.75
  kept = foreground if masked else np.ones(len(tokens), bool)
  values = _components(tokens[kept], tokens, 3)
  low, high = np.percentile(values[kept], (2, 98), axis=0)
  colors = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
  split = lambda x: [part.reshape(*m.shape[:2], *x.shape[1:]) for part, m in zip(np.split(x, ends), maps, strict=True)]
  return Colored(split(kept), split(colors), bool(masked))


def otsu(values: np.ndarray, *, bins: int = 128) -> float:
  """The threshold that leaves the least variance within the two sides (Otsu, 1979)."""
  counts, edges = np.histogram(values, bins=bins)
  centers = (edges[:-1] + edges[1:]) / 2
  below, total = np.cumsum(counts), counts.sum()
  moment = np.cumsum(counts * centers)
  with np.errstate(divide="ignore", invalid="ignore"):
    between = (moment[-1] * below / total - moment) ** 2 / (below * (total - below))
  return float(edges[1:][np.nanargmax(np.where(np.isfinite(between), between, -1.0))])


def _components(fitted: np.ndarray, tokens: np.ndarray, dim: int) -> np.ndarray:
  """[N, dim] of `tokens` on the axes of `fitted`; their scale is removed by whoever calls."""
  axes = pca.fit_whitening(np.asarray(fitted, np.float32), dim=dim)
  return pca.whiten(np.asarray(tokens, np.float32), whitening=axes, normalize=False)


def _border(shape: tuple[int, int]) -> np.ndarray:
  edge = np.ones(shape, bool)
  edge[1:-1, 1:-1] = False
  return edge
