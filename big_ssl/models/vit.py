"""Vision Transformer (arXiv 2010.11929) in the dialects of DINO (2104.14294), MSN (2204.07141) and LOCA (2212.02400).

Pre-norm blocks, a CLS token, learned positions whose slot 0 belongs to CLS, biases everywhere, a final LayerNorm;
LayerScale (2103.17239) and registers (2309.16588) on request. The parameter tree is the same whether the blocks are
unrolled, rematerialized or scanned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array, Params, UserError, nearest
from big_ssl.models import positions
from big_ssl.models.attention import MultiHeadAttention
from big_ssl.models.layers import Backbone, ConvStem, LayerNorm, LayerScale, Mlp, PatchEmbed, drop_path


@dataclasses.dataclass(frozen=True)
class Size:
  """width, depth, MLP width and heads (arXiv 2010.11929, Table 1; 2106.04560, Table 2)."""

  width: int
  depth: int
  mlp_dim: int
  heads: int


SIZES = {
  "mu": Size(32, 1, 128, 2),
  "Ti": Size(192, 12, 768, 3),
  "S": Size(384, 12, 1536, 6),
  "M": Size(512, 12, 2048, 8),
  "B": Size(768, 12, 3072, 12),
  "L": Size(1024, 24, 4096, 16),
  "So400m": Size(1152, 27, 4304, 16),
  "H": Size(1280, 32, 5120, 16),
  "g": Size(1408, 40, 6144, 16),
  "G": Size(1664, 48, 8192, 16),
  "e": Size(1792, 56, 15360, 16),
}


class Block(nn.Module):
  """x += drop_path(scale attention(LN x)); x += drop_path(scale mlp(LN x)); without LayerScale the scale is 1."""

  heads: int
  mlp_dim: int
  epsilon: float = 1e-6
  gelu: str = "exact"
  dtype: str = "float32"
  layer_scale: float | None = None
  init: str = "dino"

  @nn.compact
  def __call__(
    self,
    x: Array,
    *,
    rate: float | Array = 0.0,
    key: Array | None = None,
    mask: Array | None = None,
    return_weights: bool = False,
  ) -> tuple[Array, Array | None]:
    keys = (None, None) if key is None else jax.random.split(key)
    y = LayerNorm(self.epsilon, self.dtype, name="norm1")(x)
    kernel, bias = block_initializers(self.init)
    y, weights = MultiHeadAttention(self.heads, dtype=self.dtype, kernel_init=kernel, name="attention")(
      y, mask=mask, return_weights=return_weights
    )
    if self.layer_scale is not None:
      y = LayerScale(self.layer_scale, name="ls1")(y)
    x = x + drop_path(y, rate=rate, key=keys[0])
    y = LayerNorm(self.epsilon, self.dtype, name="norm2")(x)
    y = Mlp(self.mlp_dim, gelu=self.gelu, dtype=self.dtype, kernel_init=kernel, bias_init=bias, name="mlp")(y)
    if self.layer_scale is not None:
      y = LayerScale(self.layer_scale, name="ls2")(y)
    return x + drop_path(y, rate=rate, key=keys[1]), weights


def block_initializers(init: str) -> tuple[nn.initializers.Initializer, nn.initializers.Initializer]:
  """Of the kernels of attention and MLP, and of the biases of the MLP; `init` is the ViT's `patch_init`.

  Query, key and value are separate kernels of fan-out `width`, so that Xavier's bound is MoCo v3's for its fused one.
  """
  if init == "loca":
    return nn.initializers.xavier_uniform(), nn.initializers.normal(1e-6)
  if init == "moco_v3":
    return nn.initializers.xavier_uniform(), nn.initializers.zeros
  return nn.initializers.normal(0.02), nn.initializers.zeros


def select(patches: Array, keep: Array) -> Array:
  """The patches that stay, [N, T, D] -> [N, K, D]; an index that does not exist gives NaN, not a neighbor.

  Args:
    keep: integer indices, [K] for all images or [N, K].

  Raises:
    UserError: another shape or dtype, or more indices than patches.
  """
  images, tokens = patches.shape[:2]
  fits = keep.ndim == 1 or (keep.ndim == 2 and keep.shape[0] == images)
  if not fits or not jnp.issubdtype(keep.dtype, jnp.integer):
    raise UserError(f"keep: expected integers [K] or [{images}, K], found {keep.dtype} {list(keep.shape)}.")
  if not 0 < keep.shape[-1] <= tokens:
    raise UserError(f"keep: {keep.shape[-1]} of {tokens} patches; from 1 to {tokens} can stay.")
  if keep.ndim == 1:
    return jnp.take(patches, keep, axis=1, mode="fill", fill_value=jnp.nan)
  return jnp.take_along_axis(patches, keep[..., None], axis=1, mode="fill", fill_value=jnp.nan)


class ViT(Backbone):
  """A Vision Transformer.

  Attributes:
    variant: a key of `SIZES`, such as "S", or "custom"; width, depth, heads and mlp_dim override it where not 0.
    patch: side of a patch in pixels.
    image_size: side (or height, width) of the images that the learned position table is for; others are resampled.
    channels: of the images.
    pos_rule: how the table is resampled, see `models/positions.py`; part of the model since it changes the numbers.
    drop_path: stochastic depth of the last block.
    drop_path_decay: "linear" from 0 at the first block (DINO), or "uniform" over depth (DINOv2).
    layernorm_eps: 1e-6 in all public releases.
    gelu: "exact", or "tanh" for big_vision weights.
    patch_init: "dino" or "msn": of the patch embedding; all else is normal(0.02), zeros and ones in both. "loca": LeCun
      normal there, xavier uniform in the blocks, N(0, 1e-6) for the biases of their MLPs, N(0, 1/width) for positions.
      "moco_v3": Xavier uniform there and in the blocks, CLS N(0, 1e-6).
    pos_table: "learned"; "sincos" is fixed and no parameter (MoCo v3); "sincos_scrambled" the public code's order of it,
      another one on grids that are not square.
    class_token: whether there is one; without it position slot 0 is a patch's, and "pooled" is the mean of the patches.
    registers: learned tokens after CLS that have no position and are in none of the outputs but "registers".
    layer_scale: initial LayerScale of both branches; None has none.
    stem_channels: () for the linear patch embedding, (48, 96, 192, 384) for MSN's convolutional stem of stride 16.
    remat: "none"; "full" recomputes the blocks in the backward pass; "dots" keeps the matrix products.
    scan: compile one block for all depths.
    dtype: compute dtype, "float32" or "bfloat16"; parameters, LayerNorm statistics and softmax are float32.
  """

  variant: str = "S"
  patch: int = 16
  image_size: int | tuple[int, int] = 224
  width: int = 0
  depth: int = 0
  heads: int = 0
  mlp_dim: int = 0
  channels: int = 3
  pos_rule: str = "dino"
  drop_path: float = 0.0
  drop_path_decay: Literal["linear", "uniform"] = "linear"
  layernorm_eps: float = 1e-6
  gelu: Literal["exact", "tanh"] = "exact"
  patch_init: Literal["dino", "msn", "loca", "moco_v3"] = "dino"
  pos_table: Literal["learned", "sincos", "sincos_scrambled"] = "learned"
  class_token: bool = True
  registers: int = 0
  layer_scale: float | None = None
  stem_channels: tuple[int, ...] = ()
  remat: Literal["none", "full", "dots"] = "none"
  scan: bool = False
  dtype: Literal["float32", "bfloat16"] = "float32"

  def size(self) -> Size:
    """The sizes after overrides.

    Raises:
      UserError: unknown variant, "custom" without all four sizes, heads that do not divide the width, or drop_path
        outside [0, 1).
    """
    if self.variant not in SIZES and self.variant != "custom":
      near = nearest(self.variant, SIZES)
      raise UserError(f"config.model.variant={self.variant!r}: expected custom or one of {', '.join(SIZES)}.{near}")
    base = SIZES.get(self.variant, Size(0, 0, 0, 0))
    size = Size(*(getattr(self, f.name) or getattr(base, f.name) for f in dataclasses.fields(Size)))
    if not all(dataclasses.astuple(size)):
      raise UserError(f"config.model.variant='custom': give width, depth, heads and mlp_dim; found {size}.")
    if size.width % size.heads:
      raise UserError(f"config.model.heads={size.heads}: must divide the width {size.width}.")
    if not 0 <= self.drop_path < 1:
      raise UserError(f"config.model.drop_path={self.drop_path}: expected a rate in [0, 1).")
    return size

  def table(self) -> tuple[int, int]:
    """The grid of the learned position table."""
    height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
    if height % self.patch or width % self.patch:
      raise UserError(f"config.model.patch={self.patch}: does not divide config.model.image_size={self.image_size}.")
    return height // self.patch, width // self.patch

  @nn.compact
  def __call__(
    self,
    images: Array,
    *,
    train: bool,
    keep: Array | None = None,
    mask: Array | None = None,
    attention_layers: tuple[int, ...] = (),
    add_positions: bool = True,
  ) -> dict[str, Array]:
    """Runs the transformer.

    Args:
      images: [N, H, W, C].
      keep: int32 indices of the patches that stay, [K] for all images or [N, K]; positions are added before, CLS and
        registers always stay.
      mask: bool [N, T, T] or broadcastable to [N, heads, T, T]; False is not attended.
      attention_layers: blocks whose attention probabilities are returned, from 0; nothing is scanned then.
      add_positions: False leaves the patches without positions (LOCA's location-only queries).

    Returns:
      "pooled" and "cls": [N, D], CLS after the final norm; "tokens": [N, T, D], patches after it; "cls_layers":
      [N, L, D], CLS after every block WITHOUT the final norm; "cls_layers_normed" with it; "registers": [N, R, D] after
      the norm; "attention": {layer: [N, heads, T, T]}. What the model does not have is absent.

    Raises:
      UserError: sizes, channels, `keep` or `attention_layers` that do not fit; "config.model..." says which.
    """
    depth = self.size().depth
    if any(not 0 <= i < depth for i in attention_layers):
      raise UserError(f"attention_layers={attention_layers}: the blocks are 0 to {depth - 1}.")
    if images.shape[-1] != self.channels:
      raise UserError(f"config.model.channels={self.channels}: the images have {images.shape[-1]} channels.")
    x = self._embed(images, keep=keep, train=train, add_positions=add_positions)
    if mask is not None and mask.ndim == 3:
      mask = mask[:, None]
    x, cls_layers, weights = self._blocks(x, train=train, mask=mask, attention_layers=attention_layers)
    norm = LayerNorm(self.layernorm_eps, self.dtype, name="norm")
    x, first = norm(x), int(self.class_token)
    out = {"tokens": x[:, first + self.registers :]}
    if self.registers:
      out["registers"] = x[:, first : first + self.registers]
    if self.class_token:
      out |= {"pooled": x[:, 0], "cls": x[:, 0], "cls_layers": cls_layers, "cls_layers_normed": norm(cls_layers)}
    else:
      out["pooled"] = jnp.mean(out["tokens"].astype(jnp.float32), axis=1)
    return out | ({"attention": weights} if attention_layers else {})

  def _embed(self, images: Array, *, keep: Array | None, train: bool, add_positions: bool) -> Array:
    """CLS with its position, registers without, and the patches that stay with theirs, [N, 1 + R + T, D]."""
    width, table, first = self.size().width, self.table(), int(self.class_token)
    height, across = images.shape[1:3]
    if min(height, across) < self.patch:
      raise UserError(f"config.model.patch={self.patch}: the images are {height}x{across}, smaller than one patch.")
    if self.stem_channels:
      if 2 ** len(self.stem_channels) != self.patch:
        stride = 2 ** len(self.stem_channels)
        raise UserError(
          f"config.model.stem_channels={self.stem_channels}: a stride of {stride}, but config.model.patch={self.patch}."
        )
      patches = ConvStem(width, self.stem_channels, self.patch_init, self.dtype, name="patch_embed")(images, train=train)
    else:
      patches = PatchEmbed(width, self.patch, self.patch_init, self.dtype, name="patch_embed")(images)
    grid = patches.shape[1:3]
    normal = nn.initializers.normal(0.02)
    cls_init = nn.initializers.normal(1e-6) if self.patch_init == "moco_v3" else normal
    cls = self.param("cls_token", cls_init, (1, 1, width), jnp.float32) if self.class_token else None
    spread = nn.initializers.normal(width**-0.5) if self.patch_init == "loca" else normal
    if self.pos_table == "learned":
      pos = self.param("pos_embed", spread, (1, first + table[0] * table[1], width), jnp.float32)
    else:
      fixed = positions.sincos(table, width=width, scrambled=self.pos_table == "sincos_scrambled")
      pos = jnp.pad(jnp.asarray(fixed), ((first, 0), (0, 0)))[None]  # nothing is added to CLS
    patches = patches.reshape(patches.shape[0], -1, width)
    if add_positions:
      learned = positions.resample(
        pos[0, first:], rule=self.pos_rule, grid=grid, image=images.shape[1:3], xp=jnp, table_shape=table
      )
      patches = patches + learned[None].astype(self.dtype)
    if keep is not None:
      patches = select(patches, keep)
    tokens = [] if cls is None else [cls + pos[:, :1]]
    if self.registers:
      tokens.append(self.param("registers", nn.initializers.normal(1e-6), (1, self.registers, width), jnp.float32))
    tokens = [jnp.broadcast_to(t.astype(self.dtype), (patches.shape[0], *t.shape[1:])) for t in tokens]
    return jnp.concatenate([*tokens, patches], axis=1)

  def _blocks(
    self, x: Array, *, train: bool, mask: Array | None, attention_layers: tuple[int, ...]
  ) -> tuple[Array, Array, dict[int, Array]]:
    size = self.size()
    make: Callable[..., Block] = functools.partial(
      Block,
      size.heads,
      size.mlp_dim,
      self.layernorm_eps,
      self.gelu,
      self.dtype,
      self.layer_scale,
      self.patch_init,
    )
    if self.is_initializing():
      for i in range(size.depth):
        make(name=f"block_{i}")(x)
    params = [self.variables["params"][f"block_{i}"] for i in range(size.depth)]
    rates = np.linspace(0.0 if self.drop_path_decay == "linear" else self.drop_path, self.drop_path, size.depth)
    key = self.make_rng("drop_path") if train and self.drop_path > 0 and not self.is_initializing() else None
    keys = None if key is None else jax.random.split(key, size.depth)
    block = make(parent=None)

    def body(x: Array, p: Params, rate: Array, key: Array | None) -> Array:
      return block.apply({"params": p}, x, rate=rate, key=key, mask=mask)[0]

    if self.remat != "none":
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
      body = jax.checkpoint(body, policy=policy)
    if self.scan and not attention_layers:
      stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

      def step(x: Array, layer: tuple) -> tuple[Array, Array]:
        x = body(x, *layer)
        return x, x[:, 0]

      x, cls = jax.lax.scan(step, x, (stacked, jnp.asarray(rates, jnp.float32), keys))
      return x, cls.swapaxes(0, 1), {}
    cls, weights = [], {}
    for i in range(size.depth):
      layer_key = None if keys is None else keys[i]
      if i in attention_layers:
        x, weights[i] = block.apply(
          {"params": params[i]}, x, rate=rates[i], key=layer_key, mask=mask, return_weights=True
        )
      else:
        x = body(x, params[i], rates[i], layer_key)
      cls.append(x[:, 0])
    return x, jnp.stack(cls, axis=1), weights
