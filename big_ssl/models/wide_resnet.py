"""Wide ResNet (arXiv 1605.07146) as the PAWS release has it: pre-activation, biases, raw-input shortcuts."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.models.layers import Backbone, BatchNorm, torch_uniform


class WideResNetBlock(nn.Module):
  """BN, ReLU, 3x3, BN, ReLU, 3x3 with the stride; the shortcut is a 1x1 convolution of the RAW input where shapes change."""

  width: int
  stride: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    y = BatchNorm(groups=self.groups, dtype=self.dtype, name="bn1")(x, train=train)
    y = _conv(self.width, x.shape[-1], kernel=3, dtype=self.dtype, name="conv1")(nn.relu(y))
    y = BatchNorm(groups=self.groups, dtype=self.dtype, name="bn2")(y, train=train)
    y = _conv(self.width, self.width, kernel=3, stride=self.stride, dtype=self.dtype, name="conv2")(nn.relu(y))
    if x.shape[-1] != self.width or self.stride != 1:
      x = _conv(self.width, x.shape[-1], kernel=1, stride=self.stride, dtype=self.dtype, name="downsample_conv")(x)
    return x + y


class WideResNet(Backbone):
  """WRN-depth-width for small images; no dropout, parameters start as torch's layers do.

  Attributes:
    depth: 6 n + 4, n blocks in each of the three stages.
    width: multiplies the 16, 32 and 64 channels of the stages; 2 gives a feature of 128.
    bn_momentum_final: share of the running value that stays in the last BN: torch's momentum .99 is .01 here, so that
      its running statistics are nearly those of the last batch. The other layers keep .9.
    bn_groups: groups with own BN statistics; 1 is the global batch.
    dtype: compute dtype.
  """

  depth: int = 28
  width: int = 2
  bn_momentum_final: float = 0.01
  bn_groups: int = 1
  channels: int = 3
  dtype: Literal["float32", "bfloat16"] = "float32"

  @nn.compact
  def __call__(self, images: Array, *, train: bool) -> dict[str, Array]:
    """images: [N, H, W, C] -> "pooled" [N, 64 width], "tokens" [N, h*w, D], "stages": the stem's and the stages' maps."""
    blocks, rest = divmod(self.depth - 4, 6)
    if blocks < 1 or rest:
      raise UserError(f"config.model.depth={self.depth}: expected 6 n + 4, such as 10, 16, 22 or 28.")
    if images.shape[-1] != self.channels:
      raise UserError(f"config.model.channels={self.channels}: the images have {images.shape[-1]} channels.")
    x = _conv(16, self.channels, kernel=3, dtype=self.dtype, name="conv1")(images)
    stages = [x]
    for stage in range(3):
      for i in range(blocks):
        stride = 2 if stage > 0 and i == 0 else 1
        name = f"layer{stage + 1}_{i}"
        x = WideResNetBlock(16 * self.width * 2**stage, stride, self.bn_groups, self.dtype, name=name)(x, train=train)
      stages.append(x)
    final = BatchNorm(momentum=self.bn_momentum_final, groups=self.bn_groups, dtype=self.dtype, name="bn1")
    features = nn.relu(final(x, train=train)).astype(jnp.float32)
    return {
      "pooled": jnp.mean(features, axis=(1, 2)),
      "tokens": features.reshape(x.shape[0], -1, x.shape[-1]),
      "stages": tuple(stages),
    }


def _conv(width: int, inputs: int, *, kernel: int, stride: int = 1, dtype: str, name: str) -> nn.Conv:
  init = torch_uniform(inputs * kernel**2)
  strides, size = (stride, stride), (kernel, kernel)
  return nn.Conv(
    width, size, strides=strides, padding=kernel // 2, kernel_init=init, bias_init=init, dtype=dtype, name=name
  )
