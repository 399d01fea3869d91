"""RandAugment (arXiv 1909.13719) with operations that grow with the magnitude, as timm's "rand-m9-mstd0.5-inc1" has them.

Each of `layers` operations is drawn evenly, happens with probability `p` and has the strength level / 10 with

  level ~ N(magnitude, std^2), clipped to [0, 10]

The recipe of fine-tuning in BEiT, MAE and MSN (arXiv 2106.08254, 2111.06377, 2204.07141). Pixels agree with PIL's to one or two gray
levels; geometry reads with bilinear weights (own choice; those recipes take bicubic ones).
"""

from __future__ import annotations

import dataclasses

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
OPERATIONS = PIXELS + GEOMETRY
MAX_LEVEL = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandAugment(Operation):
  """Random operations out of `OPERATIONS`.

  Attributes:
    layers: how many, one after the other; the same one may be drawn again.
    magnitude: mean level, 0 to 10.
    std: of the level.
    p: probability that a drawn operation happens.
    fill: color of what geometry leaves empty, in [0, 1] per channel; () is a medium gray.
  """

  layers: int = 2
  magnitude: float = 9.0
  std: float = 0.5
  p: float = 0.5
  fill: tuple[float, ...] = ()

  def __post_init__(self):
    self._check(self.layers >= 1, "layers", "at least 1")
    self._check(0 <= self.magnitude <= MAX_LEVEL, "magnitude", f"a level in [0, {MAX_LEVEL:g}]")
    self._check(self.std >= 0, "std", "0 or more")
    self._check_p()

  def validate(self, channels: int, *, view: str = "?") -> None:
    self._need_color(channels, view)
    self._check(len(self.fill) in (0, channels), "fill", f"{channels} numbers, one for each channel of the images, or ()")

  def __call__(self, key: Array, image: Array) -> Array:
    self.validate(image.shape[-1])
    fill = jnp.broadcast_to(jnp.asarray(self.fill or 0.5, jnp.float32), image.shape[-1:])

    def layer(image: Array, key: Array) -> tuple[Array, None]:
      draws, level_key = jax.random.uniform(key, (4,)), jax.random.fold_in(key, 1)
      which = jnp.minimum((draws[0] * len(OPERATIONS)).astype(jnp.int32), len(OPERATIONS) - 1)
      level = jnp.clip(self.magnitude + self.std * jax.random.normal(level_key), 0.0, MAX_LEVEL)
      sign = jnp.where(draws[2] < 0.5, -1.0, 1.0)
      changed = operate(image, which, level=level, sign=sign, fill=fill)
      return jnp.where(draws[1] < self.p, changed, image), None

    return jax.lax.scan(layer, image, jax.random.split(key, self.layers))[0]


def operate(image: Array, which: Array | int, *, level: Array | float, sign: Array | float, fill: Array) -> Array:
  """One operation on an image [H, W, C] float32 in [0, 1].

  Under `vmap` an image pays for all operations, but for one resampling only.

  Args:
    which: index into `OPERATIONS`.
    level: 0 to 10.
    sign: -1 or 1: less or more color, contrast, brightness and sharpness; the direction of the geometry.
    fill: [C].
  """
  share = level / MAX_LEVEL
  factor = jnp.maximum(0.1, 1.0 + 0.9 * sign * share)
  whole = lambda x: jnp.floor(x + 1e-4)  # a level of 9 is 0.9 only nearly
  branches = {
    "auto_contrast": _auto_contrast,
    "equalize": color.equalize,
    "invert": lambda x: 1.0 - x,
    "posterize": lambda x: _posterize(x, bits=4.0 - whole(4.0 * share)),
    "solarize": lambda x: color.solarize(x, (255.5 - whole(256.0 * share)) / 255.0),
    "solarize_add": lambda x: jnp.where(x < 127.5 / 255.0, jnp.minimum(x + whole(110.0 * share) / 255.0, 1.0), x),
    "color": lambda x: jnp.clip(color.saturation_luma(x, factor), 0.0, 1.0),
    "contrast": lambda x: jnp.clip(color.contrast_luma(x, factor), 0.0, 1.0),
    "brightness": lambda x: jnp.clip(color.brightness(x, factor), 0.0, 1.0),
    "sharpness": lambda x: jnp.clip(_sharpness(x, factor), 0.0, 1.0),
  }
  geometry = lambda x: warp(x, _matrix(which - len(PIXELS), sign * share, x.shape), fill=fill)
  return jax.lax.switch(jnp.minimum(which, len(PIXELS)), [*(branches[name] for name in PIXELS), geometry], image)


def warp(image: Array, matrix: Array, *, fill: Array) -> Array:
  """Reads the pixel at (x, y) from (x', y') = matrix [2, 3] (x, y, 1), bilinearly; outside of the image is `fill`.

  Coordinates are those of PIL: pixel i covers [i, i + 1), and what falls inside the image reads its border beyond the
  outermost centers.
  """
  height, width = image.shape[:2]
  y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
  source = [row[0] * x + row[1] * y + row[2] for row in matrix]
  inside = (source[0] >= 0) & (source[0] < width) & (source[1] >= 0) & (source[1] < height)
  column, row = (jnp.clip(s - 0.5, 0.0, n - 1.0) for s, n in zip(source, (width, height), strict=True))
  left, top = jnp.floor(column), jnp.floor(row)
  across, down = (column - left)[..., None], (row - top)[..., None]
  x0, y0 = left.astype(jnp.int32), top.astype(jnp.int32)
  x1, y1 = jnp.minimum(x0 + 1, width - 1), jnp.minimum(y0 + 1, height - 1)
  upper = image[y0, x0] * (1 - across) + image[y0, x1] * across
  lower = image[y1, x0] * (1 - across) + image[y1, x1] * across
  return jnp.where(inside[..., None], upper * (1 - down) + lower * down, fill)


def _matrix(which: Array | int, amount: Array, shape: tuple[int, ...]) -> Array:
  """[2, 3] of the operation `which` of `GEOMETRY`, `amount` in [-1, 1].

  Up to 30 degrees about the center, 0.3 of the other side from the top left, or 0.45 of the side.
  """
  height, width = shape[:2]
  angle = jnp.deg2rad(-30.0 * amount)
  c, s = jnp.cos(angle), jnp.sin(angle)
  cx, cy = width / 2, height / 2
  one, zero, shear = jnp.ones(()), jnp.zeros(()), 0.3 * amount
  rows = (
    (c, s, cx - c * cx - s * cy, -s, c, cy + s * cx - c * cy),
    (one, shear, zero, zero, one, zero),
    (one, zero, zero, shear, one, zero),
    (one, zero, 0.45 * amount * width, zero, one, zero),
    (one, zero, zero, zero, one, 0.45 * amount * height),
  )
  table = jnp.stack([jnp.stack([jnp.asarray(v, jnp.float32) for v in row]) for row in rows])
  return table[jnp.clip(which, 0, len(GEOMETRY) - 1)].reshape(2, 3)


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
