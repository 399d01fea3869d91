"""PCA and whitening of feature matrices that fit into host memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array
from big_ssl.ops.whitening import Whitening

# Below this share of the largest eigenvalue a direction is the rounding of float32 features, not data.
ROUNDING = 1e-12


def fit_whitening(x: np.ndarray, *, dim: int, floor: float = 0.0, chunk: int = 8192) -> Whitening:
  """The top `dim` principal axes of the rows of x [N, D], scaled to unit variance (arXiv 1807.05520, public code).

  Products of a chunk are float32 of full precision on the device, their sum is float64 on the host. Directions without
  variance, below 1e-12 of the largest, give 0 instead of amplified rounding (own choice).

  Args:
    x: [N, D].
    dim: d, at most D and at most N - 1.
    floor: smaller eigenvalues are raised to this share of the largest; 0 in DeepCluster, 1e-5 in DeeperCluster
      (arXiv 1905.01278, public code).
    chunk: rows at a time.

  Raises:
    ValueError: `dim` is out of range.
  """
  count, width = x.shape
  if not 1 <= dim <= min(width, count - 1):
    raise ValueError(
      f"PCA: {dim} dimensions of {width} features in {count} rows; at most {min(width, count - 1)} are possible"
    )
  mean = np.zeros(width)
  for start in range(0, count, chunk):
    mean += x[start : start + chunk].sum(axis=0, dtype=np.float64)
  mean = (mean / count).astype(np.float32)
  scatter = np.zeros((width, width))
  for start in range(0, count, chunk):
    scatter += np.asarray(_second_moment(x[start : start + chunk], mean))
  values, vectors = np.linalg.eigh(scatter / count)
  values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
  raised = np.maximum(values, floor * values[0])[:dim]
  present = raised > ROUNDING * values[0]
  scale = np.where(present, 1 / np.sqrt(np.where(present, raised, 1.0)), 0.0)
  axes = vectors[:, :dim]
  sign = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(dim)])
  return Whitening(mean, (axes * sign * scale).astype(np.float32), values)


def whiten(x: np.ndarray, *, whitening: Whitening, normalize: bool = True, chunk: int = 8192) -> np.ndarray:
  """Rows of x [N, D] on the whitened axes, [N, d] float32, each divided by its norm if `normalize`; a zero row stays zero."""
  out = np.empty((len(x), whitening.axes.shape[1]), np.float32)
  for start in range(0, len(x), chunk):
    out[start : start + chunk] = _project(x[start : start + chunk], whitening.mean, whitening.axes, normalize=normalize)
  return out


def memory(*, rows: int, width: int, dim: int, chunk: int = 8192) -> int:
  """Bytes besides x: the result, the float64 moments with their eigenvectors, and a chunk."""
  return 4 * rows * dim + 3 * 8 * width * width + 8 * min(chunk, rows) * width


def _second_moment(x: np.ndarray, mean: np.ndarray) -> Array:
  return _moment(np.asarray(x, np.float32), mean)


@jax.jit
def _moment(x: Array, mean: Array) -> Array:
  centered = x - mean
  return jnp.matmul(centered.T, centered, precision=jax.lax.Precision.HIGHEST)


def _project(x: np.ndarray, mean: np.ndarray, axes: np.ndarray, *, normalize: bool) -> np.ndarray:
  y = np.asarray(_rotate(np.asarray(x, np.float32), mean, axes))
  if not normalize:
    return y
  return y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), np.finfo(np.float32).tiny)


@jax.jit
def _rotate(x: Array, mean: Array, axes: Array) -> Array:
  return jnp.matmul(x - mean, axes, precision=jax.lax.Precision.HIGHEST)
