"""XCiT (arXiv 2106.09681): attention over channels instead of tokens, linear in the number of patches.

A block is cross-covariance attention, local patch interaction, MLP; two class-attention layers read the patches out.
The numerics are those of the public code, quirks included: see `ClassBlock`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array, UserError, nearest
from big_ssl.models.attention import MultiHeadAttention
from big_ssl.models.layers import (
  Backbone,
  BatchNorm,
  LayerNorm,
  LayerScale,
  Mlp,
  check_images,
  drop_path,
  torch_uniform,
)


@dataclasses.dataclass(frozen=True)
class Size:
  """width, depth, heads, whether class attention norms all tokens, initial LayerScale (section 4.1, Table 1)."""

  width: int
  depth: int
  heads: int
  tokens_norm: bool
  layer_scale: float


SIZES = {
  "nano12": Size(128, 12, 4, False, 1.0),
  "tiny12": Size(192, 12, 4, True, 1.0),
  "tiny24": Size(192, 24, 4, True, 1e-5),
  "small12": Size(384, 12, 8, True, 1.0),
  "small24": Size(384, 24, 8, True, 1e-5),
  "medium24": Size(512, 24, 8, True, 1e-5),
  "large24": Size(768, 24, 16, True, 1e-5),
}
STEMS = {16: (8, 4, 2, 1), 8: (4, 2, 1)}  # patch -> divisors of the width, one 3x3 stride-2 convolution each


def fourier_positions(grid: tuple[int, int], *, hidden: int = 32, temperature: float = 10_000.0) -> np.ndarray:
  """Sines and cosines of the patch coordinates, relative to the grid (public code; DETR's encoding).

  Rows count 1 ... h and become 2 pi y / (h + 1e-6); channel j of y is its sine (j even) or cosine (j odd) at frequency
  temperature ** (-2 floor(j / 2) / hidden), then the same of x.

  Returns:
    [h, w, 2 hidden] float32.
  """
  frequency = temperature ** (-2.0 * (np.arange(hidden) // 2) / hidden)

  def axis(count: int) -> np.ndarray:
    angle = (np.arange(1, count + 1) / (count + 1e-6) * 2 * math.pi)[:, None] * frequency
    return np.where(np.arange(hidden) % 2 == 0, np.sin(angle), np.cos(angle))

  rows, columns = axis(grid[0])[:, None], axis(grid[1])[None]
  full = (*grid, hidden)
  table = np.concatenate([np.broadcast_to(rows, full), np.broadcast_to(columns, full)], axis=-1)
  return table.astype(np.float32)


class Stem(nn.Module):
  """3x3 stride-2 convolutions with BN, GELU between; an odd side is halved upward. [N, H, W, C] -> [N, h, w, D]."""

  width: int
  divisors: tuple[int, ...]
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    for i, divisor in enumerate(self.divisors):
      x = nn.gelu(x, approximate=False) if i else x
      init = torch_uniform(9 * x.shape[-1])
      conv = nn.Conv(
        self.width // divisor,
        (3, 3),
        strides=(2, 2),
        padding=1,
        use_bias=False,
        kernel_init=init,
        dtype=self.dtype,
        name=f"conv_{i}",
      )
      x = BatchNorm(groups=self.groups, dtype=self.dtype, name=f"bn_{i}")(conv(x), train=train)
    return x


class CrossCovarianceAttention(nn.Module):
  """softmax(temperature * q^T k) over channels, q and k of unit norm over TOKENS (section 3.1, eq. 2); no 1/sqrt(d).

  Norms and softmax are float32.
  """

  heads: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = x.shape[-1]
    project = functools.partial(nn.DenseGeneral, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02))
    names = ("query", "key", "value")
    q, k, v = (project((self.heads, width // self.heads), name=name)(x) for name in names)  # [N, T, h, d]
    logits = jnp.einsum("nthd,nthe->nhde", _unit(q), _unit(k), preferred_element_type=jnp.float32)
    temperature = self.param("temperature", nn.initializers.ones, (self.heads, 1, 1), jnp.float32)
    weights = jax.nn.softmax(logits * temperature, axis=-1).astype(v.dtype)
    return project(width, axis=(-2, -1), name="out")(jnp.einsum("nhde,nthe->nthd", weights, v))


def _unit(x: Array) -> Array:
  """[N, T, h, d] over its norm along T, at least 1e-12; a channel of zeros has a finite gradient."""
  wide = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(wide), axis=1, keepdims=True)
  return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)


class LocalPatchInteraction(nn.Module):
  """Depthwise 3x3, GELU, BN, depthwise 3x3 on the grid (section 3.2). [N, h, w, D] -> the same."""

  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    width, init = x.shape[-1], torch_uniform(9)
    conv = functools.partial(
      nn.Conv,
      width,
      (3, 3),
      padding=1,
      feature_group_count=width,
      kernel_init=init,
      bias_init=init,
      dtype=self.dtype,
    )
    x = nn.gelu(conv(name="conv1")(x), approximate=False)
    x = BatchNorm(groups=self.groups, dtype=self.dtype, name="bn")(x, train=train)
    return conv(name="conv2")(x)


class Block(nn.Module):
  """Attention, local interaction, MLP, residual branches with LayerScale; norm3 and ls3 are the SECOND branch's.

  The stream is float32 under any compute dtype: with LayerScales of 1e-5 a bfloat16 sum would not move.
  """

  heads: int
  mlp_dim: int
  layer_scale: float
  drop_path: float
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """x: [N, h, w, D]."""
    keys = (None,) * 3
    if train and self.drop_path > 0 and not self.is_initializing():
      keys = jax.random.split(self.make_rng("drop_path"), 3)

    def branch(x: Array, i: int, y: Array, key: Array | None) -> Array:
      return x + drop_path(
        LayerScale(self.layer_scale, name=f"ls{i}")(y.astype(jnp.float32)), rate=self.drop_path, key=key
      )

    norm = lambda i, x: LayerNorm(dtype=self.dtype, name=f"norm{i}")(x)
    tokens = norm(1, x).reshape(x.shape[0], -1, x.shape[-1])
    mixed = CrossCovarianceAttention(self.heads, self.dtype, name="attention")(tokens)
    x = branch(x, 1, mixed.reshape(x.shape), keys[0])
    x = branch(x, 3, LocalPatchInteraction(self.groups, self.dtype, name="local")(norm(3, x), train=train), keys[1])
    return branch(x, 2, Mlp(self.mlp_dim, dtype=self.dtype, name="mlp")(norm(2, x)), keys[2])


class ClassBlock(nn.Module):
  """Class attention (arXiv 2103.17239, section 3.2) as the public code of XCiT has it; no stochastic depth.

  CLS alone attends and goes through the MLP. Three quirks change the keys of the next block: the attention branch of the
  patches is their normed selves; with `tokens_norm` the second norm replaces the stream of all tokens, without it that of
  CLS; and the patches are then added to themselves.
  """

  heads: int
  mlp_dim: int
  layer_scale: float
  tokens_norm: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Array, *, return_weights: bool = False) -> tuple[Array, Array | None]:
    """x: [N, 1 + T, D], CLS first."""
    normed = LayerNorm(dtype=self.dtype, name="norm1")(x)
    attend = MultiHeadAttention(self.heads, dtype=self.dtype, name="attention")
    cls, weights = attend(normed[:, :1], context=normed, return_weights=return_weights)
    branch = jnp.concatenate([cls, normed[:, 1:]], axis=1).astype(jnp.float32)
    x = x + LayerScale(self.layer_scale, name="ls1")(branch)
    norm = LayerNorm(name="norm2")
    x = norm(x) if self.tokens_norm else jnp.concatenate([norm(x[:, :1]), x[:, 1:]], axis=1)
    cls = Mlp(self.mlp_dim, dtype=self.dtype, name="mlp")(x[:, :1]).astype(jnp.float32)
    cls = LayerScale(self.layer_scale, name="ls2")(cls)
    return x + jnp.concatenate([cls, x[:, 1:]], axis=1), weights


class XCiT(Backbone):
  """A cross-covariance image transformer.

  Attributes:
    variant: a key of `SIZES`, such as "small12", or "custom"; width, depth, heads, tokens_norm and layer_scale override
      it where they are not 0 or None.
    patch: 16 or 8, the stride of the convolutional stem; a side it does not divide is rounded up.
    class_layers: class-attention blocks.
    mlp_ratio: width of the MLPs over that of the tokens.
    tokens_norm: whether class attention norms all tokens (all but nano).
    layer_scale: of all branches; the published ones start at 1 with 12 blocks, 1e-5 with 24.
    positions: add the learned projection of `fourier_positions` to the patches.
    drop_path: stochastic depth, the same in all blocks and none in class attention (public code).
    bn_groups: groups with own BN statistics; 1 is the global batch.
    channels: of the images.
    remat: "full" recomputes each block in the backward pass.
    dtype: compute dtype; parameters, the residual stream, norms and softmax are float32.
  """

  variant: str = "small12"
  patch: int = 16
  width: int = 0
  depth: int = 0
  heads: int = 0
  tokens_norm: bool | None = None
  layer_scale: float | None = None
  class_layers: int = 2
  mlp_ratio: float = 4.0
  positions: bool = True
  drop_path: float = 0.0
  bn_groups: int = 1
  channels: int = 3
  remat: Literal["none", "full"] = "none"
  dtype: Literal["float32", "bfloat16"] = "float32"

  def size(self) -> Size:
    """The sizes after overrides.

    Raises:
      UserError: unknown variant, "custom" without sizes, heads that do not divide the width, another patch than 8 or 16,
        a width that the stem cannot halve, or drop_path outside [0, 1).
    """
    if self.variant not in SIZES and self.variant != "custom":
      near = nearest(self.variant, SIZES)
      raise UserError(f"config.model.variant={self.variant!r}: expected custom or one of {', '.join(SIZES)}.{near}")
    base = SIZES.get(self.variant, Size(0, 0, 0, True, 1.0))
    mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(Size)}
    given = {k: v for k, v in mine.items() if v is not None and (v or k in ("tokens_norm", "layer_scale"))}
    size = dataclasses.replace(base, **given)
    if not (size.width and size.depth and size.heads):
      raise UserError(f"config.model.variant='custom': give width, depth and heads; found {size}.")
    if size.width % size.heads:
      raise UserError(f"config.model.heads={size.heads}: must divide the width {size.width}.")
    if self.patch not in STEMS:
      raise UserError(f"config.model.patch={self.patch}: XCiT's stem has a stride of 8 or 16.")
    if size.width % STEMS[self.patch][0]:
      raise UserError(
        f"config.model.width={size.width}: must be a multiple of {STEMS[self.patch][0]} for patch {self.patch}."
      )
    if not 0 <= self.drop_path < 1:
      raise UserError(f"config.model.drop_path={self.drop_path}: expected a rate in [0, 1).")
    if self.class_layers < 1:
      raise UserError(f"config.model.class_layers={self.class_layers}: at least 1 is needed.")
    return size

  @nn.compact
  def __call__(
    self,
    images: Array,
    *,
    train: bool,
    keep: Array | None = None,
    mask: Array | None = None,
    attention_layers: tuple[int, ...] = (),
  ) -> dict[str, Array]:
    """Runs the network.

    Args:
      images: [N, H, W, C].
      keep, mask: None; local patch interaction needs the whole grid.
      attention_layers: class-attention blocks whose probabilities are returned, from 0; other blocks have none of tokens.

    Returns:
      "pooled" and "cls": [N, D], CLS after the final norm; "tokens": [N, T, D], patches after it; "cls_layers":
      [N, L, D], CLS after each class-attention block, without the final norm, and "cls_layers_normed" with it; "stages": the maps
      [N, h, w, D] of the stem, with positions, and of every block; "attention": {layer: [N, heads, 1, 1 + T]}.

    Raises:
      UserError: sizes, channels or `attention_layers` that do not fit.
    """
    size = self.size()
    check_images(self, images, keep=keep, mask=mask)
    if any(not 0 <= i < self.class_layers for i in attention_layers):
      raise UserError(
        f"attention_layers={attention_layers}: the class-attention blocks are 0 to {self.class_layers - 1}."
      )
    x = Stem(size.width, STEMS[self.patch], self.bn_groups, self.dtype, name="patch_embed")(images, train=train)
    x = x.astype(jnp.float32)
    if self.positions:
      uniform, table = torch_uniform(64), jnp.asarray(fourier_positions(x.shape[1:3]))[None]
      x = x + nn.Conv(size.width, (1, 1), kernel_init=uniform, bias_init=uniform, name="pos_embed")(table)
    hidden = round(size.width * self.mlp_ratio)
    make = nn.remat(Block, static_argnums=(2,)) if self.remat == "full" else Block
    stages = [x]
    for i in range(size.depth):
      x = make(size.heads, hidden, size.layer_scale, self.drop_path, self.bn_groups, self.dtype, name=f"block_{i}")(
        x, train
      )
      stages.append(x)
    cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, size.width), jnp.float32)
    tokens = x.reshape(x.shape[0], -1, size.width)
    x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, size.width)), tokens], axis=1)
    layers, weights = [], {}
    for i in range(self.class_layers):
      block = ClassBlock(size.heads, hidden, size.layer_scale, size.tokens_norm, self.dtype, name=f"class_block_{i}")
      x, found = block(x, return_weights=i in attention_layers)
      layers.append(x[:, 0])
      weights |= {i: found} if i in attention_layers else {}
    norm = LayerNorm(dtype=self.dtype, name="norm")
    x, cls_layers = norm(x), jnp.stack(layers, axis=1)
    out = {"pooled": x[:, 0], "cls": x[:, 0], "tokens": x[:, 1:], "cls_layers": cls_layers, "stages": tuple(stages)}
    out["cls_layers_normed"] = norm(cls_layers)
    return out | ({"attention": weights} if attention_layers else {})
