"""Cutting views on the device: PIL's crops, flips, and nothing of the canvas outside the box."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import resample
from big_ssl.core.resampling import axis_weights
from big_ssl.core.types import UserError

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "goldens" / "multicrop_view_ops.npz")
IMAGE = GOLDEN["image"]
cut = jax.jit(resample.cut, static_argnames=("size", "interpolation", "antialias"))


def one(image, box, flip=False, **options):
  box = jnp.asarray(box, jnp.float32)[None, None]
  return np.asarray(cut(jnp.asarray(image)[None], box, jnp.full((1, 1), flip), **options))[0, 0]


def levels(picture):
  return np.round(picture * 255)


@pytest.mark.parametrize("interpolation,tolerance", [("bilinear", 1), ("bicubic", 3)])
def test_crops_are_those_of_pil(interpolation, tolerance):
  boxes = jnp.asarray(GOLDEN["crop_boxes_top_left_height_width"], jnp.float32)[None]
  views = cut(jnp.asarray(IMAGE)[None], boxes, jnp.zeros((1, 3), bool), size=24, interpolation=interpolation)
  assert views.shape == (1, 3, 24, 24, 3) and views.dtype == jnp.float32
  for i in range(3):
    expected = GOLDEN[f"crop{i}/{interpolation}"].astype(float)
    np.testing.assert_allclose(levels(np.asarray(views[0, i])), expected, atol=tolerance)


def test_with_sizes_the_cut_is_resize_then_center_crop():
  expected = GOLDEN["eval_resize/shorter_side_then_centre_crop"].astype(float)
  box = [2 * 40 / 28, 6 * 52 / 36, 24 * 40 / 28, 24 * 52 / 36]
  resized_whole = one(IMAGE, box, size=24, interpolation="bicubic", sizes=jnp.array([[40, 52]]))
  np.testing.assert_allclose(levels(resized_whole), expected, atol=3)
  cut_first = np.abs(levels(one(IMAGE, box, size=24, interpolation="bicubic")) - expected)
  assert cut_first[1:-1, 1:-1].max() <= 3 and cut_first.max() > 3  # the border misses its neighbors outside the box


@pytest.mark.parametrize("box", [(0, 0, 40, 52), (5, 11, 20, 9), (3.5, 2.25, 17.5, 30.0)])
def test_a_flip_reverses_the_columns(box):
  plain = one(IMAGE, box, size=(13, 16))
  np.testing.assert_allclose(one(IMAGE, box, flip=True, size=(13, 16)), plain[:, ::-1], atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_of_its_own_size_is_the_crop(interpolation):
  got = one(IMAGE, (4, 7, 20, 30), size=(20, 30), interpolation=interpolation)
  np.testing.assert_array_equal(levels(got), IMAGE[4:24, 7:37])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_no_pixel_outside_the_box_is_read(interpolation):
  canvas = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
  canvas[4:34, 6:40] = IMAGE[:30, :34]
  got = one(canvas, (4, 6, 30, 34), size=17, interpolation=interpolation)
  np.testing.assert_allclose(got, one(IMAGE, (0, 0, 30, 34), size=17, interpolation=interpolation), atol=2e-5)


def test_the_padding_of_the_canvas_is_not_read_with_sizes():
  canvas = np.full((64, 64, 3), 255, np.uint8)
  canvas[:40, :52] = IMAGE
  box, options = (0.5, 0.5, 39.25, 51.0), dict(size=16, interpolation="bicubic", sizes=jnp.array([[40, 52]]))
  np.testing.assert_allclose(one(canvas, box, **options), one(IMAGE, box, **options), atol=1e-6)


def test_sixteen_bits_and_floats_are_the_same_picture():
  box = (2, 3, 30, 40)
  expected = one(IMAGE, box, size=16)
  np.testing.assert_allclose(one(IMAGE.astype(np.uint16) * 257, box, size=16), expected, atol=1e-6)
  np.testing.assert_allclose(one(IMAGE.astype(np.float32) / 255, box, size=16), expected, atol=1e-6)


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (39, 51, 1, 1), (10.3, 20.6, 0.4, 1.7), (0, 0, 40, 1)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_tiny_boxes_stay_finite_and_between_the_pixels_they_touch(box, interpolation):
  got = one(IMAGE, box, size=8, interpolation=interpolation)
  y0, x0 = (int(np.floor(v)) for v in box[:2])
  y1, x1 = (int(np.ceil(a + b)) for a, b in zip(box[:2], box[2:]))
  part = IMAGE[y0:y1, x0:x1] / 255
  slack = 1e-5 if interpolation == "bilinear" else 0.2  # a cubic overshoots
  assert np.isfinite(got).all()
  assert got.min() >= part.min() - slack and got.max() <= part.max() + slack


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_host_and_device_weights_agree_and_rows_sum_to_one(interpolation):
  rng = np.random.default_rng(0)
  length = rng.uniform(0.5, 200, (5, 3)).astype(np.float32)
  start = (rng.uniform(size=(5, 3)) * (200 - length)).astype(np.float32)
  options = dict(size=32, canvas=201, interpolation=interpolation, flip=rng.uniform(size=(5, 3)) < 0.5)
  host = axis_weights(start, length, xp=np, **options)
  device = axis_weights(jnp.asarray(start), jnp.asarray(length), xp=jnp, **options)
  assert host.shape == (5, 3, 32, 201) and host.dtype == np.float32
  np.testing.assert_allclose(host.sum(-1), 1.0, atol=1e-5)
  np.testing.assert_allclose(host, device, atol=2e-5)


def test_rows_and_copies_are_independent_and_jit_changes_nothing():
  rng = np.random.default_rng(1)
  canvas = jnp.asarray(rng.integers(0, 256, (3, 20, 24, 3)).astype(np.uint8))
  box = jnp.asarray(np.concatenate([rng.uniform(0, 8, (3, 2, 2)), rng.uniform(2, 12, (3, 2, 2))], -1), jnp.float32)
  flip = jnp.asarray(rng.uniform(size=(3, 2)) < 0.5)
  whole = cut(canvas, box, flip, size=9, interpolation="bicubic")
  for row, copy in ((0, 1), (2, 0)):
    rows, copies = slice(row, row + 1), slice(copy, copy + 1)
    alone = resample.cut(canvas[rows], box[rows, copies], flip[rows, copies], size=9, interpolation="bicubic")
    np.testing.assert_allclose(whole[row, copy], alone[0, 0], atol=1e-5)


def test_an_unknown_interpolation_names_the_nearest():
  with pytest.raises(UserError, match="Did you mean 'bicubic'"):
    one(IMAGE, (0, 0, 4, 4), size=2, interpolation="bicubik")


@pytest.mark.parametrize("side", [24, 56])
def test_without_antialiasing_only_the_two_nearest_pixels_count(side):
  """tf.image.resize's default: half-pixel centers, clamped to the crop; written as interpolation of the crop."""
  y, x, height, width = 3, 6, 34, 41
  got = one(IMAGE, (y, x, height, width), size=side, antialias=False)
  crop = IMAGE[y : y + height, x : x + width] / 255.0
  for axis, length in ((0, height), (1, width)):
    at = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
    low = np.minimum(np.floor(at).astype(int), length - 2)
    share = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
    crop = np.take(crop, low, axis) * (1 - share) + np.take(crop, low + 1, axis) * share
  np.testing.assert_allclose(got, crop, atol=1e-5)
  if side == 24:
    assert np.abs(one(IMAGE, (y, x, height, width), size=side) - crop).max() > 0.01


def test_beyond_its_extent_a_crop_is_of_its_mean_color():
  box = jnp.asarray([[[3.0, 5.0, 20.0, 30.0]]])
  options = {"size": 32, "interpolation": "bilinear"}
  view = cut(jnp.asarray(IMAGE)[None], box, jnp.zeros((1, 1), bool), extent=jnp.asarray([[[8, 24]]]), **options)[0, 0]
  alone = cut(jnp.asarray(IMAGE)[None], box, jnp.zeros((1, 1), bool), size=(8, 24))[0, 0]
  np.testing.assert_allclose(view[:8, :24], alone, atol=1e-6)
  mean = np.asarray(alone).mean((0, 1))
  np.testing.assert_allclose(view[8:], np.broadcast_to(mean, (24, 32, 3)), atol=1e-6)
  np.testing.assert_allclose(view[:8, 24:], np.broadcast_to(mean, (8, 8, 3)), atol=1e-6)
