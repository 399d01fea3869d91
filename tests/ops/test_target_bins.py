"""Classes of structured tasks against recorded ones, and at the edges of their bins."""

import numpy as np
import pytest

from big_ssl.ops import target_bins


@pytest.mark.parametrize(
  "function,values,classes",
  [
    (target_bins.dsprites_location, "dsprites_x", "dsprites_x_bin"),
    (target_bins.dsprites_orientation, "dsprites_orientation", "dsprites_orientation_bin"),
    (target_bins.clevr_distance, "clevr_dist", "clevr_dist_class"),
    (target_bins.kitti_distance, "kitti_dist", "kitti_class"),
  ],
)
def test_classes_are_the_recorded_ones(golden, function, values, classes):
  z = golden("seer10b_eval_metrics")
  np.testing.assert_array_equal(function(z[values]), z[classes])


def test_edges_belong_to_the_lower_class_and_none_is_its_own():
  np.testing.assert_array_equal(target_bins.kitti_distance([np.nan, -1, 0, 1e-9, 8, 8.001, 20, 99]), [0, 0, 0, 1, 1, 2, 2, 3])
  np.testing.assert_array_equal(target_bins.clevr_distance([1, 8, 8.25, 8.5, 10, 50]), [0, 0, 1, 1, 4, 5])
  np.testing.assert_array_equal(target_bins.clevr_count([3, 10]), [0, 7])
  np.testing.assert_array_equal(target_bins.dsprites_location([0, 2 / 31, 1]), [0, 1, 15])
  np.testing.assert_array_equal(target_bins.dsprites_orientation([0, np.pi, 2 * np.pi]), [0, 8, 15])
