"""The fixed Sobel front end of the clustering papers: color is a shortcut for clustering, gradients of gray are not."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array

HORIZONTAL = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], np.float32)
VERTICAL = np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]], np.float32)


class Sobel(nn.Module):
  """Mean of the (normalized) channels, then two 3x3 cross-correlations: [N, H, W, C] -> [N, h, w, 2] float32.

  The filters are constants, not parameters: no optimizer, decay or average sees them. DeepCluster (arXiv 1807.05520,
  public code) pads the gray image by one zero, h = H. DeeperCluster (arXiv 1905.01278, public code) pads the color
  image by two, h = H + 2.

  Attributes:
    padding: zeros on each side: 1 or 2.
  """

  padding: int = 1

  def __call__(self, images: Array) -> Array:
    gray = jnp.mean(images.astype(jnp.float32), axis=-1, keepdims=True)
    kernel = jnp.asarray(np.stack([HORIZONTAL, VERTICAL], axis=-1)[:, :, None])  # [3, 3, 1, 2]
    pad = ((self.padding,) * 2,) * 2
    layout = ("NHWC", "HWIO", "NHWC")
    precision = jax.lax.Precision.HIGHEST
    return jax.lax.conv_general_dilated(gray, kernel, (1, 1), pad, dimension_numbers=layout, precision=precision)
