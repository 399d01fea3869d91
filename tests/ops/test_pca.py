"""PCA whitening: reference numbers, chunks, directions without variance."""

import numpy as np
import pytest

from big_ssl.ops import pca


def test_features_are_preprocessed_as_in_the_reference(golden):
  z = golden("deepcluster_preprocess")
  x = z["features"]
  fitted = pca.fit_whitening(x, dim=16, chunk=50)
  np.testing.assert_allclose(fitted.mean, z["mean"], atol=1e-6)
  np.testing.assert_allclose(fitted.eigenvalues * len(x), z["eigenvalues"], rtol=1e-4)
  out = pca.whiten(x, whitening=fitted, chunk=50)
  np.testing.assert_allclose(np.abs(out), np.abs(z["preprocessed"]), atol=1e-3)
  np.testing.assert_allclose(out @ out.T, z["gram"], atol=1e-3)


def test_the_eigenvalue_floor_of_deeper_cluster(golden):
  z = golden("deepercluster_pca")
  fitted = pca.fit_whitening(z["features"], dim=20, floor=1e-5)
  np.testing.assert_allclose(fitted.eigenvalues, z["eigenvalues"], rtol=1e-4, atol=1e-6)
  out = pca.whiten(z["features"], whitening=fitted)
  np.testing.assert_allclose(out @ out.T, z["gram"], atol=1e-3)


def test_whitened_features_have_unit_covariance_whatever_their_offset_and_scale():
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(2000, 12)) * np.geomspace(1e-2, 10, 12) + 100).astype(np.float32)
  out = pca.whiten(x, whitening=pca.fit_whitening(x, dim=12, chunk=300), normalize=False)
  np.testing.assert_allclose(np.cov(out.T, bias=True), np.eye(12), atol=5e-3)
  np.testing.assert_allclose(out.mean(0), 0, atol=5e-3)


def test_chunks_and_the_order_of_the_rows_change_only_rounding():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 10)).astype(np.float32)
  order = rng.permutation(300)
  whole = pca.whiten(x, whitening=pca.fit_whitening(x, dim=6))
  other = pca.whiten(x[order], whitening=pca.fit_whitening(x[order], dim=6, chunk=7), chunk=7)
  np.testing.assert_allclose(other, whole[order], atol=1e-4)


def test_directions_without_variance_and_constant_features_stay_finite():
  rng = np.random.default_rng(0)
  x = np.repeat(rng.normal(size=(50, 4)), 3, axis=1).astype(np.float32)  # rank 4 of 12
  out = pca.whiten(x, whitening=pca.fit_whitening(x, dim=12), normalize=False)
  assert np.isfinite(out).all() and not np.any(out[:, 4:])
  constant = np.full((50, 12), 3.7, np.float32)
  assert not np.any(pca.whiten(constant, whitening=pca.fit_whitening(constant, dim=5)))


@pytest.mark.parametrize("rows,dim", [(50, 13), (8, 8), (50, 0)])
def test_more_dimensions_than_features_or_rows_minus_one_are_an_error(rows, dim):
  with pytest.raises(
    ValueError, match=f"PCA: {dim} dimensions of 12 features in {rows} rows; at most {min(12, rows - 1)}"
  ):
    pca.fit_whitening(np.random.default_rng(0).normal(size=(rows, 12)), dim=dim)
