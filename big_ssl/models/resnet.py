"""ResNet (arXiv 1512.03385) as in torchvision: v1.5 (stride in the 3x3 convolution), symmetric padding, no bias."""

from __future__ import annotations

import functools
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.models.layers import Backbone, BatchNorm
from big_ssl.models.sobel import Sobel

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ResNetBlock(nn.Module):
  """A basic (two 3x3) or bottleneck (1x1, 3x3, 1x1 to four times the width) residual block.

  Attributes:
    width: of the 3x3 convolution, a quarter of the output of a bottleneck.
    stride: of the 3x3 convolution (the first one of a basic block).
    bottleneck: which of the two.
    zero_init_gamma: the last BN starts at 0, the block as the identity (SimCLR: yes; SwAV, PAWS, DINO: no).
    width_per_group: /64 is a factor on the inner width of a bottleneck alone.
  """

  width: int
  stride: int
  bottleneck: bool
  zero_init_gamma: bool
  groups: int
  dtype: str
  width_per_group: int = 64

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    conv = functools.partial(nn.Conv, use_bias=False, kernel_init=init, dtype=self.dtype)
    norm = functools.partial(BatchNorm, groups=self.groups, dtype=self.dtype)
    out = self.width * (4 if self.bottleneck else 1)
    if self.bottleneck:
      inner = self.width * self.width_per_group // 64
      kernels = [(inner, 1, 1), (inner, 3, self.stride), (out, 1, 1)]
    else:
      kernels = [(self.width, 3, self.stride), (out, 3, 1)]
    y = x
    for i, (features, kernel, stride) in enumerate(kernels, 1):
      last = i == len(kernels)
      y = conv(features, (kernel, kernel), strides=(stride, stride), padding=kernel // 2, name=f"conv{i}")(y)
      gamma = nn.initializers.zeros if last and self.zero_init_gamma else nn.initializers.ones
      y = norm(scale_init=gamma, name=f"bn{i}")(y, train=train)
      y = y if last else nn.relu(y)
    if x.shape[-1] != out or self.stride != 1:
      x = conv(out, (1, 1), strides=(self.stride, self.stride), padding=0, name="downsample_conv")(x)
      x = norm(name="downsample_bn")(x, train=train)
    return nn.relu(x + y)


class ResNet(Backbone):
  """A residual network; parameters are named as in torchvision, layer1_0/conv1/kernel for layer1.0.conv1.weight.

  Attributes:
    depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
    width: multiplies all widths (SwAV's w2, w4, w5), not torchvision's inner ones only.
    stem: "imagenet", 7x7 stride 2 and a 3x3 stride-2 max pool; "cifar", 3x3 stride 1 and no pool.
    zero_init_gamma: the last BN of each block starts at 0.
    bn_groups: groups with own BN statistics; 1 is the global batch.
    blocks, stem_width: override the depth's blocks per stage and the 64 of the stem, for small networks.
    width_per_group: torchvision's factor on the inner width of bottlenecks, over 64: 128 is wide_resnet50_2.
    sobel: reads gradients of gray instead of color (DeepCluster).
    dtype: compute dtype.
  """

  depth: int = 50
  width: int = 1
  stem: Literal["imagenet", "cifar"] = "imagenet"
  zero_init_gamma: bool = False
  bn_groups: int = 1
  blocks: tuple[int, ...] = ()
  stem_width: int = 64
  width_per_group: int = 64
  sobel: bool = False
  channels: int = 3
  dtype: Literal["float32", "bfloat16"] = "float32"

  @nn.compact
  def __call__(self, images: Array, *, train: bool) -> dict[str, Array]:
    """images: [N, H, W, C] -> "pooled" [N, D], "tokens" [N, h*w, D], "stages": the stem's and the four stages' maps."""
    if self.depth not in BLOCKS:
      raise UserError(f"config.model.depth={self.depth}: expected one of {', '.join(map(str, BLOCKS))}.")
    if images.shape[-1] != self.channels:
      raise UserError(f"config.model.channels={self.channels}: the images have {images.shape[-1]} channels.")
    x = Sobel(name="sobel")(images) if self.sobel else images
    base, cifar = self.stem_width * self.width, self.stem == "cifar"
    kernel, stride = (3, 1) if cifar else (7, 2)
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    conv = nn.Conv(
      base,
      (kernel, kernel),
      strides=(stride, stride),
      padding=kernel // 2,
      use_bias=False,
      kernel_init=init,
      dtype=self.dtype,
      name="conv1",
    )
    x = nn.relu(BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="bn1")(conv(x), train=train))
    stages = [x]
    if not cifar:
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, count in enumerate(self.blocks or BLOCKS[self.depth]):
      for i in range(count):
        stride = 2 if stage > 0 and i == 0 else 1
        block = ResNetBlock(
          base * 2**stage,
          stride,
          self.depth >= 50,
          self.zero_init_gamma,
          self.bn_groups,
          self.dtype,
          self.width_per_group,
          name=f"layer{stage + 1}_{i}",
        )
        x = block(x, train=train)
      stages.append(x)
    features = x.astype(jnp.float32)
    return {
      "pooled": jnp.mean(features, axis=(1, 2)),
      "tokens": features.reshape(x.shape[0], -1, x.shape[-1]),
      "stages": tuple(stages),
    }
