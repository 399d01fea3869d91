"""The photometric distortion of semantic segmentation (mmsegmentation's PhotoMetricDistortion, Segmenter's and dinov3's)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from big_ssl.augment import color
from big_ssl.augment.photometric import Operation
from big_ssl.core.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotometricDistortion(Operation):
  """Brightness, contrast, saturation and hue, each with probability 1/2; contrast comes second or last, by a coin.

  Contrast multiplies all values, saturation that of HSV; each result is clipped to [0, 1]. The public code shifts 8-bit
  hues of 180 levels by up to 18: a tenth of a turn.

  Attributes:
    strength: 1 is the published one: 32 gray levels up or down, factors in 0.5 to 1.5.
  """

  strength: float = 1.0

  def __post_init__(self):
    self._check(0 <= self.strength <= 2, "strength", "0 to 2")

  def validate(self, channels: int, *, view: str = "?") -> None:
    self._need_color(channels, view)

  def __call__(self, key: Array, image: Array) -> Array:
    """image: [H, W, C] float32 in [0, 1]."""
    self.validate(image.shape[-1])
    draws = jax.random.uniform(key, (16,))  # 9 are used, see `ColorJitter`
    on = draws[:4] < 0.5
    amount = self.strength * (2 * draws[4:8] - 1)  # [-strength, strength]
    clip = lambda x: jnp.clip(x, 0.0, 1.0)
    factor = jnp.where(on[1], 1 + 0.5 * amount[1], 1.0)
    second = draws[8] < 0.5
    image = clip(image + jnp.where(on[0], 32 / 255 * amount[0], 0.0))
    image = clip(image * jnp.where(second, factor, 1.0))
    saturation = jnp.where(on[2], 1 + 0.5 * amount[2], 1.0)
    image = clip(color.shift_hsv(image, hue=jnp.where(on[3], 0.1 * amount[3], 0.0), saturation=saturation))
    return clip(image * jnp.where(second, 1.0, factor))
