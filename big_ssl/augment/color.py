"""Pixel operations on one image, [H, W, C] float32 in [0, 1], as pure functions; nothing here is random.

What torchvision does through PIL happens on 8-bit integers that are truncated after every operation; here nothing is
rounded but the mean of `contrast_luma`, so single operations agree within one gray level (saturation 2, hue 1.5 in the
mean: PIL keeps the hue in 8 bits as well). On images with one channel, gray already, saturation, hue and grayscale do
nothing. Functions that need colors take 1 or 3 channels.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array

PIL_LUMA = (0.299, 0.587, 0.114)
BYOL_LUMA = (0.2989, 0.5870, 0.1140)  # sums to 0.9999; arXiv 2006.07733, as released


def luma(image: Array, *, weights: tuple[float, float, float] = PIL_LUMA) -> Array:
  """[H, W, 1] weighted sum of the channels; a gray image is its own luma."""
  if image.shape[-1] == 1:
    return image
  return sum(weight * image[..., i : i + 1] for i, weight in enumerate(weights))


def grayscale(image: Array, *, weights: tuple[float, float, float] = PIL_LUMA) -> Array:
  """The luma in every channel."""
  return jnp.broadcast_to(luma(image, weights=weights), image.shape)


def brightness(image: Array, factor: Array | float) -> Array:
  """Multiplies; values above 1 are the caller's to clip, here and below."""
  return image * factor


def brightness_add(image: Array, delta: Array | float) -> Array:
  """Adds: SimCLR's first version (arXiv 2002.05709, as released) and BYOL."""
  return image + delta


def mean_level(gray: Array) -> Array:
  """The mean of a gray image as PIL takes it for the contrast: rounded to one of the 256 levels."""
  return jnp.floor(gray.mean() * 255.0 + 0.5) / 255.0


def contrast_luma(image: Array, factor: Array | float) -> Array:
  """Blends with the mean of the gray image, rounded to a gray level, as PIL and torchvision do."""
  mean = mean_level(luma(image))
  return mean + factor * (image - mean)


def contrast_channel(image: Array, factor: Array | float) -> Array:
  """Blends each channel with its own mean, as TensorFlow, SimCLR and BYOL do."""
  mean = image.mean((0, 1), keepdims=True)
  return mean + factor * (image - mean)


def saturation_luma(image: Array, factor: Array | float) -> Array:
  """Blends with the gray image, as PIL and torchvision do."""
  gray = luma(image)
  return gray + factor * (image - gray)


def rgb_to_hsv(image: Array) -> Array:
  """[H, W, 3] in [0, 1] -> hue, saturation, value in [0, 1]; the hue of a gray pixel is 0."""
  cone = _to_cone(image)
  return jnp.concatenate([cone.hue, cone.chroma / jnp.where(cone.value > 0, cone.value, 1.0), cone.value], -1)


def hsv_to_rgb(image: Array) -> Array:
  """The inverse of `rgb_to_hsv`; the hue is taken modulo 1."""
  hue, saturation, value = (image[..., i : i + 1] for i in range(3))
  return _from_cone(_Cone(hue=hue, chroma=value * saturation, value=value))


@dataclasses.dataclass(frozen=True)
class _Cone:
  """A picture as hue in turns, chroma (value times saturation) and value, each [H, W, 1]."""

  hue: Array
  chroma: Array
  value: Array


def _to_cone(image: Array) -> _Cone:
  red, green, blue = (image[..., i : i + 1] for i in range(3))
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  inverse = jnp.where(chroma > 0, 1.0 / jnp.where(chroma > 0, chroma, 1.0), 0.0)
  sextant = jnp.where(
    value == red,
    (green - blue) * inverse,
    jnp.where(value == green, 2.0 + (blue - red) * inverse, 4.0 + (red - green) * inverse),
  )
  sextant = jnp.where(chroma > 0, jnp.where(sextant < 0, sextant + 6.0, sextant), 0.0)
  return _Cone(hue=sextant / 6.0, chroma=chroma, value=value)


def _from_cone(cone: _Cone) -> Array:
  """Each channel is one trapezoid of the hue, a third of a turn apart; broadcasting over the channels keeps XLA's
  loops free of branches, four times as fast as stacking them."""
  turn = cone.hue + jnp.array([5.0, 3.0, 1.0], jnp.float32) / 6.0
  k = (turn - jnp.floor(turn)) * 6.0
  return cone.value - cone.chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)


