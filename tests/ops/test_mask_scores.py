"""Scores of masks: perfect and known inputs, the definition with a dilation, and the reference of attention masks."""

import math

import numpy as np
import pytest
from scipy import ndimage

from big_ssl.ops import mask_scores


def blob(seed=0, shape=(40, 60)):
  noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 5)
  return noise > 0.3 * noise.max()


def boundary_by_definition(mask):
  h, w = mask.shape
  after = lambda y, x: [(a, b) for a, b in ((y, x + 1), (y + 1, x), (y + 1, x + 1)) if a < h and b < w]
  return np.array([[any(mask[y, x] != mask[p] for p in after(y, x)) for x in range(w)] for y in range(h)])


def f_by_definition(predicted, truth, tolerance):
  """With a dilation by a disk, as in the released code."""
  radius = math.ceil(tolerance * math.hypot(*truth.shape))
  y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
  disk = y * y + x * x <= radius * radius
  found, wanted = boundary_by_definition(predicted), boundary_by_definition(truth)
  grown = lambda b: ndimage.binary_dilation(b, disk)
  precision, recall = (found & grown(wanted)).sum() / found.sum(), (wanted & grown(found)).sum() / wanted.sum()
  return 2 * precision * recall / (precision + recall)


def test_the_truth_scores_one_and_a_disjoint_mask_zero():
  mask, far = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
  mask[3:9, 4:12], far[20:27, 25:35] = True, True
  assert mask_scores.region_iou(mask, truth=mask) == mask_scores.boundary_f(mask, truth=mask) == 1
  assert mask_scores.region_iou(far, truth=mask) == mask_scores.boundary_f(far, truth=mask) == 0


def test_region_iou_is_intersection_over_union():
  a, b = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
  a[:4], b[2:6] = True, True
  assert mask_scores.region_iou(a, truth=b) == pytest.approx(2 / 6)
  void = np.zeros((10, 10), bool)
  void[5] = True
  assert mask_scores.region_iou(a, truth=b, void=void) == pytest.approx(2 / 5)


def test_empty_masks_agree_with_each_other_only():
  mask, none = blob(), np.zeros((40, 60), bool)
  assert mask_scores.region_iou(none, truth=none) == mask_scores.boundary_f(none, truth=none) == 1
  for a, b in ((mask, none), (none, mask)):
    assert mask_scores.region_iou(a, truth=b) == mask_scores.boundary_f(a, truth=b) == 0


@pytest.mark.parametrize("tolerance", [0.008, 0.03, 0.1])
def test_boundary_measure_is_that_of_the_definition(tolerance):
  for seed in range(3):
    predicted, truth = blob(seed), blob(seed + 1)
    expected = f_by_definition(predicted, truth, tolerance)
    assert mask_scores.boundary_f(predicted, truth=truth, tolerance=tolerance) == pytest.approx(expected, abs=1e-12)


def test_a_boundary_within_the_tolerance_matches_and_one_beyond_does_not():
  wide = np.zeros((480, 854), bool)
  wide[100:300, 200:500] = True
  assert math.ceil(0.008 * math.hypot(480, 854)) == 8
  assert mask_scores.boundary_f(np.roll(wide, 8, axis=0), truth=wide) == 1
  assert mask_scores.boundary_f(np.roll(wide, 9, axis=0), truth=wide) < 0.7


def test_void_pixels_are_in_neither_boundary():
  mask = blob()
  void = np.zeros(mask.shape, bool)
  void[:, 30:] = True
  other = mask | void
  assert mask_scores.boundary_f(other, truth=mask, void=void) == 1 > mask_scores.boundary_f(other, truth=mask)


def test_the_border_of_the_picture_is_no_edge():
  assert not mask_scores.boundary(np.ones((4, 5), bool)).any()
  mask = np.zeros((4, 5), bool)
  mask[2:, 3:] = True
  np.testing.assert_array_equal(mask_scores.boundary(mask), boundary_by_definition(mask))
  for seed in range(3):
    np.testing.assert_array_equal(mask_scores.boundary(blob(seed)), boundary_by_definition(blob(seed)))


def test_attention_masks_and_their_jaccard_match_the_reference(golden):
  g = golden("segmentation_eval_attention_mass")
  masks = mask_scores.mass_masks(g["cls_attention"])
  np.testing.assert_array_equal(masks, g["mask"])
  patch = len(g["object_labels"]) // masks.shape[1]
  scores = mask_scores.jaccard(masks.repeat(patch, 1).repeat(patch, 2), labels=g["object_labels"])
  np.testing.assert_allclose(scores, g["jaccard_object_by_head"], atol=1e-4)
  assert scores.max(axis=1).mean() == pytest.approx(float(g["image_jaccard"]), abs=1e-4)


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.6, 0.99])
def test_the_fewest_patches_that_hold_the_share_are_kept(keep):
  attention = np.random.default_rng(0).uniform(size=(3, 5, 4)) ** 4
  for kept, a in zip(mask_scores.mass_masks(attention, keep=keep), attention / attention.sum((1, 2), keepdims=True), strict=True):
    assert kept.any() and a[kept].min() > (a[~kept].max() if not kept.all() else 0)
    assert a[kept].sum() >= keep > a[kept].sum() - a[kept].min()


def test_the_object_itself_has_jaccard_one_and_a_covered_void_counts_against_a_mask():
  labels = np.zeros((6, 6), int)
  labels[1:3, 1:3], labels[4:, 4:], labels[3, 1:3] = 7, 2, 255
  np.testing.assert_array_equal(mask_scores.object_labels(labels), [2, 7])
  masks = np.stack([labels == 7, labels == 2, (labels == 7) | (labels == 255)])
  np.testing.assert_allclose(mask_scores.jaccard(masks, labels=labels), [[0, 1, 0], [1, 0, 4 / 6]])
