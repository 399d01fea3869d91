"""The photometric distortion of segmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import color
from big_ssl.augment.distortion import PhotometricDistortion
from big_ssl.core.types import UserError

IMAGE = jnp.linspace(0.3, 0.6, 2 * 3 * 3).reshape(2, 3, 3)[..., ::-1] * jnp.array([1.0, 0.9, 0.7])


def by_hand(key, image, strength):
  """The public code's steps, one after another, on the same draws."""
  d = np.asarray(jax.random.uniform(key, (16,)))
  on, amount = d[:4] < 0.5, strength * (2 * d[4:8] - 1)
  clip = lambda x: np.clip(x, 0, 1)
  contrast = lambda x: clip(x * (1 + 0.5 * amount[1])) if on[1] else x
  x = np.asarray(image)
  x = clip(x + 32 / 255 * amount[0]) if on[0] else x
  x = contrast(x) if d[8] < 0.5 else x
  hsv = np.array(color.rgb_to_hsv(jnp.asarray(x)))
  if on[2]:
    hsv[..., 1] = clip(hsv[..., 1] * (1 + 0.5 * amount[2]))
  if on[3]:
    hsv[..., 0] += 0.1 * amount[3]
  x = clip(np.asarray(color.hsv_to_rgb(jnp.asarray(hsv))))
  return x if d[8] < 0.5 else contrast(x)


def test_it_is_the_public_order_of_steps_on_the_same_draws():
  operation = jax.jit(PhotometricDistortion())
  changed = 0
  for i in range(12):
    key = jax.random.key(i)
    found = operation(key, IMAGE)
    np.testing.assert_allclose(found, by_hand(key, IMAGE, 1.0), atol=1e-5)
    changed += not np.allclose(found, IMAGE)
  assert changed > 8


def test_its_strength_and_the_channels_are_checked():
  np.testing.assert_allclose(PhotometricDistortion(strength=0.0)(jax.random.key(0), IMAGE), IMAGE, atol=1e-6)
  with pytest.raises(UserError, match="strength=3"):
    PhotometricDistortion(strength=3)
  with pytest.raises(UserError, match="3 channels"):
    PhotometricDistortion().validate(4, view="crop")
