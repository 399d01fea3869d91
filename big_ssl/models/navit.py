"""NaViT: a ViT on packed sequences of patches, images of any size and aspect beside each other (arXiv 2307.06304).

Attention is masked to the tokens of one image, pooling too, and the position of a token is its row and column in its own
image; so an image has the same features packed, alone in a sequence, or given as an ordinary image. The paper's block is
that of ViT-22B but sequential: queries and keys normalized, no biases in attention and norms, attention pooling. The
options also make NaFlex (arXiv 2502.14786) and the ViTs of public code that have one image per padded sequence.
"""

from __future__ import annotations

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.augment import patches as cutting
from big_ssl.augment.patches import Sequences
from big_ssl.core.types import Array, UserError, nearest
from big_ssl.models.attention import MultiHeadAttention, attention, attention_weights, segment_mask
from big_ssl.models.layers import Backbone, Mlp
from big_ssl.models.token_positions import TokenPositions
from big_ssl.models.vit_blocks import SIZES, Size, select

QK_NORMS = ("none", "layernorm", "l2")
POOLS = ("map", "mean", "max")


class NaViT(Backbone):
  """A Vision Transformer on packed sequences, and on ordinary images.

  Attributes:
    variant: a key of `models.vit_blocks.SIZES`, or "custom"; width, depth, heads and mlp_dim override it where not 0.
    patch: side of a patch in pixels.
    image_size: longest side in pixels that the position tables are for: image_size / patch entries per axis.
    channels: of the images.
    qk_norm: of queries and keys, per head: "layernorm" (ViT-22B, arXiv 2302.05442, section 2), scale without bias; "l2",
      unit length times sqrt(d) times a scale per head, logits not divided by sqrt(d) (vit-pytorch); "none".
    attention_bias, norm_bias: the paper has none.
    patch_norm: LayerNorm before and after the patch embedding (vit-pytorch).
    pos_kind, pos_coordinates, pos_combine: see `models.token_positions.TokenPositions`.
    pool: "map", cross-attention of one learned query per image plus that query; "mean" or "max" of its tokens.
    pool_norm: LayerNorm on the pooled output.
    drop_path: stochastic depth of the last block, linear from 0, drawn per image.
    layernorm_eps, gelu: as in `models.vit.ViT`.
    remat: "none", or "full" recomputes the blocks in the backward pass.
    dtype: compute dtype; parameters, norms and softmax are float32.
  """

  variant: str = "B"
  patch: int = 16
  image_size: int = 512
  width: int = 0
  depth: int = 0
  heads: int = 0
  mlp_dim: int = 0
  channels: int = 3
  qk_norm: Literal["none", "layernorm", "l2"] = "layernorm"
  attention_bias: bool = False
  norm_bias: bool = False
  patch_norm: bool = False
  pos_kind: Literal["learned", "sincos", "fourier", "table"] = "learned"
  pos_coordinates: Literal["absolute", "fractional", "fractional_aspect"] = "fractional"
  pos_combine: Literal["sum", "product", "stack"] = "sum"
  pool: Literal["map", "mean", "max"] = "map"
  pool_norm: bool = False
  drop_path: float = 0.0
  layernorm_eps: float = 1e-6
  gelu: Literal["exact", "tanh"] = "exact"
  remat: Literal["none", "full"] = "none"
  dtype: Literal["float32", "bfloat16", "float64"] = "float32"

  def size(self) -> Size:
    """The sizes after overrides.

    Raises:
      UserError: a field of this model that cannot be; "config.model..." says which.
    """
    if self.variant not in SIZES and self.variant != "custom":
      near = nearest(self.variant, SIZES)
      raise UserError(f"config.model.variant={self.variant!r}: expected custom or one of {', '.join(SIZES)}.{near}")
    base = SIZES.get(self.variant, Size(0, 0, 0, 0))
    size = Size(*(getattr(self, name) or getattr(base, name) for name in ("width", "depth", "mlp_dim", "heads")))
    if not (size.width and size.depth and size.mlp_dim and size.heads):
      raise UserError(f"config.model.variant='custom': give width, depth, heads and mlp_dim; found {size}.")
    if size.width % size.heads:
      raise UserError(f"config.model.heads={size.heads}: must divide the width {size.width}.")
    for name, options in (("qk_norm", QK_NORMS), ("pool", POOLS)):
      value = getattr(self, name)
      if value not in options:
        raise UserError(f"config.model.{name}={value!r}: expected one of {', '.join(options)}.{nearest(value, options)}")
    if not 0 <= self.drop_path < 1:
      raise UserError(f"config.model.drop_path={self.drop_path}: expected a rate in [0, 1).")
    if self.image_size < self.patch:
      raise UserError(f"config.model.image_size={self.image_size}: smaller than config.model.patch={self.patch}.")
    return size

  @nn.compact
  def __call__(
    self,
    images: Array | Sequences,
    *,
    train: bool,
    keep: Array | None = None,
    mask: Array | None = None,
    attention_layers: tuple[int, ...] = (),
  ) -> dict[str, Array]:
    """Runs the transformer.

    Args:
      images: [N, H, W, C], each a sequence of its own; or packed sequences.
      keep: int32 indices of the patches that stay, [K] or [N, K], for images; packed sequences are dropped from before.
      mask: bool, broadcastable to [N, heads, T, T], on top of the segments; False is not attended.
      attention_layers: blocks whose attention probabilities are returned, from 0.

    Returns:
      "pooled" [N, D] of images, [B, E, D] of sequences (0 where a sequence has no such image); "tokens" [N, T, D] after
      the final norm, anything in padding; "attention" {layer: [N, heads, T, T]} of `attention_layers`.

    Raises:
      UserError: sizes, channels, shapes or `attention_layers` that do not fit.
    """
    size = self.size()
    if any(not 0 <= i < size.depth for i in attention_layers):
      raise UserError(f"attention_layers={attention_layers}: the blocks are 0 to {size.depth - 1}.")
    packed = isinstance(images, Sequences)
    sequences = images if packed else self._one_each(images, keep)
    if packed:
      self._check_packed(sequences, keep)
    segment, slots = sequences.segment, sequences.grid.shape[1]
    x = self._embed(sequences)
    if mask is not None and mask.ndim == 3:
      mask = mask[:, None]
    if packed:
      same = segment_mask(segment)
      mask = same if mask is None else same & mask
    key = self.make_rng("drop_path") if train and self.drop_path > 0 and not self.is_initializing() else None
    x, weights = self._blocks(x, mask=mask, segment=segment, slots=slots, key=key, attention_layers=attention_layers)
    x = self._norm("norm")(x)
    pooled = self._pool(x.astype(self.dtype), slot_mask(segment, slots=slots))
    out = {"pooled": pooled if packed else pooled[:, 0], "tokens": x.astype(self.dtype)}
    return out | ({"attention": weights} if attention_layers else {})

  def _one_each(self, images: Array, keep: Array | None) -> Sequences:
    if images.shape[-1] != self.channels:
      raise UserError(f"config.model.channels={self.channels}: the images have {images.shape[-1]} channels.")
    sequences = cutting.of_images(images, self.patch)
    limit, grid = self.image_size // self.patch, (images.shape[1] // self.patch, images.shape[2] // self.patch)
    if self.pos_coordinates == "absolute" and self.pos_kind == "learned" and max(grid) > limit:
      raise UserError(
        f"config.model.image_size={self.image_size}: positions of {limit}x{limit} patches; the images have {grid[0]}x{grid[1]}."
      )
    if keep is None:
      return sequences
    take = lambda value: select(value[..., None], keep)[..., 0] if value.ndim == 2 else select(value, keep)
    exact = {name: take(getattr(sequences, name).astype(jnp.float32)).astype(jnp.int32) for name in ("segment", "y", "x")}
    return sequences.replace(patches=take(sequences.patches), **exact)

  def _check_packed(self, sequences: Sequences, keep: Array | None) -> None:
    if keep is not None:
      raise UserError("keep: packed sequences hold only the patches that stay; drop them in the packing.")
    cutting.check(sequences)
    values = self.patch**2 * self.channels
    if sequences.patches.shape[-1] != values:
      raise UserError(
        f"config.model.patch={self.patch}, channels={self.channels}: patches of {values} values; the packed sequences hold"
        f" {sequences.patches.shape[-1]}."
      )

  def _norm(self, name: str) -> nn.LayerNorm:
    real = jnp.promote_types(jnp.float32, jnp.dtype(self.dtype))
    return nn.LayerNorm(
      epsilon=self.layernorm_eps, use_bias=self.norm_bias, dtype=real, use_fast_variance=False, name=name
    )

  def _embed(self, sequences: Sequences) -> Array:
    """Patches to tokens with positions, [B, T, D]."""
    width, side = self.size().width, self.image_size // self.patch
    x = sequences.patches
    if self.patch_norm:
      x = self._norm("patch_norm")(x)
    x = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.lecun_normal(), name="patch_embed")(x)
    if self.patch_norm:
      x = self._norm("embed_norm")(x)
    positions = TokenPositions(
      width, (side, side), self.pos_kind, self.pos_coordinates, self.pos_combine, dtype=self.dtype, name="positions"
    )
    own = jnp.maximum(sequences.segment, 0)[..., None]
    grid = jnp.take_along_axis(sequences.grid, own, axis=1)  # [B, T, 2]
    return x.astype(self.dtype) + positions(sequences.y, sequences.x, grid)

  def _blocks(
    self,
    x: Array,
    *,
    mask: Array | None,
    segment: Array,
    slots: int,
    key: Array | None,
    attention_layers: tuple[int, ...],
  ) -> tuple[Array, dict[int, Array]]:
    size, weights = self.size(), {}
    rates = np.linspace(0.0, self.drop_path, size.depth)
    for i in range(size.depth):
      wanted = i in attention_layers
      make = nn.remat(Block, static_argnums=(4,)) if self.remat == "full" else Block
      factors = None if key is None else _branch_factors(jax.random.fold_in(key, i), float(rates[i]), segment, slots=slots)
      block = make(
        size.heads,
        size.mlp_dim,
        self.qk_norm,
        self.attention_bias,
        self.norm_bias,
        self.layernorm_eps,
        self.gelu,
        self.dtype,
        name=f"block_{i}",
      )
      x, found = block(x, mask, factors, wanted)
      if wanted:
        weights[i] = found
    return x, weights

  def _pool(self, x: Array, inside: Array) -> Array:
    """x [B, T, D], inside [B, E, T] -> [B, E, D] float32; 0 for images that are not there."""
    real = jnp.promote_types(jnp.float32, x.dtype)
    count = jnp.sum(inside, axis=-1, keepdims=True)
    if self.pool == "mean":
      total = jnp.einsum("bet,btd->bed", inside.astype(real), x.astype(real), precision=jax.lax.Precision.HIGHEST)
      out = total / jnp.maximum(count, 1)
    elif self.pool == "max":
      lowest = jnp.finfo(real).min
      rows = jax.lax.map(lambda one: jnp.max(jnp.where(one[..., None], x.astype(real), lowest), axis=1), inside.swapaxes(0, 1))
      out = rows.swapaxes(0, 1)
    else:
      probe = self.param("probe", nn.initializers.normal(0.02), (x.shape[-1],), jnp.float32).astype(real)
      query = self._norm("pool_query_norm")(probe)
      query = jnp.broadcast_to(query, (*inside.shape[:2], x.shape[-1])).astype(self.dtype)
      attend = make_attention(
        self.size().heads,
        qk_norm=self.qk_norm,
        use_bias=self.attention_bias,
        norm_bias=self.norm_bias,
        epsilon=self.layernorm_eps,
        dtype=self.dtype,
        name="pool",
      )
      out = attend(query, context=x, mask=inside[:, None])[0].astype(real) + probe
    if self.pool_norm:
      out = self._norm("pool_norm")(out)
    return jnp.where(count > 0, out, 0.0)