def shift_hsv(image: Array, *, hue: Array | float = 0.0, saturation: Array | float = 1.0) -> Array:
  """Adds to the hue (in turns) and multiplies the saturation, clipped to 1; identity on one channel."""
  if image.shape[-1] == 1:
    return image
  cone = _to_cone(image)
  chroma = jnp.clip(cone.chroma * saturation, 0.0, cone.value)
  return _from_cone(_Cone(hue=cone.hue + hue, chroma=chroma, value=cone.value))


def shift_hue(image: Array, turns: Array | float) -> Array:
  """Rotates the hue in HSV by `turns` of the circle: torchvision, TensorFlow and BYOL alike."""
  return shift_hsv(image, hue=turns)


def saturation_hsv(image: Array, factor: Array | float) -> Array:
  """Multiplies the saturation of HSV, as TensorFlow, SimCLR and BYOL do."""
  return shift_hsv(image, saturation=factor)


def gaussian_blur(image: Array, sigma: Array | float, *, radius: int, edge: str = "extend") -> Array:
  """Separable Gaussian of 2 radius + 1 normalized taps.

  Two products with banded matrices: per-image kernels make a convolution under `vmap` 20 times as slow.

  Args:
    image: [H, W, C].
    sigma: standard deviation in pixels.
    radius: taps to either side.
    edge: what is outside: "extend" the border, or "zero".
  """
  planes = jnp.moveaxis(image, -1, 0)
  down, across = (_blur_matrix(n, sigma, radius, edge) for n in image.shape[:2])
  planes = jnp.einsum("yh,chw->cyw", down, planes, precision=jax.lax.Precision.HIGHEST)
  planes = jnp.einsum("cyw,xw->cyx", planes, across, precision=jax.lax.Precision.HIGHEST)
  return jnp.moveaxis(planes, 0, -1)


def _blur_matrix(length: int, sigma: Array | float, radius: int, edge: str) -> Array:
  """[length, length]; the weights of pixels outside are dropped, or added to the border pixel."""
  offset = jnp.arange(length)[:, None] - jnp.arange(-radius, length + radius)  # [length, length + 2 radius]
  taps = jnp.where(jnp.abs(offset) <= radius, jnp.exp(-0.5 * jnp.square(offset / sigma)), 0.0)
  taps = taps / taps.sum(-1, keepdims=True)
  matrix = taps[:, radius : radius + length]
  if edge == "extend":
    matrix = matrix.at[:, 0].add(taps[:, :radius].sum(-1)).at[:, -1].add(taps[:, radius + length :].sum(-1))
  return matrix


def solarize(image: Array, threshold: Array | float = 0.5) -> Array:
  """Inverts pixels at or above `threshold`; PIL's integer threshold t is (t - 0.5) / 255, and 128 is 0.5."""
  return jnp.where(image < threshold, image, 1.0 - image)


def normalize(image: Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
  """(image - mean) / std per channel; a gray image takes the averages over the channels (own choice)."""
  mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
  if image.shape[-1] == 1:
    mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
  return (image - mean) / std


def equalize(image: Array) -> Array:
  """Flattens the histogram of each channel on 256 levels, as PIL does, integer steps included (PAWS on CIFAR)."""
  level = jnp.round(image * 255.0).astype(jnp.int32)
  bins = jnp.arange(256)
  counts = (level.reshape(-1, 1, image.shape[-1]) == bins[:, None]).sum(0)  # [256, C]
  last = jnp.where(counts > 0, bins[:, None], -1).max(0)  # [C] brightest level in use
  pixels = image.shape[0] * image.shape[1]
  step = (pixels - jnp.take_along_axis(counts, last[None], 0)[0]) // 255
  before = jnp.cumsum(counts, 0) - counts
  table = jnp.clip((step // 2 + before) // jnp.maximum(step, 1), 0, 255)
  table = jnp.where((step == 0) | ((counts > 0).sum(0) <= 1), bins[:, None], table)
  return jnp.take_along_axis(table, level.reshape(-1, image.shape[-1]), 0).reshape(image.shape) / 255.0
