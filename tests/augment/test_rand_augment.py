"""RandAugment: every operation is PIL's, and what is drawn is what the recipe says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from big_ssl.augment import rand_augment
from big_ssl.augment.rand_augment import OPERATIONS, RandAugment, operate, warp
from big_ssl.core.types import UserError

RNG = np.random.default_rng(0)
# Smooth and bright enough that every operation moves something: waves of all levels, and noise.
GRID = np.stack(np.meshgrid(np.arange(24), np.arange(20), indexing="ij"), -1) / 24
PIXELS = (127 + 110 * np.sin(5 * GRID @ RNG.normal(size=(2, 3))) + RNG.normal(size=(24, 20, 3)) * 8).clip(4, 250).astype(np.uint8)
PIL_IMAGE = Image.fromarray(PIXELS)
FILL = (124, 116, 104)


def blend(enhance, level, sign):
  return enhance(PIL_IMAGE).enhance(max(0.1, 1 + sign * 0.09 * level))


def affine(*matrix):
  return PIL_IMAGE.transform(PIL_IMAGE.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def add_to_dark(level):
  return PIL_IMAGE.point([min(255, i + int(11 * level)) if i < 128 else i for i in range(256)] * 3)


ORACLES = {
  "auto_contrast": lambda m, s: ImageOps.autocontrast(PIL_IMAGE),
  "equalize": lambda m, s: ImageOps.equalize(PIL_IMAGE),
  "invert": lambda m, s: ImageOps.invert(PIL_IMAGE),
  "posterize": lambda m, s: PIL_IMAGE.point(lambda v: v & ~(2 ** (4 + int(m / 10 * 4)) - 1)),
  "solarize": lambda m, s: ImageOps.solarize(PIL_IMAGE, 256 - int(m / 10 * 256)),
  "solarize_add": lambda m, s: add_to_dark(m),
  "color": lambda m, s: blend(ImageEnhance.Color, m, s),
  "contrast": lambda m, s: blend(ImageEnhance.Contrast, m, s),
  "brightness": lambda m, s: blend(ImageEnhance.Brightness, m, s),
  "sharpness": lambda m, s: blend(ImageEnhance.Sharpness, m, s),
  "rotate": lambda m, s: PIL_IMAGE.rotate(3 * m * s, resample=Image.Resampling.BILINEAR, fillcolor=FILL),
  "shear_x": lambda m, s: affine(1, 0.03 * m * s, 0, 0, 1, 0),
  "shear_y": lambda m, s: affine(1, 0, 0, 0.03 * m * s, 1, 0),
  "translate_x": lambda m, s: affine(1, 0, 0.045 * m * s * 20, 0, 1, 0),
  "translate_y": lambda m, s: affine(1, 0, 0, 0, 1, 0.045 * m * s * 24),
}


@jax.jit
def every(image, level, sign):
  fill = jnp.asarray(FILL) / 255.0
  return jax.vmap(lambda which: operate(image, which, level=level, sign=sign, fill=fill))(jnp.arange(len(OPERATIONS)))


@pytest.mark.parametrize("level,sign", [(9.0, 1.0), (5.5, -1.0), (10.0, -1.0)])
def test_every_operation_is_that_of_pil(level, sign):
  got = np.asarray(every(PIXELS / np.float32(255), level, sign)) * 255
  assert set(ORACLES) == set(OPERATIONS)
  for name, picture in zip(OPERATIONS, got, strict=True):
    expected = np.asarray(ORACLES[name](level, sign), np.float32)
    error = np.abs(picture - expected)
    if name in ("rotate", "shear_x", "shear_y"):  # PIL steps in fixed point: a pixel on the edge of the image may flip
      error = np.sort(error.max(-1).ravel())[:-3]
    assert error.max() <= 2.01, (name, level, sign, error.max())
    assert np.abs(picture - PIXELS).max() > 5, name


def test_the_identity_reads_every_pixel_from_itself():
  image = jnp.asarray(PIXELS / np.float32(255))
  identity = jnp.array([[1.0, 0, 0], [0, 1, 0]])
  np.testing.assert_allclose(warp(image, identity, fill=jnp.zeros(3)), image, atol=1e-6)


def test_operations_are_drawn_evenly_and_happen_half_of_the_time(monkeypatch):
  tell = lambda image, which, *, level, sign, fill: jnp.stack([which + 1.0, level, sign, jnp.sum(fill)])[None, None]
  monkeypatch.setattr(rand_augment, "operate", tell)
  monkeypatch.setattr(RandAugment, "_need_color", lambda *_: None)
  keys = jax.random.split(jax.random.key(0), 3000)

  def run(**fields):
    return np.asarray(jax.jit(jax.vmap(RandAugment(fill=(0.1, 0.2, 0.3, 0.4), **fields), (0, None)))(keys, jnp.zeros((1, 1, 4))))[:, 0, 0]

  once = run(layers=1)
  on = once[:, 0] > 0
  assert 0.47 < on.mean() < 0.53
  which, level, sign, fill = once[on].T
  shares = np.bincount(which.astype(int) - 1, minlength=len(OPERATIONS)) / on.sum()
  assert len(shares) == 15 and np.all(np.abs(shares - 1 / 15) < 0.025), shares
  assert abs(level.mean() - 9) < 0.05 and abs(level.std() - 0.48) < 0.05 and level.max() == 10  # of N(9, 0.5) clipped at 10
  assert abs(sign.mean()) < 0.08 and np.allclose(fill, 1.0)
  other = run(layers=2, magnitude=3.0, std=0.0, p=0.9)
  on = other[:, 0] > 0
  assert abs(on.mean() - 0.99) < 0.008 and np.all(other[on, 1] == 3)  # of two, at least one


def test_gray_images_pass_and_others_are_an_error():
  gray = jnp.asarray(PIXELS[..., :1] / np.float32(255))
  assert RandAugment()(jax.random.key(0), gray).shape == gray.shape
  with pytest.raises(UserError, match="RandAugment needs images of 3 channels"):
    RandAugment().validate(5)
  with pytest.raises(UserError, match="RandAugment.fill=.*expected 1 numbers"):
    RandAugment(fill=(0.5, 0.5, 0.5)).validate(1)


@pytest.mark.parametrize("fields", [{"layers": 0}, {"magnitude": 11.0}, {"std": -1.0}, {"p": 2.0}])
def test_wrong_fields_are_named(fields):
  with pytest.raises(UserError, match=f"RandAugment.{next(iter(fields))}="):
    RandAugment(**fields)
