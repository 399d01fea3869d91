"""VGG-16 with batch normalization, as DeepCluster (arXiv 1807.05520) and DeeperCluster (arXiv 1905.01278) train it."""

from __future__ import annotations

import functools
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.models.alexnet import FAN_OUT
from big_ssl.models.layers import Backbone, BatchNorm, check_last_map, torch_uniform
from big_ssl.models.sobel import Sobel

DEPTHS = (2, 2, 3, 3, 3)  # convolutions before each pool


class VGG(Backbone):
  """Thirteen 3x3 convolutions, each with bias, BN and ReLU, five 2x2 pools, and fc6 and fc7 with dropout between them.

  Dropout is active in training and where there is a key for it. Features are flattened in the order C, H, W.

  Attributes:
    variant: "deepercluster" differs from "deepcluster" in two things: the input grows by one zero on each side, with
      Sobel (which then reads two zeros and shrinks by one) and without; and the linear layers start as torch's default
      instead of N(0, 0.01).
    widths: of the five groups of convolutions.
    fc: width of fc6 and fc7.
    sobel: reads gradients of gray instead of color.
    dropout: rate.
    image_size: of the inputs, height and width: fc6 has a row for every place of the last map, 7x7 at 224.
    channels: of the images.
    dtype: compute dtype.
  """

  variant: Literal["deepcluster", "deepercluster"] = "deepcluster"
  widths: tuple[int, ...] = (64, 128, 256, 512, 512)
  fc: int = 4096
  sobel: bool = False
  dropout: float = 0.5
  image_size: int = 224
  channels: int = 3
  dtype: Literal["float32", "bfloat16"] = "float32"

  @nn.compact
  def __call__(self, images: Array, *, train: bool) -> dict[str, Array]:
    """images: [N, H, W, C].

    Returns:
      "pooled": fc7 BEFORE its ReLU, what is clustered, [N, fc] float32.
      "relu": fc7 after it, what the classifiers read.
      "stages": the thirteen maps after ReLU.

    Raises:
      UserError: images of other channels, or whose last map is not the one that fc6 was made for.
    """
    if images.shape[-1] != self.channels:
      raise UserError(f"config.model.channels={self.channels}: the images have {images.shape[-1]} channels.")
    if len(self.widths) != len(DEPTHS):
      raise UserError(f"config.model.widths={self.widths}: expected the five widths of the groups of convolutions.")
    check_last_map(self, images)
    grows = self.variant == "deepercluster"
    x = images
    if self.sobel:
      x = Sobel(padding=2 if grows else 1, name="sobel")(x)
    elif grows:
      x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    stages = []
    for width, depth in zip(self.widths, DEPTHS, strict=True):
      for _ in range(depth):
        i = len(stages) + 1
        x = nn.Conv(width, (3, 3), padding=1, kernel_init=FAN_OUT, dtype=self.dtype, name=f"conv{i}")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{i}")(x, train=train))
        stages.append(x)
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    x = nn.relu(self._dense("fc6", x.shape[-1])(x))
    x = nn.Dropout(self.dropout, deterministic=not (train and self.has_rng("dropout")))(x)
    x = self._dense("fc7", self.fc)(x).astype(jnp.float32)
    return {"pooled": x, "relu": nn.relu(x), "stages": tuple(stages)}

  def _dense(self, name: str, fan_in: int) -> nn.Dense:
    dense = functools.partial(nn.Dense, self.fc, dtype=self.dtype, name=name)
    if self.variant == "deepercluster":
      return dense(kernel_init=torch_uniform(fan_in), bias_init=torch_uniform(fan_in))
    return dense(kernel_init=nn.initializers.normal(0.01))

  def map_size(self, side: int) -> int:
    """Side of the last map for images of `side` pixels."""
    return (side + (2 if self.variant == "deepercluster" else 0)) // 2 ** len(DEPTHS)
