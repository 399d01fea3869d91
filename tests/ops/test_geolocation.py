"""Distances and shares of places against recorded ones and known ones."""

import numpy as np
import pytest

from big_ssl.ops import geolocation
from big_ssl.ops.geolocation import Places


def test_distances_and_shares_are_the_recorded_ones(golden):
  z = golden("seer10b_eval_metrics")
  predicted, true = (Places(z[f"geo_{k}_lat"], z[f"geo_{k}_lon"]) for k in ("pred", "true"))
  found = geolocation.haversine_km(predicted, b=true)
  np.testing.assert_allclose(found, z["geo_dist_km"], rtol=1e-5)
  np.testing.assert_allclose(geolocation.shares_within(found), z["geo_acc_1_25_200_750_2500"], atol=1e-6)


def test_known_distances_across_the_date_line_the_poles_and_to_the_other_side():
  quarter = np.pi / 2 * geolocation.EARTH_RADIUS_KM
  a = Places(np.array([0.0, 0.0, 90.0, 0.0]), np.array([179.5, 0.0, 17.0, 10.0]))
  b = Places(np.array([0.0, 0.0, 0.0, 0.0]), np.array([-179.5, 180.0, -100.0, 10.0]))
  np.testing.assert_allclose(geolocation.haversine_km(a, b=b), [quarter / 90, 2 * quarter, quarter, 0.0], atol=1e-6)


def test_a_cell_stands_for_the_mean_place_of_its_pictures_and_an_empty_one_for_none():
  places = Places(np.array([10.0, 20.0, -5.0]), np.array([1.0, 3.0, 7.0]))
  centers = geolocation.cell_centers(places, cells=np.array([2, 2, 0]), num_cells=3)
  np.testing.assert_array_equal(centers.latitude, [-5.0, np.nan, 15.0])
  np.testing.assert_array_equal(centers.longitude, [7.0, np.nan, 2.0])
  distance = geolocation.haversine_km(centers, b=Places(np.array([-5.0, 0.0, 15.0]), np.array([7.0, 0.0, 2.0])))
  np.testing.assert_allclose(geolocation.shares_within(distance, thresholds=(1.0, 1e9)), 2 / 3)


def test_shares_of_no_picture_are_an_error():
  with pytest.raises(ValueError, match="no picture"):
    geolocation.shares_within(np.zeros(0))