class Block(nn.Module):
  """x += factor attention(LN x); x += factor mlp(LN x)."""

  heads: int
  mlp_dim: int
  qk_norm: str
  attention_bias: bool
  norm_bias: bool
  epsilon: float
  gelu: str
  dtype: str

  @nn.compact
  def __call__(
    self, x: Array, mask: Array | None, factors: tuple[Array, Array] | None, return_weights: bool
  ) -> tuple[Array, Array | None]:
    """x: [B, T, D]; factors: [B, T, 1] of the two branches, stochastic depth."""
    norm = functools.partial(
      nn.LayerNorm,
      epsilon=self.epsilon,
      use_bias=self.norm_bias,
      dtype=jnp.promote_types(jnp.float32, jnp.dtype(self.dtype)),
      use_fast_variance=False,
    )
    attend = make_attention(
      self.heads,
      qk_norm=self.qk_norm,
      use_bias=self.attention_bias,
      norm_bias=self.norm_bias,
      epsilon=self.epsilon,
      dtype=self.dtype,
      name="attention",
    )
    first, second = (1.0, 1.0) if factors is None else (f.astype(self.dtype) for f in factors)
    y, weights = attend(norm(name="norm1")(x).astype(self.dtype), mask=mask, return_weights=return_weights)
    x = x + y * first
    y = norm(name="norm2")(x).astype(self.dtype)
    mlp = Mlp(self.mlp_dim, self.gelu, self.dtype, nn.initializers.xavier_uniform(), name="mlp")
    return x + mlp(y) * second, weights


