"""Pooled maps that linear probes read: each layer brought below 10,000 numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array

# (kernel = stride, padding) of the five maps of AlexNet: 9600, 9216, 9600, 9600, 9216 numbers at 224 px. DeepCluster
# (arXiv 1807.05520, public code) averages, SeLa (arXiv 1911.05371, public code) takes the maximum.
ALEXNET_POOLS = ((6, 3), (4, 0), (3, 1), (3, 1), (2, 0))
# Of the thirteen maps of VGG-16 (DeeperCluster, arXiv 1905.01278, public code; averages).
VGG_POOLS = ((18, 0),) * 2 + ((14, 0),) * 2 + ((9, 0),) * 3 + ((6, 0),) * 3 + ((3, 0),) * 3
# Of the stem and the four stages of ResNet-50 (arXiv 1905.01235, public code; averages): 12, 6, 4, 3 and 2 a side.
RESNET_POOLS, RESNET_STRIDES = ((10, 4), (16, 0), (13, 0), (8, 0), (6, 0)), (10, 8, 5, 3, 1)


def probe_features(
  stages: Sequence[Array],
  *,
  pools: Sequence[tuple[int, int]],
  kind: Literal["average", "max"],
  strides: Sequence[int] | None = None,
  count_padding: bool = True,
) -> dict[str, Array]:
  """{"conv1": [N, C * h * w], ...} float32 of the maps [N, H, W, C]; channels come first in the flat vector.

  A map smaller than the kernel becomes one number per channel.

  Args:
    stages: maps.
    pools: (kernel, padding) of each.
    kind: of the pooling.
    strides: of each; the kernels where None.
    count_padding: padded zeros count in an average, as in torch; False divides by the real pixels, as in Caffe2.
  """
  return {
    f"conv{i}": pool_map(
      x, kernel=kernel, stride=stride, padding=padding, kind=kind, count_padding=count_padding
    ).reshape(len(x), -1)
    for i, (x, (kernel, padding), stride) in enumerate(
      zip(stages, pools, strides or [kernel for kernel, _ in pools], strict=True), 1
    )
  }


def pool_map(
  x: Array,
  *,
  kernel: int,
  stride: int,
  padding: int,
  kind: Literal["average", "max"] = "average",
  count_padding: bool = True,
) -> Array:
  """[N, C, h * w] float32 of a map [N, H, W, C]; see `probe_features`."""
  window = tuple(min(kernel, side + 2 * padding) for side in x.shape[1:3])
  where = {"strides": (stride, stride), "padding": ((padding, padding),) * 2}
  x = x.astype(jnp.float32)
  if kind == "max":
    x = nn.max_pool(x, window, **where)
  else:
    x = nn.avg_pool(x, window, **where, count_include_pad=count_padding)
  return x.transpose(0, 3, 1, 2).reshape(x.shape[0], x.shape[3], -1)


def pool_to_grid(x: Array, *, grid: tuple[int, int]) -> Array:
  """[N, C, h * w] float32: means of a map [N, H, W, C] over h x w cells that cover it.

  Cell i of n reaches from floor(i H / n) to ceil((i + 1) H / n), as in torch's adaptive pooling; cells may overlap.
  """
  x = x.astype(jnp.float32)
  for axis, cells in zip((1, 2), grid, strict=True):
    side = x.shape[axis]
    spans = [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
    parts = [jax.lax.slice_in_dim(x, a, b, axis=axis).mean(axis=axis, keepdims=True) for a, b in spans]
    x = jnp.concatenate(parts, axis=axis)
  return x.transpose(0, 3, 1, 2).reshape(x.shape[0], x.shape[3], -1)
