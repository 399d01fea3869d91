"""Pixel operations on one image, [H, W, C] float32 in [0, 1], as pure functions; nothing here is random.

What torchvision does through PIL happens on 8-bit integers that are truncated after every operation; here nothing is
rounded but the mean of `contrast_luma`, so single operations agree within one grey level (saturation 2, hue 1.5 in the
mean: PIL keeps the hue in 8 bits as well). On images with one channel, gray already, saturation, hue and grayscale do
nothing. Functions that need colors take 1 or 3 channels.
"""

from __future__ import annotations

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


def contrast_luma(image: Array, factor: Array | float) -> Array:
  """Blends with the mean of the gray image, rounded to a grey level, as PIL and torchvision do."""
  mean = jnp.floor(luma(image).mean() * 255.0 + 0.5) / 255.0
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
  red, green, blue = (image[..., i] for i in range(3))
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  inverse = jnp.where(chroma > 0, 1.0 / jnp.where(chroma > 0, chroma, 1.0), 0.0)
  hue = jnp.where(
    value == red,
    (green - blue) * inverse,
    jnp.where(value == green, 2.0 + (blue - red) * inverse, 4.0 + (red - green) * inverse),
  )
  hue = jnp.where(hue < 0, hue + 6.0, hue) / 6.0
  saturation = chroma / jnp.where(value > 0, value, 1.0)
  return jnp.stack([hue, saturation, value], -1)


def hsv_to_rgb(image: Array) -> Array:
  """The inverse of `rgb_to_hsv`; the hue is taken modulo 1."""
  hue, saturation, value = (image[..., i] for i in range(3))
  chroma = value * saturation
  planes = []
  for offset in (5.0, 3.0, 1.0):  # each channel is the same trapezoid of the hue, a third of a turn apart
    turn = hue + offset / 6.0
    k = (turn - jnp.floor(turn)) * 6.0
    planes.append(value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0))
  return jnp.stack(planes, -1)


def shift_hsv(image: Array, *, hue: Array | float = 0.0, saturation: Array | float = 1.0) -> Array:
  """Adds to the hue (in turns) and multiplies the saturation, clipped to 1; identity on one channel."""
  if image.shape[-1] == 1:
    return image
  hsv = rgb_to_hsv(image)
  shifted = jnp.stack([hsv[..., 0] + hue, jnp.clip(hsv[..., 1] * saturation, 0.0, 1.0), hsv[..., 2]], -1)
  return hsv_to_rgb(shifted)


def shift_hue(image: Array, turns: Array | float) -> Array:
  """Rotates the hue in HSV by `turns` of the circle: torchvision, TensorFlow and BYOL alike."""
  return shift_hsv(image, hue=turns)


def saturation_hsv(image: Array, factor: Array | float) -> Array:
  """Multiplies the saturation of HSV, as TensorFlow, SimCLR and BYOL do."""
  return shift_hsv(image, saturation=factor)


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