def make_attention(
  heads: int, *, qk_norm: str, use_bias: bool, norm_bias: bool, epsilon: float, dtype: str, name: str
) -> nn.Module:
  """Attention without and with normalized queries and keys; the parameters of all kinds have the same names."""
  init = nn.initializers.xavier_uniform()
  if qk_norm == "l2":
    return UnitAttention(heads, use_bias, dtype, init, name=name)
  norms = {"qk_norm": qk_norm, "epsilon": epsilon, "norm_bias": norm_bias}
  return MultiHeadAttention(heads, dtype, init, qkv_bias=use_bias, out_bias=use_bias, name=name, **norms)


class UnitAttention(nn.Module):
  """vit-pytorch's: queries and keys of unit length, times sqrt(d) and a scale per head, logits not divided by sqrt(d)."""

  heads: int
  use_bias: bool
  dtype: str
  kernel_init: nn.initializers.Initializer

  @nn.compact
  def __call__(
    self, x: Array, *, context: Array | None = None, mask: Array | None = None, return_weights: bool = False
  ) -> tuple[Array, Array | None]:
    """As `models.attention.MultiHeadAttention`."""
    width, context = x.shape[-1], x if context is None else context
    project = functools.partial(nn.DenseGeneral, dtype=self.dtype, use_bias=self.use_bias, kernel_init=self.kernel_init)
    sources = (("query", x), ("key", context), ("value", context))
    q, k, v = (project((self.heads, width // self.heads), name=name)(source) for name, source in sources)
    q = self._unit(q, "query_norm") * q.shape[-1] ** 0.5  # `attention` divides the logits by it
    k = self._unit(k, "key_norm")
    out = attention(q, k, v, mask=mask)
    weights = attention_weights(q, k, mask=mask) if return_weights else None
    return project(width, axis=(-2, -1), name="out")(out), weights

  def _unit(self, x: Array, name: str) -> Array:
    """x: [B, T, N, d]."""
    scale = self.param(f"{name}_scale", nn.initializers.ones, x.shape[-2:], jnp.float32)
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    length = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
    return (x / length * x.shape[-1] ** 0.5 * scale).astype(self.dtype)


def slot_mask(segment: Array, *, slots: int) -> Array:
  """[B, T] -> [B, E, T] bool: the tokens of each image of a sequence."""
  return segment[:, None, :] == jnp.arange(slots)[:, None]


def _branch_factors(key: Array, rate: float, segment: Array, *, slots: int) -> tuple[Array, Array]:
  """Stochastic depth of two branches, drawn per image of a sequence: [B, T, 1] each, 0 or 1 / (1 - rate)."""
  drawn = jax.random.bernoulli(key, 1 - rate, (2, segment.shape[0], slots)) / (1 - rate)
  first, second = (jnp.take_along_axis(d, jnp.maximum(segment, 0), axis=1)[..., None] for d in drawn)
  return first, second
