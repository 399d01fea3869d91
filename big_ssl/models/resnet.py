"""ResNet (arXiv 1512.03385) as in torchvision: v1.5 (stride in the 3x3 convolution), symmetric padding, no bias.

And pre-activation (v2, 1603.05027) with the strides, widths and BN of the architecture study 1901.09005 (public code).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.models.layers import Backbone, BatchNorm, check_images
from big_ssl.models.selective_kernel import StreamMixture, pooled_shortcut
from big_ssl.models.sobel import Sobel

BLOCKS = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
  200: (3, 24, 36, 3),
}


class ResNetBlock(nn.Module):
  """A basic (two 3x3) or bottleneck (1x1, 3x3, 1x1 to four times the width) residual block.

  Attributes:
    width: of the 3x3 convolution, a quarter of the output of a bottleneck.
    stride: of the 3x3 convolution (the first one of a basic block).
    bottleneck: which of the two.
    zero_init_gamma: the last BN starts at 0, the block as the identity (SimCLR: yes; SwAV, PAWS, DINO: no).
    width_per_group: /64 is a factor on the inner width of a bottleneck alone.
    groups: of the 3x3 convolution of a bottleneck, a factor on its inner width too.
    sk_ratio: above 0, selective kernels in the place of the 3x3 convolution, and pooled shortcuts.
    preactivation: BN and ReLU before each convolution; a shortcut that is projected starts after the first of them, an
      identity at the raw input, and nothing follows the sum (1901.09005, public code).
    norm, kernel_init: BN and the initializer of the kernels.
  """

  width: int
  stride: int
  bottleneck: bool
  zero_init_gamma: bool
  norm: Callable[..., BatchNorm]
  kernel_init: nn.initializers.Initializer
  dtype: str
  width_per_group: int = 64
  preactivation: bool = False
  groups: int = 1
  sk_ratio: float = 0.0

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    conv, norm = functools.partial(nn.Conv, use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype), self.norm
    out = self.width * (4 if self.bottleneck else 1)
    if self.bottleneck:
      inner = self.width * self.width_per_group // 64 * self.groups
      kernels = [(inner, 1, 1), (inner * (2 if self.sk_ratio else 1), 3, self.stride), (out, 1, 1)]
    else:
      kernels = [(self.width, 3, self.stride), (out, 3, 1)]
    y, projected = x, x.shape[-1] != out or self.stride != 1
    for i, (features, kernel, stride) in enumerate(kernels, 1):
      last = i == len(kernels)
      gamma = nn.initializers.zeros if last and self.zero_init_gamma else nn.initializers.ones
      bn = norm(scale_init=gamma, name=f"bn{i}")
      y = nn.relu(bn(y, train=train)) if self.preactivation else y
      x = y if self.preactivation and projected and i == 1 else x
      groups = self.groups if self.bottleneck and i == 2 else 1
      strided = {"strides": (stride, stride), "padding": kernel // 2, "feature_group_count": groups}
      y = conv(features, (kernel, kernel), name=f"conv{i}", **strided)(y)
      if not self.preactivation:
        y = bn(y, train=train) if last else nn.relu(bn(y, train=train))
      if self.sk_ratio and kernel == 3:
        y = StreamMixture(self.sk_ratio, norm, self.kernel_init, self.dtype, name="mixture")(y, train=train)
    if projected:
      x, stride = (pooled_shortcut(x, stride=self.stride), 1) if self.sk_ratio else (x, self.stride)
      x = conv(out, (1, 1), strides=(stride, stride), padding=0, name="downsample_conv")(x)
      x = x if self.preactivation else norm(name="downsample_bn")(x, train=train)
    return x + y if self.preactivation else nn.relu(x + y)


class ResNet(Backbone):
  """A residual network; parameters are named as in torchvision, layer1_0/conv1/kernel for layer1.0.conv1.weight.

  Attributes:
    depth: 18, 34 (basic blocks), 50, 101, 152 or 200 (bottlenecks).
    width: multiplies all widths (SwAV's w2, w4, w5), not torchvision's inner ones only.
    stem: "imagenet", 7x7 stride 2 and a 3x3 stride-2 max pool; "no_pool", without the pool (PAWS's use_maxpool=False);
      "cifar", 3x3 stride 1 and no pool.
    zero_init_gamma: the last BN of each block starts at 0.
    bn_groups: groups with own BN statistics; 1 is the global batch.
    bn_momentum, bn_epsilon: share of the running value that stays, and what is added to the variance: 0.9 and 1e-5 in
      torch, 0.99 and 1e-3 in 1901.09005, and with it its weights.
    preactivation: v2: BN and ReLU before the convolutions, none after the stem, and once more at the end.
    last_relu: of v2; the "(-)" variants of 1901.09005 have none after the last BN.
    kernel_init: "he", normal by fan-out (torchvision), or "glorot", uniform (TensorFlow's default).
    stem_stride, strides: of the stem's convolution, 0 being the stem's own, and of stages 2, 3 and 4; 1 and (2, 2, 1)
      keep the resolution of patches of 64 pixels (1901.09005).
    blocks, stem_width: override the depth's blocks per stage and the 64 of the stem, for small networks; a
      stem_width of 16 k is the "widening factor" k of 1901.09005.
    width_per_group: torchvision's factor on the inner width of bottlenecks, over 64: 128 is wide_resnet50_2.
    groups: of the 3x3 convolutions of bottlenecks, whose inner width they multiply: 32, with a width_per_group of 4, is
      resnext50_32x4d (arXiv 1611.05431).
    sk_ratio: SimCLR v2's selective kernels in bottlenecks, 0.0625 there, and with them ResNet-D: a stem of three 3x3
      convolutions and pooled shortcuts; 0 is none.
    sobel: reads gradients of gray instead of color (DeepCluster).
    dtype: compute dtype.
  """

  depth: int = 50
  width: int = 1
  stem: Literal["imagenet", "no_pool", "cifar"] = "imagenet"
  zero_init_gamma: bool = False
  bn_groups: int = 1
  bn_momentum: float = 0.9
  bn_epsilon: float = 1e-5
  preactivation: bool = False
  last_relu: bool = True
  kernel_init: Literal["he", "glorot"] = "he"
  stem_stride: Literal[0, 1, 2] = 0
  strides: tuple[int, ...] = (2, 2, 2)
  blocks: tuple[int, ...] = ()
  stem_width: int = 64
  width_per_group: int = 64
  groups: int = 1
  sk_ratio: float = 0.0
  sobel: bool = False
  channels: int = 3
  dtype: Literal["float32", "bfloat16"] = "float32"

  def _check(self) -> tuple[int, ...]:
    """Blocks per stage, after a check of the fields that depend on each other."""
    if self.depth not in BLOCKS:
      raise UserError(f"config.model.depth={self.depth}: expected one of {', '.join(map(str, BLOCKS))}.")
    if not (self.last_relu or self.preactivation):
      raise UserError(
        "config.model.last_relu=False: every block ends with a ReLU unless config.model.preactivation=True."
      )
    if self.groups < 1 or (self.groups > 1 and self.depth < 50):
      raise UserError(f"config.model.groups={self.groups}: at least 1, and more only with bottlenecks (config.model.depth=50 or more).")
    plain = self.depth >= 50 and self.groups == 1 and not self.preactivation
    if self.sk_ratio < 0 or (self.sk_ratio and not plain):
      raise UserError(
        f"config.model.sk_ratio={self.sk_ratio}: 0, or above it with bottlenecks (config.model.depth=50 or more), groups=1 and no preactivation."
      )
    blocks = self.blocks or BLOCKS[self.depth]
    if len(self.strides) < len(blocks) - 1 or min((1, *self.strides)) < 1:
      raise UserError(f"config.model.strides={self.strides}: expected {len(blocks) - 1}, of each stage but the first.")
    return blocks

  @nn.compact
  def __call__(
    self, images: Array, *, train: bool, keep: Array | None = None, mask: Array | None = None
  ) -> dict[str, Array]:
    """images: [N, H, W, C] -> "pooled" [N, D], "tokens" [N, h*w, D], "stages": the stem's and the four stages' maps.

    `keep` and `mask` must be None. With `preactivation` the stages are the sums, before the last BN.

    Raises:
      UserError: fields or channels that do not fit.
    """
    blocks = self._check()
    check_images(self, images, keep=keep, mask=mask)
    init = nn.initializers.glorot_uniform()
    if self.kernel_init == "he":
      init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    norm = functools.partial(
      BatchNorm, momentum=self.bn_momentum, epsilon=self.bn_epsilon, groups=self.bn_groups, dtype=self.dtype
    )
    x = self._stem(Sobel(name="sobel")(images) if self.sobel else images, init=init, norm=norm, train=train)
    stages = [x]
    if self.stem == "imagenet":
      if self.preactivation:  # zeros around the map, which win over negative values: the public code of v2
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
      x = nn.max_pool(x, (3, 3), (2, 2), "VALID" if self.preactivation else ((1, 1), (1, 1)))
    for stage, count in enumerate(blocks):
      for i in range(count):
        block = ResNetBlock(
          self.stem_width * self.width * 2**stage,
          self.strides[stage - 1] if stage > 0 and i == 0 else 1,
          self.depth >= 50,
          self.zero_init_gamma,
          norm,
          init,
          self.dtype,
          self.width_per_group,
          self.preactivation,
          self.groups,
          self.sk_ratio,
          name=f"layer{stage + 1}_{i}",
        )
        x = block(x, train=train)
      stages.append(x)
    if self.preactivation:
      x = norm(name="bn1")(x, train=train)
      x = nn.relu(x) if self.last_relu else x
    features = x.astype(jnp.float32)
    return {
      "pooled": jnp.mean(features, axis=(1, 2)),
      "tokens": features.reshape(x.shape[0], -1, x.shape[-1]),
      "stages": tuple(stages),
    }

  def _stem(self, x: Array, *, init: nn.initializers.Initializer, norm: Callable[..., BatchNorm], train: bool) -> Array:
    width = self.stem_width * self.width
    kernel, stride = (3, 1) if self.stem == "cifar" else (7, 2)
    stride = self.stem_stride or stride
    conv = functools.partial(nn.Conv, use_bias=False, kernel_init=init, dtype=self.dtype)
    if self.sk_ratio and self.stem != "cifar":  # ResNet-D
      for i in range(2):
        x = conv(width // 2, (3, 3), strides=(stride, stride), padding=1, name=f"stem_conv{i + 1}")(x)
        x, kernel, stride = nn.relu(norm(name=f"stem_bn{i + 1}")(x, train=train)), 3, 1
    x = conv(width, (kernel, kernel), strides=(stride, stride), padding=kernel // 2, name="conv1")(x)
    return x if self.preactivation else nn.relu(norm(name="bn1")(x, train=train))
