"""Heads that turn a map of patch features into a map of class logits, and a network with such a head."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.models.attention import MultiHeadAttention
from big_ssl.models.dense import pad_to_stride, patch_map
from big_ssl.models.layers import BatchNorm, LayerNorm
from big_ssl.ops.normalize import l2_normalize
from big_ssl.ops.segmentation import bilinear

_TRUNCATED = nn.initializers.truncated_normal(0.02)


class ProbeHead(nn.Module):
  """Dropout of channels, BN, 1x1 convolution: the linear probe on frozen features (dinov3, public code).

  Attributes:
    classes: number of classes.
    dropout: rate; a channel is dropped for the whole image.
  """

  classes: int
  dropout: float = 0.1

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, h, w, D] -> [N, h, w, classes] float32."""
    x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x.astype(jnp.float32))
    x = BatchNorm(name="bn")(x, train=train)
    return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="fc")(x)


class LinearDecoder(nn.Module):
  """One linear layer per patch: Segmenter's linear decoder (arXiv 2105.05633, section 3.2)."""

  classes: int

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, h, w, D] -> [N, h, w, classes] float32."""
    del train
    return nn.Dense(self.classes, kernel_init=_TRUNCATED, name="fc")(x.astype(jnp.float32))


class MaskDecoder(nn.Module):
  """Segmenter's mask transformer (arXiv 2105.05633, section 3.2; public code).

  Patches and one learned token per class pass through blocks together; the logits are cosines of the two, each projected
  once more, under a LayerNorm over the classes:

    logits = LN(unit(patches P) unit(classes Q)^T)

  Attributes:
    classes: number of classes.
    layers: blocks.
    heads: of the attention; 0 is one per 64 channels, at least 1.
    dropout: rate in the blocks, on what attention gives and on both layers of the MLP (not on the attention itself, as in
      the public code: attention stays one fused call).
  """

  classes: int
  layers: int = 2
  heads: int = 0
  dropout: float = 0.1

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, h, w, D] -> [N, h, w, classes] float32."""
    images, height, across, width = x.shape
    heads = self.heads or max(width // 64, 1)
    if width % heads:
      raise UserError(f"config.method.decoder='mask': {heads} heads do not divide the {width} channels.")
    x = nn.Dense(width, kernel_init=_TRUNCATED, name="proj_dec")(x.astype(jnp.float32).reshape(images, -1, width))
    tokens = self.param("cls_emb", _TRUNCATED, (1, self.classes, width), jnp.float32)
    x = jnp.concatenate([x, jnp.broadcast_to(tokens, (images, *tokens.shape[1:]))], axis=1)
    for i in range(self.layers):
      x = _DecoderBlock(heads, self.dropout, name=f"block_{i}")(x, train=train)
    x = LayerNorm(1e-5, name="decoder_norm")(x)
    project = lambda name: self.param(name, nn.initializers.normal(width**-0.5), (width, width), jnp.float32)
    patches, classes = (
      x[:, : height * across] @ project("proj_patch"),
      x[:, height * across :] @ project("proj_classes"),
    )
    logits = l2_normalize(patches) @ l2_normalize(classes).swapaxes(1, 2)  # [N, h * w, classes]
    return LayerNorm(1e-5, name="mask_norm")(logits).reshape(images, height, across, self.classes)


class _DecoderBlock(nn.Module):
  """A pre-LN transformer block with dropout, MLP 4 times as wide."""

  heads: int
  dropout: float

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    width = x.shape[-1]
    drop = lambda y: nn.Dropout(self.dropout, deterministic=not train)(y)
    attended, _ = MultiHeadAttention(self.heads, kernel_init=_TRUNCATED, name="attention")(
      LayerNorm(1e-5, name="norm1")(x)
    )
    x = x + drop(attended)
    hidden = nn.Dense(4 * width, kernel_init=_TRUNCATED, name="fc1")(LayerNorm(1e-5, name="norm2")(x))
    hidden = drop(nn.gelu(hidden, approximate=False))
    return x + drop(nn.Dense(width, kernel_init=_TRUNCATED, name="fc2")(hidden))


@dataclasses.dataclass(frozen=True)
class _Inside:
  """A backbone inside of another module, as `patch_map` calls it."""

  module: nn.Module
  train: bool

  def __call__(self, images: Array, **kwargs: Any) -> dict[str, Any]:
    return self.module(images, train=self.train, **kwargs)


class SegmentationNetwork(nn.Module):
  """Backbone and decoder; parameters {"backbone": ..., "head": ...}, as `models.encoder.Encoder`.

  Attributes:
    backbone: a `Backbone`.
    head: one of the modules above.
    layers: of `models.dense.patch_map`.
    frozen: the backbone runs as in evaluation, in training too.
  """

  backbone: nn.Module
  head: nn.Module
  layers: int = 1
  frozen: bool = False

  def __call__(self, images: Array, *, train: bool) -> dict[str, Array]:
    """images: [N, H, W, C] -> "logits" [N, H, W, classes] float32, "logit_map" [N, h, w, classes], "map" [N, h, w, D].

    Images are padded to whole patches, and the logits cut back (Segmenter, public code).
    """
    features = patch_map(_Inside(self.backbone, train and not self.frozen), images, layers=self.layers)
    padded = pad_to_stride(images, module=self.backbone).shape[1:3]
    logits = self.head(features, train=train)
    full = bilinear(logits, shape=padded)[:, : images.shape[1], : images.shape[2]]
    return {"logits": full, "logit_map": logits, "map": features}
