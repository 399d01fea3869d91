"""Pixel operations against PIL's and BYOL's own results, in gray levels of 255."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import color

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
PIL = np.load(GOLDENS / "multicrop_view_ops.npz")
BYOL = np.load(GOLDENS / "byol_augment_ops.npz")
IMAGE = jnp.asarray(PIL["image"], jnp.float32) / 255
FLOAT = jnp.asarray(BYOL["image"])
GRAY = jnp.broadcast_to(FLOAT[..., :1], FLOAT.shape)


def difference(image, name):
  """Gray levels between our result, as the 8-bit picture it stands for, and PIL's."""
  return np.abs(np.round(np.clip(np.asarray(image), 0, 1) * 255) - PIL[name].astype(float))


@pytest.mark.parametrize(
  "name,operation,argument,tolerance",
  [
    *((f"brightness/{f}", color.brightness, f, 1) for f in (0.6, 1.4)),
    *((f"contrast/{f}", color.contrast_luma, f, 1) for f in (0.6, 1.4)),
    *((f"saturation/{f}", color.saturation_luma, f, 2) for f in (0.2, 1.8)),
    *((f"solarize/{t}", color.solarize, (t - 0.5) / 255, 0) for t in (128, 64)),
  ],
)
def test_single_operations_are_those_of_pil(name, operation, argument, tolerance):
  assert difference(operation(IMAGE, argument), name).max() <= tolerance


@pytest.mark.parametrize("turns", [0.1, -0.2])
def test_the_hue_is_that_of_pil_up_to_its_eight_bits(turns):
  error = difference(color.shift_hue(IMAGE, turns), f"hue/{turns}")
  assert error.mean() <= 1.5 and error.max() <= 10


def test_grayscale_is_that_of_pil():
  assert difference(color.grayscale(IMAGE), "grayscale").max() <= 1


def test_equalize_is_that_of_pil_exactly():
  assert difference(color.equalize(IMAGE), "equalize").max() == 0


def test_equalize_leaves_a_picture_of_one_level_alone():
  flat = jnp.full((5, 5, 3), 77 / 255)
  np.testing.assert_allclose(color.equalize(flat), flat, atol=1e-6)


@pytest.mark.parametrize("radius", [0.1, 0.7, 1.3, 2.0])
def test_the_blur_is_near_that_of_pil_in_the_mean(radius):
  blurred = color.gaussian_blur(IMAGE, radius, radius=8)
  assert difference(blurred, f"gaussian_blur/{radius}").mean() <= 1.5


@pytest.mark.parametrize("name", ["imagenet", "swav", "cifar_paws"])
def test_normalize_is_that_of_torchvision(name):
  mean, std = PIL[f"normalise/{name}_mean_std"].tolist()
  normalized = color.normalize(IMAGE, mean=tuple(mean), std=tuple(std))
  np.testing.assert_allclose(normalized, PIL[f"normalise/{name}"], atol=2e-6)


@pytest.mark.parametrize(
  "name,result",
  [
    ("brightness", lambda x: color.brightness_add(x, 0.23)),
    ("contrast", lambda x: color.contrast_channel(x, 1.31)),
    ("hsv", color.rgb_to_hsv),
    ("saturation", lambda x: color.saturation_hsv(x, 0.7)),
    ("hue", lambda x: color.shift_hue(x, 0.08)),
    ("grayscale", lambda x: color.grayscale(x, weights=color.BYOL_LUMA)),
    ("blur", lambda x: color.gaussian_blur(x, 1.2, radius=2, edge="zero")),
    ("solarize", color.solarize),
  ],
)
def test_operations_of_byol_are_its_own(name, result):
  np.testing.assert_allclose(result(FLOAT), BYOL[name], atol=2e-6)


def test_hsv_and_back_is_the_identity_and_so_is_a_whole_turn():
  np.testing.assert_allclose(color.hsv_to_rgb(color.rgb_to_hsv(FLOAT)), FLOAT, atol=2e-6)
  for turns in (1.0, -2.0):
    np.testing.assert_allclose(color.shift_hue(FLOAT, turns), FLOAT, atol=5e-6)


@pytest.mark.parametrize("picture", [GRAY, GRAY[..., :1]], ids=["three channels", "one channel"])
def test_gray_pictures_have_no_hue_no_saturation_and_are_their_own_gray(picture):
  for operation in (
    color.grayscale,
    lambda x: color.shift_hue(x, 0.3),
    lambda x: color.saturation_hsv(x, 1.7),
    lambda x: color.saturation_luma(x, 1.7),
  ):
    np.testing.assert_allclose(operation(picture), picture, atol=1e-6)


def test_an_extended_edge_keeps_a_flat_picture_flat_and_a_zero_edge_darkens_it():
  flat = jnp.full((12, 9, 3), 0.5)
  np.testing.assert_allclose(color.gaussian_blur(flat, 1.5, radius=4), flat, atol=1e-6)
  dark = color.gaussian_blur(flat, 1.5, radius=4, edge="zero")
  assert dark[0].max() < 0.45 and abs(float(dark[6, 4, 0]) - 0.5) < 1e-3


def test_a_blur_wider_than_the_picture_stays_a_mean_of_its_pixels():
  picture = FLOAT[:3, :4]
  blurred = color.gaussian_blur(picture, 2.0, radius=8)
  assert bool(jnp.isfinite(blurred).all()) and blurred.min() >= picture.min() and blurred.max() <= picture.max()
