"""Confusion counts, scores and sliding windows against the public codes, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.ops import segmentation as ops


def test_scores_are_those_of_the_public_code(golden):
  g = golden("segmentation_eval_miou")
  counts = sum(
    ops.confusion(p, labels=ops.to_classes(t, ignore=255), num_classes=7) for p, t in zip(g["prediction"], g["label"])
  )
  assert counts.dtype == np.int64
  found = ops.scores(counts)
  np.testing.assert_array_equal(np.diag(counts), g["intersection"])
  np.testing.assert_array_equal(counts.sum(0) + counts.sum(1) - np.diag(counts), g["union"])
  np.testing.assert_allclose(np.nan_to_num(found.iou, nan=-1), g["iou_per_class"], rtol=1e-6)
  np.testing.assert_allclose(np.nan_to_num(found.accuracy, nan=-1), g["acc_per_class"], rtol=1e-6)
  means = [found.mean_iou, found.mean_dice, found.mean_accuracy, found.pixel_accuracy]
  np.testing.assert_allclose(means, [g["mean_iou"], g["mean_dice"], g["mean_acc"], g["pixel_acc"]], rtol=1e-6)


def test_the_truth_scores_100_and_counts_are_exact_beyond_float32():
  labels = np.array([[0, 1, 2, -1]])
  counts = ops.confusion(np.where(labels < 0, 1, labels), labels=labels, num_classes=4) * (2**40 + 1)
  assert counts.sum() == 3 * (2**40 + 1)
  found = ops.scores(counts)
  assert found.mean_iou == found.mean_dice == found.mean_accuracy == found.pixel_accuracy == 1
  assert np.isnan(found.iou[3]) and np.isnan(found.dice[3]) and np.isnan(ops.scores(0 * counts).mean_iou)


@pytest.mark.parametrize("make", [np.array, jnp.array])
def test_ignored_labels_and_a_dropped_first_one_count_for_nothing(make):
  labels = make([0, 1, 7, 255], dtype="uint8")
  np.testing.assert_array_equal(ops.to_classes(labels, ignore=255), [0, 1, 7, -1])
  np.testing.assert_array_equal(ops.to_classes(labels, ignore=7, drop_first=True), [-1, 0, -1, 254])


def test_a_label_that_is_no_class_is_a_clear_error():
  with pytest.raises(UserError, match="a label 7 where there are 3 classes"):
    ops.confusion(np.zeros(2, int), labels=np.array([1, 7]), num_classes=3)


def public_model(g):
  """The golden's: colors of the pixels, and a ramp over the window."""
  return lambda windows: (
    jnp.einsum("kc,nyxc->nyxk", g["class_from_rgb"], windows) + jnp.moveaxis(g["window_ramp"], 0, -1)
  )


def test_windows_anchors_and_probabilities_are_those_of_the_public_code(golden):
  g = golden("segmentation_eval_sliding_window")
  image, model, shape = np.moveaxis(g["image"][0], 0, -1), public_model(g), g["segmentation"].shape
  plan = ops.plan_windows(image.shape[:2], window=16, stride=12)
  np.testing.assert_array_equal(plan.anchors, g["anchors_yx"])
  np.testing.assert_array_equal(plan.shape, g["resized_shape"])
  found = 0
  for flipped in (False, True):
    windows = ops.cut_windows(image[:, ::-1] if flipped else image, plan=plan)
    found += ops.probabilities(model(windows), plan=plan, shape=shape, flipped=flipped) / 2
  np.testing.assert_allclose(np.moveaxis(found, -1, 0), g["probabilities"], atol=1e-5)
  np.testing.assert_array_equal(jnp.argmax(found, -1), g["segmentation"])


@pytest.mark.parametrize("shape", [(16, 40), (17, 16), (64, 33)])
def test_windows_cover_every_pixel_and_restore_what_was_cut(shape):
  plan = ops.plan_windows(shape, window=16, stride=12)
  image = np.random.default_rng(0).normal(size=(*plan.shape, 2)).astype(np.float32)
  assert plan.shape == shape and len(set(plan.anchors)) == len(plan.anchors)
  np.testing.assert_allclose(ops.merge_windows(ops.cut_windows(image, plan=plan), plan=plan), image, rtol=1e-5)


def test_an_image_smaller_than_the_window_is_enlarged_until_it_fits():
  plan = ops.plan_windows((10, 25), window=16, stride=12)
  assert plan.shape == (16, 40) and plan.anchors == ((0, 0), (0, 12), (0, 24))
  assert ops.plan_windows((10, 25), window=0, stride=1).anchors == ((0, 0),)
  # As in the public code, whose float 15 / 11 * 22 is just below 30.
  assert ops.plan_windows((11, 15), window=22, stride=12).shape == (22, 29)
  assert ops.plan_windows((15, 11), window=22, stride=12).shape == (29, 22)


def test_nearest_masks_take_the_pixel_under_their_centers():
  mask = np.arange(6).reshape(2, 3)
  np.testing.assert_array_equal(ops.resize_mask(mask, shape=(4, 6)), np.kron(mask, np.ones((2, 2), int)))
  np.testing.assert_array_equal(ops.resize_mask(np.arange(9)[None], shape=(1, 3)), [[1, 4, 7]])
