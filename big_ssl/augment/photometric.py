"""Random photometric operations of a view: frozen dataclasses called as `(key, image) -> image`.

The image is one crop, [H, W, C] float32 in [0, 1], and stays in [0, 1] until `Normalize`; `vmap` makes the batch. Each
operation draws all it needs from its key, on or off included, so a batch costs the same whatever was drawn.

Gray images (one channel) pass saturation, hue and grayscale unchanged. Other numbers of channels than 1 and 3 have no
hue or gray: `validate` and the call raise `UserError`, unless what needs a color is switched off.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from big_ssl.augment import color
from big_ssl.core.types import Array, UserError, nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SWAV_STD = (0.228, 0.224, 0.225)  # arXiv 2006.09882, as released
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclasses.dataclass(frozen=True)
class Operation(abc.ABC):
  """What the photometric operations share: checks of their fields, at construction, and of the channels."""

  @abc.abstractmethod
  def __call__(self, key: Array, image: Array) -> Array:
    """image: [H, W, C] float32 in [0, 1] -> the same shape."""

  def validate(self, channels: int, *, view: str = "?") -> None:
    """Raises `UserError` when images of `channels` channels cannot be treated; `view` is for the message."""

  def _check(self, ok: bool, field: str, accepted: str, options: tuple[str, ...] = ()) -> None:
    if not ok:
      value = getattr(self, field)
      raise UserError(f"{type(self).__name__}.{field}={value!r}: expected {accepted}." + nearest(str(value), options))

  def _check_p(self) -> None:
    self._check(0.0 <= self.p <= 1.0, "p", "a probability")

  def _need_color(self, channels: int, view: str) -> None:
    if channels not in (1, 3):
      raise UserError(
        f"view '{view}': {type(self).__name__} needs images of 3 channels, or gray ones of 1; got {channels}."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitter(Operation):
  """Brightness, contrast, saturation and hue by random amounts, clipped to [0, 1] after each.

  Amounts are uniform: a factor in [max(0, 1 - s), 1 + s] for strength s, for the hue a shift in [-s, s] turns.

  Attributes:
    brightness, contrast, saturation, hue: strengths; 0 leaves that one out.
    p: probability that the image is changed at all.
    order: "random" draws the order of the four per image, "fixed" keeps the one above.
    style: "pil" as torchvision (DINO, MSN, SwAV, MoCo): contrast about the mean luma, saturation a blend with the
      gray image. "simclr" as SimCLR's second version: contrast about each channel's mean, saturation in HSV. "byol"
      as BYOL and SimCLR's first: as "simclr", but the brightness ADDS an amount in [-s, s].
  """

  brightness: float = 0.4
  contrast: float = 0.4
  saturation: float = 0.2
  hue: float = 0.1
  p: float = 0.8
  order: Literal["random", "fixed"] = "random"
  style: Literal["pil", "byol", "simclr"] = "pil"

  def __post_init__(self):
    for field in ("brightness", "contrast", "saturation"):
      self._check(getattr(self, field) >= 0, field, "a strength of 0 or more")
    self._check(0 <= self.hue <= 0.5, "hue", "0 to 0.5, half the circle")
    self._check_p()
    for field, options in (("order", ("random", "fixed")), ("style", ("pil", "byol", "simclr"))):
      self._check(getattr(self, field) in options, field, " or ".join(map(repr, options)), options)

  def validate(self, channels: int, *, view: str = "?") -> None:
    luma = self.contrast > 0 and self.style == "pil"
    if self.p > 0 and (self.saturation > 0 or self.hue > 0 or luma):
      self._need_color(channels, view)

  def __call__(self, key: Array, image: Array) -> Array:
    self.validate(image.shape[-1])
    names = [n for n in ("brightness", "contrast", "saturation", "hue") if getattr(self, n) > 0]
    if image.shape[-1] == 1:
      names = [n for n in names if n in ("brightness", "contrast")]
    if not names or self.p == 0:
      return image
    draws = jax.random.uniform(key, (16,))  # 9 are used; one call of a power of 2 compiles in a third of the time
    slot = jnp.arange(len(names))
    if self.order == "random":  # ranks, ties by position; a sort takes longer, to compile as well
      drawn = draws[5 : 5 + len(names)]
      tied = (drawn[None] == drawn[:, None]) & (slot[None] < slot[:, None])
      slot = ((drawn[None] < drawn[:, None]) | tied).sum(-1)
    jittered = self._jitter(names, slot, self._amounts(draws[1:5]), image)
    return jnp.where(draws[0] < self.p, jittered, image)

  def _amounts(self, draws: Array) -> dict[str, Array]:
    """One number per operation, a factor, an added amount or turns, from `draws` [4] uniform in [0, 1)."""
    amounts = {}
    for name, draw in zip(("brightness", "contrast", "saturation", "hue"), draws):
      strength = getattr(self, name)
      added = name == "hue" or (name == "brightness" and self.style == "byol")
      low, high = (-strength, strength) if added else (max(0.0, 1.0 - strength), 1.0 + strength)
      amounts[name] = low + (high - low) * draw
    return amounts

  def _jitter(self, names: list[str], slot: Array, amounts: dict[str, Array], image: Array) -> Array:
    """Applies each operation once, in the order of its `slot` [len(names)], at a cost that does not depend on it.

    Under `vmap` a branch costs as much as all branches. Operations in HSV are dear and happen once each; all others
    are affine in the image, its luma and its mean, hence cheap, and may be passed as an identity. So the cheap ones
    are tried, in their order, before, between and after the dear ones. The scans are for speed as well: unrolled, XLA
    fuses the chain and computes each link again for every later one (10 times slower on CPU).
    """
    cheap, dear = [n for n in names if not self._in_hsv(n)], [n for n in names if self._in_hsv(n)]
    at = dict(zip(names, slot))
    rank = {n: sum(at[m] < at[n] for m in group) for group in (cheap, dear) for n in group}
    edges = [-1, *(sum(jnp.where(rank[n] == j, at[n], 0) for n in dear) for j in range(len(dear))), len(names)]
    for stage, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
      if cheap:
        flags = {n: (rank[n] == jnp.arange(len(cheap))) & (low < at[n]) & (at[n] < high) for n in cheap}
        image, _ = jax.lax.scan(lambda x, flag: (self._affine(flag, amounts, x), None), image, flags)
      if stage < len(dear):
        amount = {n: jnp.where(rank[n] == stage, amounts[n], 0.0 if n == "hue" else 1.0) for n in dear}
        image = jnp.clip(color.shift_hsv(image, **amount), 0.0, 1.0)
    return image

  def _in_hsv(self, name: str) -> bool:
    return name == "hue" or (name == "saturation" and self.style != "pil")

  def _affine(self, flag: dict[str, Array], amounts: dict[str, Array], image: Array) -> Array:
    """The one of brightness, contrast and luma saturation whose flag is set, or the identity; clipped."""
    scale, shift = jnp.float32(1.0), jnp.float32(0.0)
    gray = color.luma(image) if self.style == "pil" and flag.keys() & {"contrast", "saturation"} else None
    for name, on in flag.items():
      if name == "brightness" and self.style == "byol":
        shift += jnp.where(on, amounts[name], 0.0)
        continue
      scale = jnp.where(on, amounts[name], scale)
      rest = jnp.where(on, 1.0 - amounts[name], 0.0)
      if name == "contrast":
        shift += rest * (image.mean((0, 1), keepdims=True) if gray is None else color.mean_level(gray))
      elif name == "saturation":
        shift += rest * gray
    return jnp.clip(scale * image + shift, 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grayscale(Operation):
  """The luma in every channel, with probability `p`; `luma` "pil" (.299 .587 .114) or "byol" (.2989 .5870 .1140)."""

  p: float = 0.2
  luma: Literal["pil", "byol"] = "pil"

  def __post_init__(self):
    self._check_p()
    self._check(self.luma in ("pil", "byol"), "luma", "'pil' or 'byol'", ("pil", "byol"))

  def validate(self, channels: int, *, view: str = "?") -> None:
    if self.p > 0:
      self._need_color(channels, view)

  def __call__(self, key: Array, image: Array) -> Array:
    self.validate(image.shape[-1])
    if self.p == 0 or image.shape[-1] == 1:
      return image
    gray = color.grayscale(image, weights=color.PIL_LUMA if self.luma == "pil" else color.BYOL_LUMA)
    return jnp.where(jax.random.uniform(key) < self.p, gray, image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianBlur(Operation):
  """A Gaussian of a random standard deviation, with probability `p`.

  PIL's blur of the same radius is three box blurs that stand for this Gaussian: they agree to 1.5 gray levels in the
  mean, not at every pixel.

  Attributes:
    p: probability.
    sigma: range of the standard deviation in pixels, drawn uniformly per image.
    taps: length of the kernel: an odd number; "full" for 4 sigma to either side; "tenth" for a tenth of the image's
      height to both sides together (23 at 224), as SimCLR (arXiv 2002.05709, appendix A) and BYOL take it.
    edge: "extend" repeats the border as PIL does, "zero" is dark outside, as SimCLR and BYOL have it.
  """

  p: float = 0.5
  sigma: tuple[float, float] = (0.1, 2.0)
  taps: int | Literal["full", "tenth"] = "full"
  edge: Literal["extend", "zero"] = "extend"

  def __post_init__(self):
    self._check_p()
    low, high = self.sigma
    self._check(0 < low <= high, "sigma", "0 < low <= high, in pixels")
    odd = isinstance(self.taps, int) and self.taps > 0 and self.taps % 2 == 1
    self._check(odd or self.taps in ("full", "tenth"), "taps", "an odd number, 'full' or 'tenth'", ("full", "tenth"))
    self._check(self.edge in ("extend", "zero"), "edge", "'extend' or 'zero'", ("extend", "zero"))

  def __call__(self, key: Array, image: Array) -> Array:
    if self.p == 0:
      return image
    draws = jax.random.uniform(key, (2,))
    sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * draws[1]
    blurred = color.gaussian_blur(image, sigma, radius=self.radius(image.shape[0]), edge=self.edge)
    return jnp.where(draws[0] < self.p, blurred, image)

  def radius(self, height: int) -> int:
    """Taps to either side, for an image `height` pixels high."""
    if isinstance(self.taps, int):
      return self.taps // 2
    return height // 20 if self.taps == "tenth" else math.ceil(4 * self.sigma[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solarize(Operation):
  """Inverts the pixels at or above a threshold, with probability `p`.

  Attributes:
    p: probability.
    threshold: of the pixels in [0, 1]; a pair is a range to draw from per image (PAWS on CIFAR: (0, 1)).
  """

  p: float = 0.2
  threshold: float | tuple[float, float] = 0.5

  def __post_init__(self):
    self._check_p()

  def __call__(self, key: Array, image: Array) -> Array:
    if self.p == 0:
      return image
    draws = jax.random.uniform(key, (2,))
    threshold = self.threshold
    if isinstance(threshold, tuple):
      threshold = threshold[0] + (threshold[1] - threshold[0]) * draws[1]
    return jnp.where(draws[0] < self.p, color.solarize(image, threshold), image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Equalize(Operation):
  """Flattens the histogram of each channel, with probability `p` (PAWS on CIFAR)."""

  p: float = 0.2

  def __post_init__(self):
    self._check_p()

  def __call__(self, key: Array, image: Array) -> Array:
    if self.p == 0:
      return image
    return jnp.where(jax.random.uniform(key) < self.p, color.equalize(image), image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalize(Operation):
  """(image - mean) / std per channel; a gray image takes the averages of `mean` and of `std` (own choice)."""

  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD

  def __post_init__(self):
    self._check(len(self.mean) == len(self.std), "mean", f"as many numbers as std={self.std!r}")
    self._check(min(self.std) > 0, "std", "numbers above 0")

  def validate(self, channels: int, *, view: str = "?") -> None:
    if channels != 1 and channels != len(self.mean):
      raise UserError(
        f"view '{view}': Normalize.mean={self.mean!r} has {len(self.mean)} numbers; images have {channels} channels."
      )

  def __call__(self, key: Array, image: Array) -> Array:
    del key
    self.validate(image.shape[-1])
    return color.normalize(image, mean=self.mean, std=self.std)
