"""Pooled maps that linear probes read: each layer brought below 10,000 numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from big_ssl.core.types import Array

# (kernel = stride, padding) of the five maps of AlexNet: 9600, 9216, 9600, 9600, 9216 numbers at 224 px. DeepCluster
# (arXiv 1807.05520, public code) averages, SeLa (arXiv 1911.05371, public code) takes the maximum.
ALEXNET_POOLS = ((6, 3), (4, 0), (3, 1), (3, 1), (2, 0))
# Of the thirteen maps of VGG-16 (DeeperCluster, arXiv 1905.01278, public code; averages).
VGG_POOLS = ((18, 0),) * 2 + ((14, 0),) * 2 + ((9, 0),) * 3 + ((6, 0),) * 3 + ((3, 0),) * 3


def probe_features(
  stages: Sequence[Array], *, pools: Sequence[tuple[int, int]], kind: Literal["average", "max"]
) -> dict[str, Array]:
  """{"conv1": [N, C * h * w], ...} float32 of the maps [N, H, W, C]; padded zeros count in an average, as in torch.

  A map smaller than the kernel becomes one number per channel.
  """
  out = {}
  for i, (x, (kernel, padding)) in enumerate(zip(stages, pools, strict=True), 1):
    window = tuple(min(kernel, side + 2 * padding) for side in x.shape[1:3])
    pool = nn.avg_pool if kind == "average" else nn.max_pool
    x = pool(x.astype(jnp.float32), window, (kernel, kernel), ((padding, padding),) * 2)
    out[f"conv{i}"] = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
  return out
