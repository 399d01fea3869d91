"""RandAugment (arXiv 1909.13719) in the two forms that recipes take: timm's and TensorFlow's.

Each of `layers` operations is drawn evenly, happens with probability `p` and has the strength level / 10 with

  level ~ N(magnitude, std^2), clipped to [0, 10]

"timm", as its "rand-m9-mstd0.5-inc1": 15 operations that grow with the level. The recipe of fine-tuning in BEiT, MAE and MSN
(arXiv 2106.08254, 2111.06377, 2204.07141). Pixels agree with PIL's to one or two gray levels; geometry reads with bilinear
weights (own choice; those recipes take bicubic ones).

"tf", as tensorflow/tpu (EfficientNet, autoaugment.py) and its copy in big_vision: magnitude 10, std 0, p 1 is the "randaug(2,10)"
of the plain ViT and FlexiViT (arXiv 2205.01580, 2212.08013). 16 operations, with cutout; geometry reads the nearest pixel.
Faithful to the public code (read), what is odd in it included:

  color, contrast, brightness, sharpness  by 0.1 + 1.8 level / 10: at level 10 always 1.9, never less than the image has
  contrast     about height * width / 256 gray levels, at most 255, where the mean was meant (tensorflow/tpu issue 1057)
  posterize    keeps 4 level / 10 of the 8 bits, more at higher levels; no bits are 1, as TensorFlow shifts by 7 at most
  solarize     inverts from 256 level / 10 on, less at higher levels; but 256 is 0 in 8 bits: level 10 inverts every pixel
               (big_vision issue 110)
  translate, cutout  100 level / 10 pixels; a box of 2 * 40 level / 10 pixels about any pixel, cut by the border: whatever the size
               of the images, so that little is left of small ones
  shear        about the center of the first pixel; timm's is about its corner

The pixels are those of the public code to two gray levels: it cuts them to integers after every operation, which is not done here.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from big_ssl.augment import color
from big_ssl.augment.photometric import Operation
from big_ssl.core.types import Array

PIXELS = (
  *("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),
  *("color", "contrast", "brightness", "sharpness"),
)
GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = {"timm": PIXELS + GEOMETRY, "tf": (*PIXELS, "cutout", *GEOMETRY)}
MAX_LEVEL = 10.0
GRAY = {"timm": 0.5, "tf": 128 / 255}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment(Operation):
  """Random operations out of `OPERATIONS`.

  Attributes:
    style: "timm" or "tf", see above.
    layers: how many, one after the other; the same one may be drawn again.
    magnitude: mean level, 0 to 10.
    std: of the level.
    p: probability that a drawn operation happens.
    fill: color of what geometry and cutout leave empty, in [0, 1] per channel; () is the medium gray of the style.
  """

  style: Literal["timm", "tf"] = "timm"
  layers: int = 2
  magnitude: float = 9.0
  std: float = 0.5
  p: float = 0.5
  fill: tuple[float, ...] = ()

  def __post_init__(self):
    self._check(self.style in OPERATIONS, "style", " or ".join(map(repr, OPERATIONS)), tuple(OPERATIONS))
    self._check(self.layers >= 1, "layers", "at least 1")
    self._check(0 <= self.magnitude <= MAX_LEVEL, "magnitude", f"a level in [0, {MAX_LEVEL:g}]")
    self._check(self.std >= 0, "std", "0 or more")
    self._check_p()

  def validate(self, channels: int, *, view: str = "?") -> None:
    self._need_color(channels, view)
    self._check(len(self.fill) in (0, channels), "fill", f"{channels} numbers, one for each channel of the images, or ()")

  def __call__(self, key: Array, image: Array) -> Array:
    self.validate(image.shape[-1])
    fill = jnp.broadcast_to(jnp.asarray(self.fill or GRAY[self.style], jnp.float32), image.shape[-1:])
    number = len(OPERATIONS[self.style])

    def layer(image: Array, key: Array) -> tuple[Array, None]:
      draws, level_key, place_key = jax.random.uniform(key, (4,)), jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
      which = jnp.minimum((draws[0] * number).astype(jnp.int32), number - 1)
      level = jnp.clip(self.magnitude + self.std * jax.random.normal(level_key), 0.0, MAX_LEVEL)
      sign = jnp.where(draws[2] < 0.5, -1.0, 1.0)
      place = jax.random.uniform(place_key, (2,))
      changed = operate(image, which, level=level, sign=sign, fill=fill, style=self.style, place=place)
      return jnp.where(draws[1] < self.p, changed, image), None

    return jax.lax.scan(layer, image, jax.random.split(key, self.layers))[0]


def operate(
  image: Array,
  which: Array | int,
  *,
  level: Array | float,
  sign: Array | float,
  fill: Array,
  style: str = "timm",
  place: Array | tuple[float, float] = (0.5, 0.5),
) -> Array:
  """One operation on an image [H, W, C] float32 in [0, 1].

  Under `vmap` an image pays for all operations, but for one resampling only.

  Args:
    which: index into `OPERATIONS[style]`.
    level: 0 to 10.
    sign: -1 or 1: the direction of the geometry; for timm less or more color, contrast, brightness and sharpness as well.
    fill: [C].
    place: [2] in [0, 1), the center of cutout from the top and from the left.
  """
  share = level / MAX_LEVEL
  whole = lambda x: jnp.floor(x + 1e-4)  # a level of 9 is 0.9 only nearly
  if style == "tf":
    factor = 0.1 + 1.8 * share
    bits, threshold = jnp.maximum(whole(4.0 * share), 1.0), jnp.mod(whole(256.0 * share), 256.0)
    middle = min(image.shape[0] * image.shape[1] // 256, 255) / 255.0
    contrast = lambda x: middle + factor * (x - middle)
  else:
    factor = jnp.maximum(0.1, 1.0 + 0.9 * sign * share)
    bits, threshold = 4.0 - whole(4.0 * share), 256.0 - whole(256.0 * share)
    contrast = lambda x: color.contrast_luma(x, factor)
  branches = {
    "auto_contrast": _auto_contrast,
    "equalize": color.equalize,
    "invert": lambda x: 1.0 - x,
    "posterize": lambda x: _posterize(x, bits=bits),
    "solarize": lambda x: color.solarize(x, (threshold - 0.5) / 255.0),
    "solarize_add": lambda x: jnp.where(x < 127.5 / 255.0, jnp.minimum(x + whole(110.0 * share) / 255.0, 1.0), x),
    "color": lambda x: jnp.clip(color.saturation_luma(x, factor), 0.0, 1.0),
    "contrast": lambda x: jnp.clip(contrast(x), 0.0, 1.0),
    "brightness": lambda x: jnp.clip(color.brightness(x, factor), 0.0, 1.0),
    "sharpness": lambda x: jnp.clip(_sharpness(x, factor), 0.0, 1.0),
    "cutout": lambda x: _cutout(x, place, pad=whole(40.0 * share), fill=fill),
  }
  still = [branches[name] for name in OPERATIONS[style] if name not in GEOMETRY]
  matrix = _matrix(which - len(still), sign * share, image.shape, style=style)
  geometry = lambda x: warp(x, matrix, fill=fill, nearest=style == "tf")
  return jax.lax.switch(jnp.minimum(which, len(still)), [*still, geometry], image)


def warp(image: Array, matrix: Array, *, fill: Array, nearest: bool = False) -> Array:
  """Reads the pixel at (x, y) from (x', y') = matrix [2, 3] (x, y, 1), in pixels from the center of the first one.

  Args:
    fill: [C], of what lies outside of the image.
    nearest: one pixel, halves away from 0 (TensorFlow), in place of bilinear weights; for these what falls inside the image
      reads its border beyond the outermost centers (PIL).
  """
  height, width = image.shape[:2]
  y, x = jnp.meshgrid(jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32), indexing="ij")
  column, row = (m[0] * x + m[1] * y + m[2] for m in matrix)
  if nearest:
    column, row = (jnp.sign(s) * jnp.floor(jnp.abs(s) + 0.5) for s in (column, row))
  inside = (column >= -0.5) & (column < width - 0.5) & (row >= -0.5) & (row < height - 0.5)
  column, row = jnp.clip(column, 0.0, width - 1.0), jnp.clip(row, 0.0, height - 1.0)
  left, top = jnp.floor(column), jnp.floor(row)
  x0, y0 = left.astype(jnp.int32), top.astype(jnp.int32)
  if nearest:
    return jnp.where(inside[..., None], image[y0, x0], fill)
  across, down = (column - left)[..., None], (row - top)[..., None]
  x1, y1 = jnp.minimum(x0 + 1, width - 1), jnp.minimum(y0 + 1, height - 1)
  upper = image[y0, x0] * (1 - across) + image[y0, x1] * across
  lower = image[y1, x0] * (1 - across) + image[y1, x1] * across
  return jnp.where(inside[..., None], upper * (1 - down) + lower * down, fill)


def _matrix(which: Array | int, amount: Array, shape: tuple[int, ...], *, style: str) -> Array:
  """[2, 3] of the operation `which` of `GEOMETRY`, `amount` in [-1, 1].

  Up to 30 degrees about the center, 0.3 of the other side from the top left, or 0.45 of the side (timm) or 100 pixels (tf).
  """
  height, width = shape[:2]
  angle = jnp.deg2rad(-30.0 * amount)
  c, s = jnp.cos(angle), jnp.sin(angle)
  cx, cy = (width - 1) / 2, (height - 1) / 2
  one, zero, shear = jnp.ones(()), jnp.zeros(()), 0.3 * amount
  corner = 0.0 if style == "tf" else 0.5 * shear
  across, down = (100.0, 100.0) if style == "tf" else (0.45 * width, 0.45 * height)
  rows = (
    (c, s, cx - c * cx - s * cy, -s, c, cy + s * cx - c * cy),
    (one, shear, corner, zero, one, zero),
    (one, zero, zero, shear, one, corner),
    (one, zero, across * amount, zero, one, zero),
    (one, zero, zero, zero, one, down * amount),
  )
  table = jnp.stack([jnp.stack([jnp.asarray(v, jnp.float32) for v in row]) for row in rows])
  return table[jnp.clip(which, 0, len(GEOMETRY) - 1)].reshape(2, 3)


def _cutout(image: Array, place: Array | tuple[float, float], *, pad: Array, fill: Array) -> Array:
  """`fill` in the 2 pad by 2 pad pixels about the one at `place` (arXiv 1708.04552), cut by the border."""
  centers = (jnp.floor(share * n) for share, n in zip(place, image.shape[:2], strict=True))
  rows, columns = ((jnp.arange(n) >= c - pad) & (jnp.arange(n) < c + pad) for c, n in zip(centers, image.shape[:2], strict=True))
  return jnp.where((rows[:, None] & columns)[..., None], fill, image)


def _auto_contrast(image: Array) -> Array:
  """Stretches every channel to [0, 1]; a constant one stays."""
  low, high = image.min((0, 1)), image.max((0, 1))
  return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1.0), image)


def _posterize(image: Array, *, bits: Array) -> Array:
  """The first `bits` of the 8."""
  step = 2.0 ** (8.0 - bits)
  return jnp.floor(jnp.round(image * 255.0) / step) * step / 255.0


def _sharpness(image: Array, factor: Array) -> Array:
  """Away from, or towards, a smoothed image: 5 in the center and 1 around, the border unsmoothed (PIL)."""
  inner = sum(
    image[1 + dy : image.shape[0] - 1 + dy, 1 + dx : image.shape[1] - 1 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)
  )
  smooth = image.at[1:-1, 1:-1].set((inner + 4.0 * image[1:-1, 1:-1]) / 13.0)
  return smooth + factor * (image - smooth)
