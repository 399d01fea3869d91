"""Surface normals: the recorded figures, and float32 inputs whose cosine passes 1."""

import numpy as np
import pytest

from big_ssl.ops import surface_normals


def test_decoding_labels_angles_and_scores_match_the_reference(golden):
  z = golden("ssl_benchmark_normals")
  normals = surface_normals.decode(z["probs"].transpose(0, 2, 3, 1), codebook=z["codebook"])
  np.testing.assert_allclose(normals, z["normals"], atol=1e-6)
  labels = surface_normals.encode(z["gt_normals"], codebook=z["codebook"])
  np.testing.assert_array_equal(labels[0], z["gt_labels_image0"])
  angles = surface_normals.angles(normals, truth=z["gt_normals"], valid=z["valid_mask"])
  np.testing.assert_allclose(angles, z["angles_valid"], atol=1e-4)
  found = surface_normals.scores(angles)
  for name in ("mean", "median", "rmse"):
    assert getattr(found, name) == pytest.approx(float(z[name]), abs=1e-4), name
  np.testing.assert_allclose(found.within, z["within"], atol=1e-4)


def test_equal_normals_have_no_angle_although_their_product_rounds_above_one():
  x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  found = surface_normals.angles(x, truth=x, valid=np.ones(500, bool))
  assert np.all(found < 1e-5)
  opposite = surface_normals.angles(x, truth=-x, valid=np.ones(500, bool))
  np.testing.assert_allclose(opposite, 180, atol=1e-5)


@pytest.mark.parametrize("degrees", [np.zeros(0), np.array([1.0, np.nan])])
def test_no_angle_and_no_number_are_refused(degrees):
  with pytest.raises(ValueError, match="not a number"):
    surface_normals.scores(degrees)
