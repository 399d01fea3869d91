"""Selective kernels (arXiv 1903.06586) and the ResNet-D shortcut and stem, as SimCLR v2 has them (arXiv 2006.10029, released code)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array
from big_ssl.models.layers import BatchNorm

LEAST_DIM = 32  # of the layer that weighs the streams


class StreamMixture(nn.Module):
  """Two streams of maps, mixed per image and channel by weights that are read from both.

  The streams are halves of the channels after one 3x3 convolution of twice the width, BN and ReLU: both kernels are 3x3.
  The mean over the map of their sum passes a layer of max(width * ratio, 32), BN, ReLU and another layer to two logits per
  channel, whose softmax weighs the streams.

  Attributes:
    ratio: of the hidden layer's width to the streams'.
    norm, kernel_init, dtype: as in the network.
  """

  ratio: float
  norm: Callable[..., BatchNorm]
  kernel_init: nn.initializers.Initializer
  dtype: str

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, H, W, 2 C] -> [N, H, W, C]."""
    width = x.shape[-1] // 2
    conv = functools.partial(nn.Conv, kernel_size=(1, 1), use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype)
    streams = x.reshape(*x.shape[:-1], 2, width)
    mean = jnp.mean(streams.sum(-2).astype(jnp.float32), axis=(1, 2), keepdims=True)
    hidden = conv(max(int(width * self.ratio), LEAST_DIM), name="reduce")(mean)
    hidden = nn.relu(self.norm(name="bn")(hidden, train=train))
    logits = conv(2 * width, name="expand")(hidden).reshape(-1, 1, 1, 2, width)
    return jnp.sum(streams * jax.nn.softmax(logits.astype(jnp.float32), axis=-2).astype(x.dtype), axis=-2)


def pooled_shortcut(x: Array, *, stride: int) -> Array:
  """ResNet-D: 2x2 means in place of the stride of the 1x1 convolution of a shortcut.

  Without a stride, too, as released; the last row and column are means of what is there. With one, an odd side is
  continued by zeros.
  """
  if stride == 1:
    return nn.avg_pool(x, (2, 2), (1, 1), "SAME", count_include_pad=False)
  return nn.avg_pool(x, (2, 2), (stride, stride), ((0, 1), (0, 1)))
