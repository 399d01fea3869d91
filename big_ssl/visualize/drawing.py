"""Tiles, colors and words on a canvas, with Pillow; every function returns uint8 RGB."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

CAPTION = "Description"  # key of the caption in a PNG file (PNG specification, 11.3.4.2)
PAPER, INK, GOOD, BAD, PALE = (255, 255, 255), (32, 33, 36), (0, 114, 178), (213, 94, 0), (222, 224, 228)
GAP = 4
_PALETTE = (  # twelve hues that differ in lightness too
  *((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75)),
  *((227, 119, 194), (110, 110, 110), (188, 189, 34), (23, 190, 207), (0, 60, 110), (250, 180, 120)),
)
_HEAT = np.array(  # dark to light, monotone in lightness
  [(10, 8, 40), (66, 12, 92), (130, 32, 104), (190, 55, 82), (233, 96, 40), (250, 160, 30), (250, 240, 150)], np.float64
)


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture under the name of its file, and what it shows in one sentence."""

  name: str
  pixels: np.ndarray  # uint8 [H, W, 3]
  caption: str

  def save(self, directory: pathlib.Path) -> pathlib.Path:
    """Writes directory/name.png, with the caption inside."""
    directory.mkdir(parents=True, exist_ok=True)
    info, file = PngInfo(), directory / f"{self.name}.png"
    info.add_itxt(CAPTION, self.caption)
    temporary = file.with_suffix(".tmp")
    Image.fromarray(self.pixels).save(temporary, format="PNG", pnginfo=info, optimize=True)
    temporary.replace(file)
    return file


# Pixels


def to_rgb(pixels: np.ndarray) -> np.ndarray:
  """uint8 or uint16 [h, w, C], or float in [0, 1], as uint8 [h, w, 3]; gray is repeated, channels after three dropped."""
  if pixels.dtype == np.uint16:
    pixels = (pixels >> 8).astype(np.uint8)
  elif pixels.dtype != np.uint8:
    pixels = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
  if pixels.shape[-1] < 3:
    return np.repeat(pixels[..., :1], 3, axis=-1)
  return pixels[..., :3]


def resized(pixels: np.ndarray, *, height: int, width: int) -> np.ndarray:
  """uint8 or uint16 [h, w, C] to float32 [height, width, C] in [0, 1], bicubic, antialiased when shrinking."""
  planes = [
    np.asarray(Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    for plane in np.moveaxis(pixels, -1, 0)
  ]
  return np.clip(np.stack(planes, -1) / np.iinfo(pixels.dtype).max, 0, 1)


def tile(pixels: np.ndarray, *, height: int, width: int) -> np.ndarray:
  """The image in a box of its aspect, centered, on paper; small images are enlarged without blur."""
  rgb = to_rgb(pixels)
  scale = min(height / rgb.shape[0], width / rgb.shape[1])
  size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
  how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
  fitted = np.asarray(Image.fromarray(rgb).resize(size, how))
  out = np.full((height, width, 3), PAPER, np.uint8)
  top, left = (height - size[1]) // 2, (width - size[0]) // 2
  out[top : top + size[1], left : left + size[0]] = fitted
  return out


def heat(values: np.ndarray) -> np.ndarray:
  """[h, w] in [0, 1] to colors, dark to light."""
  at = np.clip(values, 0, 1) * (len(_HEAT) - 1)
  low = np.minimum(at.astype(int), len(_HEAT) - 2)
  part = (at - low)[..., None]
  return (_HEAT[low] * (1 - part) + _HEAT[low + 1] * part + 0.5).astype(np.uint8)


def enlarge(values: np.ndarray, *, height: int, width: int) -> np.ndarray:
  """[h, w, ...] by nearest neighbors, so that patches stay visible."""
  rows = np.minimum((np.arange(height) + 0.5) * values.shape[0] / height, values.shape[0] - 1).astype(int)
  columns = np.minimum((np.arange(width) + 0.5) * values.shape[1] / width, values.shape[1] - 1).astype(int)
  return values[rows][:, columns]


def color_of(label: int) -> tuple[int, int, int]:
  """Of a class; the thirteenth has that of the first, and -1 is pale."""
  return _PALETTE[label % len(_PALETTE)] if label >= 0 else PALE


def framed(pixels: np.ndarray, *, color: tuple[int, int, int], width: int = 3) -> np.ndarray:
  """The same size, with a border inside."""
  out = pixels.copy()
  for edge in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
    out[edge] = color
  return out


# Words and layout


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
  return ImageFont.load_default(size)


def words(text: str, *, width: int, size: int = 13, color: tuple[int, int, int] = INK) -> np.ndarray:
  """One line, cut with an ellipsis where it is too long."""
  face = font(size)
  if face.getlength(text) > width:
    while text and face.getlength(text + "…") > width:
      text = text[:-1]
    text += "…"
  canvas = Image.new("RGB", (width, size + 6), PAPER)
  ImageDraw.Draw(canvas).text((0, 1), text, fill=color, font=face)
  return np.asarray(canvas)


def stack(parts: Sequence[np.ndarray], *, gap: int = GAP, axis: int = 0) -> np.ndarray:
  """Pictures below each other (axis 0) or side by side (axis 1), flush left or top, on paper."""
  across = 1 - axis
  side = max(p.shape[across] for p in parts)
  padded = []
  for i, part in enumerate(parts):
    margin = [(0, 0), (0, 0), (0, 0)]
    margin[across] = (0, side - part.shape[across])
    margin[axis] = (gap if i else 0, 0)
    padded.append(np.pad(part, margin, constant_values=255))
  return np.concatenate(padded, axis=axis)


def grid(rows: Sequence[Sequence[np.ndarray]], *, gap: int = GAP) -> np.ndarray:
  """Rows of tiles, with a margin around."""
  whole = stack([stack(row, gap=gap, axis=1) for row in rows], gap=gap)
  return np.pad(whole, ((gap, gap), (gap, gap), (0, 0)), constant_values=255)
