"""AlexNet with batch normalization, as DeepCluster (arXiv 1807.05520) and SeLa (arXiv 1911.05371) train it."""

from __future__ import annotations

import functools
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.models.layers import Backbone, BatchNorm, check_last_map
from big_ssl.models.sobel import Sobel

WIDTHS = {"big": (96, 256, 384, 384, 256), "small": (64, 192, 384, 256, 256)}
FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # N(0, sqrt(2 / (k k out)))


class AlexNet(Backbone):
  """Five convolutions, each with bias, BN and ReLU, and two fully connected layers; no LRN, no groups.

  Dropout comes before both fully connected layers, in training and where there is a key for it: a teacher that runs
  without one has none. Features are flattened in the order C, H, W, as in the public checkpoints.

  Attributes:
    variant: "big", DeepCluster's and SeLa's widths, or "small", SeLa's.
    widths: of the five convolutions, instead of the variant's.
    fc: width of fc6 and fc7.
    stem: "imagenet", 11x11 stride 4 and a pool; "cifar", 3x3 stride 1 and no first pool (own choice, for 32 px).
    sobel: reads gradients of gray instead of color.
    dropout: rate.
    image_size: of the inputs, height and width: fc6 has a row for every place of the last map, 6x6 at 224.
    channels: of the images.
    dtype: compute dtype.
  """

  variant: Literal["big", "small"] = "big"
  widths: tuple[int, ...] = ()
  fc: int = 4096
  stem: Literal["imagenet", "cifar"] = "imagenet"
  sobel: bool = False
  dropout: float = 0.5
  image_size: int = 224
  channels: int = 3
  dtype: Literal["float32", "bfloat16"] = "float32"

  @nn.compact
  def __call__(self, images: Array, *, train: bool) -> dict[str, Array]:
    """images: [N, H, W, C].

    Returns:
      "pooled": fc7 BEFORE its ReLU, what DeepCluster and SeLa cluster, [N, fc] float32.
      "relu": fc7 after it, what their classifiers read.
      "stages": the five maps after ReLU, before pooling, what linear probes read.

    Raises:
      UserError: images of other channels, or whose last map is not the one that fc6 was made for.
    """
    if images.shape[-1] != self.channels:
      raise UserError(f"config.model.channels={self.channels}: the images have {images.shape[-1]} channels.")
    widths, cifar = self.widths or WIDTHS[self.variant], self.stem == "cifar"
    if len(widths) != 5:
      raise UserError(f"config.model.widths={widths}: expected the five widths of the convolutions.")
    check_last_map(self, images)
    x = Sobel(name="sobel")(images) if self.sobel else images
    kernels = ((3, 1, 1) if cifar else (11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # size, stride, padding
    stages = []
    for i, (width, (size, stride, padding)) in enumerate(zip(widths, kernels, strict=True), 1):
      conv = functools.partial(nn.Conv, kernel_init=FAN_OUT, dtype=self.dtype, name=f"conv{i}")
      x = conv(width, (size, size), strides=(stride, stride), padding=padding)(x)
      x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{i}")(x, train=train))
      stages.append(x)
      if i in ((2, 5) if cifar else (1, 2, 5)):
        x = nn.max_pool(x, (3, 3), (2, 2))
    x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    dense = functools.partial(nn.Dense, self.fc, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype)
    drop = nn.Dropout(self.dropout, deterministic=not (train and self.has_rng("dropout")))
    x = nn.relu(dense(name="fc6")(drop(x)))
    x = dense(name="fc7")(drop(x)).astype(jnp.float32)
    return {"pooled": x, "relu": nn.relu(x), "stages": tuple(stages)}

  def map_size(self, side: int) -> int:
    """Side of the last map for images of `side` pixels; not positive where they are too small."""
    if self.stem == "imagenet":
      side = _pooled((side + 4 - 11) // 4 + 1)
    return _pooled(_pooled(side))


def _pooled(side: int) -> int:
  return (side - 3) // 2 + 1 if side > 0 else 0
