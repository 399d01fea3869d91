"""RandAugment: every operation is PIL's or the TensorFlow code's, and what is drawn is what the recipe says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

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


def mix(degenerate, level):
  factor = 0.1 + 0.18 * level
  return (degenerate + factor * (PIXELS.astype(np.float64) - degenerate)).clip(0, 255).astype(np.uint8)


def nearest(*matrix):
  """The pixel at the nearest place, halves away from 0, in float32; 0 at the center of the first pixel."""
  a, b, c, d, e, f = (np.float32(m) for m in matrix)
  away = lambda v: int(math.copysign(math.floor(abs(v) + np.float32(0.5)), v))
  out = np.empty_like(PIXELS)
  for y in range(24):
    for x in range(20):
      column, row = away(a * np.float32(x) + b * np.float32(y) + c), away(d * np.float32(x) + e * np.float32(y) + f)
      out[y, x] = PIXELS[row, column] if 0 <= row < 24 and 0 <= column < 20 else FILL
  return out


def turned(degrees):
  c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  return nearest(c, -s, (19 - (c * 19 - s * 23)) / 2, s, c, (23 - (s * 19 + c * 23)) / 2)


def cut_out(pad):
  out, (y, x) = PIXELS.copy(), (int(0.3 * 24), int(0.85 * 20))
  out[max(0, y - pad) : y + pad, max(0, x - pad) : x + pad] = FILL
  return out


def inverted(threshold):  # compared in 8 bits
  return np.where(np.uint8(threshold % 256) > PIXELS, PIXELS, 255 - PIXELS)


PLACE = (0.3, 0.85)
GRAY = (PIXELS @ np.array([0.2989, 0.587, 0.114])).astype(np.uint8)[..., None]
# From the public code's definitions: tensorflow/tpu, efficientnet/autoaugment.py.
TF_ORACLES = {
  "auto_contrast": lambda m, s: ImageOps.autocontrast(PIL_IMAGE),
  "equalize": lambda m, s: ImageOps.equalize(PIL_IMAGE),
  "invert": lambda m, s: 255 - PIXELS,
  "posterize": lambda m, s: PIXELS >> min(8 - int(m / 10 * 4), 7) << min(8 - int(m / 10 * 4), 7),
  "solarize": lambda m, s: inverted(int(m / 10 * 256)),
  "solarize_add": lambda m, s: np.where(PIXELS < 128, np.minimum(PIXELS.astype(int) + int(m / 10 * 110), 255), PIXELS),
  "color": lambda m, s: mix(GRAY, m),
  "contrast": lambda m, s: mix(24 * 20 // 256, m),
  "brightness": lambda m, s: mix(0, m),
  "sharpness": lambda m, s: mix(np.asarray(PIL_IMAGE.filter(ImageFilter.SMOOTH)), m),
  "cutout": lambda m, s: cut_out(int(m / 10 * 40)),
  "rotate": lambda m, s: turned(3 * m * s),
  "shear_x": lambda m, s: nearest(1, 0.03 * m * s, 0, 0, 1, 0),
  "shear_y": lambda m, s: nearest(1, 0, 0, 0.03 * m * s, 1, 0),
  "translate_x": lambda m, s: nearest(1, 0, 10 * m * s, 0, 1, 0),
  "translate_y": lambda m, s: nearest(1, 0, 0, 0, 1, 10 * m * s),
}


@functools.partial(jax.jit, static_argnames="style")
def every(image, level, sign, style):
  options = {"level": level, "sign": sign, "fill": jnp.asarray(FILL) / 255.0, "style": style, "place": jnp.asarray(PLACE)}
  return jax.vmap(lambda which: operate(image, which, **options))(jnp.arange(len(OPERATIONS[style])))


@pytest.mark.parametrize("level,sign", [(9.0, 1.0), (5.5, -1.0), (10.0, -1.0)])
def test_every_operation_is_that_of_pil(level, sign):
  got = np.asarray(every(PIXELS / np.float32(255), level, sign, "timm")) * 255
  assert set(ORACLES) == set(OPERATIONS["timm"])
  for name, picture in zip(OPERATIONS["timm"], got, strict=True):
    expected = np.asarray(ORACLES[name](level, sign), np.float32)
    error = np.abs(picture - expected)
    if name in ("rotate", "shear_x", "shear_y"):  # PIL steps in fixed point: a pixel on the edge of the image may flip
      error = np.sort(error.max(-1).ravel())[:-3]
    assert error.max() <= 2.01, (name, level, sign, error.max())
    assert np.abs(picture - PIXELS).max() > 5, name


@pytest.mark.parametrize("level,sign", [(10.0, 1.0), (1.5, -1.0), (1.2, 1.0), (9.0, -1.0)])
def test_every_operation_is_that_of_the_tensorflow_code(level, sign):
  got = np.asarray(every(PIXELS / np.float32(255), level, sign, "tf")) * 255
  assert len(TF_ORACLES) == 16 and set(TF_ORACLES) == set(OPERATIONS["tf"])
  for name, picture in zip(OPERATIONS["tf"], got, strict=True):
    error = np.abs(picture - np.asarray(TF_ORACLES[name](level, sign), np.float32)).max(-1)
    if name in ("rotate", "shear_x", "shear_y"):  # a place halfway between two pixels, in another rounding
      error = np.sort(error.ravel())[:-3]
    bound = 2.01 if name in ("color", "sharpness") else 1.01  # whose degenerates are cut to integers as well
    assert error.max() <= bound, (name, level, sign, error.max())
    assert np.abs(picture - PIXELS).max() > 5, name


def test_contrast_of_the_tensorflow_code_is_about_the_number_of_pixels():
  image = jnp.linspace(0.0, 1.0, 256)[None, :, None]
  options = {"level": 10.0, "sign": 1.0, "fill": jnp.zeros(1), "style": "tf"}
  for height, middle in ((224, 224), (400, 255)):
    got = operate(jnp.broadcast_to(image, (height, 256, 1)), OPERATIONS["tf"].index("contrast"), **options)
    np.testing.assert_allclose(got[0, :, 0] * 255, np.clip(middle + 1.9 * (np.arange(256) - middle), 0, 255), atol=1e-3)


def test_the_identity_reads_every_pixel_from_itself():
  image = jnp.asarray(PIXELS / np.float32(255))
  identity = jnp.array([[1.0, 0, 0], [0, 1, 0]])
  np.testing.assert_allclose(warp(image, identity, fill=jnp.zeros(3)), image, atol=1e-6)
  np.testing.assert_array_equal(warp(image, identity, fill=jnp.zeros(3), nearest=True), image)


@pytest.fixture
def run(monkeypatch):
  """What 3,000 images draw, [3000, 6], 0 where nothing happens: 1 + the operation, level, sign, sum of the fill, place."""

  def tell(image, which, *, level, sign, fill, style, place):
    return jnp.stack([which + 1.0, level, sign, jnp.sum(fill), *place])[None, None]

  monkeypatch.setattr(rand_augment, "operate", tell)
  monkeypatch.setattr(RandAugment, "_need_color", lambda *_: None)
  keys = jax.random.split(jax.random.key(0), 3000)
  return lambda **fields: np.asarray(jax.jit(jax.vmap(RandAugment(**fields), (0, None)))(keys, jnp.zeros((1, 1, 6))))[:, 0, 0]


def test_operations_are_drawn_evenly_and_happen_half_of_the_time(run):
  run = functools.partial(run, fill=(0.1, 0.2, 0.3, 0.4, 0.0, 0.0))
  once = run(layers=1)
  on = once[:, 0] > 0
  assert 0.47 < on.mean() < 0.53
  which, level, sign, fill = once[on, :4].T
  shares = np.bincount(which.astype(int) - 1, minlength=len(OPERATIONS["timm"])) / on.sum()
  assert len(shares) == 15 and np.all(np.abs(shares - 1 / 15) < 0.025), shares
  assert abs(level.mean() - 9) < 0.05 and abs(level.std() - 0.48) < 0.05 and level.max() == 10  # of N(9, 0.5) clipped at 10
  assert abs(sign.mean()) < 0.08 and np.allclose(fill, 1.0)
  other = run(layers=2, magnitude=3.0, std=0.0, p=0.9)
  on = other[:, 0] > 0
  assert abs(on.mean() - 0.99) < 0.008 and np.all(other[on, 1] == 3)  # of two, at least one


def test_the_tensorflow_recipe_always_happens_at_one_level(run):
  which, level, sign, fill, *place = run(style="tf", layers=1, magnitude=10.0, std=0.0, p=1.0).T
  shares = np.bincount(which.astype(int) - 1, minlength=16) / len(which)
  assert len(shares) == 16 and np.all(np.abs(shares - 1 / 16) < 0.02) and which.min() == 1, shares
  assert np.all(level == 10) and abs(sign.mean()) < 0.06 and np.allclose(fill, 6 * 128 / 255)
  for share in place:
    assert np.all(np.abs(np.histogram(share, 4, (0, 1))[0] / len(share) - 0.25) < 0.03)
  which, level, sign, _, *place = run(style="tf", layers=1, magnitude=5.0, std=1.0, p=1.0).T
  assert abs(np.corrcoef([which, level, sign, *place]) - np.eye(5)).max() < 0.08


def test_gray_images_pass_and_others_are_an_error():
  gray = jnp.asarray(PIXELS[..., :1] / np.float32(255))
  assert RandAugment()(jax.random.key(0), gray).shape == gray.shape
  with pytest.raises(UserError, match="RandAugment needs images of 3 channels"):
    RandAugment().validate(5)
  with pytest.raises(UserError, match="RandAugment.fill=.*expected 1 numbers"):
    RandAugment(fill=(0.5, 0.5, 0.5)).validate(1)


@pytest.mark.parametrize("fields", [{"layers": 0}, {"magnitude": 11.0}, {"std": -1.0}, {"p": 2.0}, {"style": "torch"}])
def test_wrong_fields_are_named(fields):
  with pytest.raises(UserError, match=f"RandAugment.{next(iter(fields))}="):
    RandAugment(**fields)
