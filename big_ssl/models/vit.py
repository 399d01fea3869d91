"""Vision Transformer (arXiv 2010.11929) in the dialects of DINO, MSN, DINOv2, MoCo v3, LOCA, timm, Hugging Face, big_vision.

Pre-norm blocks, learned or fixed positions, a final norm. What the dialects differ in is a field: position rule and the
slot of CLS, epsilon, GELU, pooling, registers, LayerScale, SwiGLU; and what scaling up asked for: parallel blocks, query and
key norm, RMS norm, no biases (ViT-22B, 2302.05442). Every ViT runs at any image size and, by PI-resize of its patch
embedding, at any patch size (FlexiViT, 2212.08013). The parameter tree is the same whether the blocks are unrolled,
rematerialized or scanned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array, UserError, nearest, sides
from big_ssl.models import positions
from big_ssl.models.layers import Backbone, ConvStem, PatchEmbed, make_norm
from big_ssl.models.vit_blocks import BLOCKS, SIZES, Block, MapHead, Size, initializers, select
from big_ssl.ops.sharded import over_devices

__all__ = ["SIZES", "Block", "Size", "ViT", "select"]


@dataclasses.dataclass(frozen=True)
class _Layers:
  """What the blocks give: the last tokens, CLS of every block, and tokens and attention of the blocks asked for."""

  last: Array
  cls: Array  # [N, L, D]
  tokens: dict[int, Array]
  attention: dict[int, Array]


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
    layernorm_eps: 1e-6 in the releases, 1e-12 in Hugging Face's ViT.
    gelu: "exact", or "tanh" for big_vision weights.
    patch_init: "dino" or "msn": of the patch embedding; all else is normal(0.02), zeros and ones in both. "dinov2": as
      "dino", CLS N(0, 1e-6). "loca": LeCun normal there, xavier uniform in the blocks, N(0, 1e-6) for the biases of their
      MLPs, N(0, 1/width) for positions; "big_vision" the same, CLS zero; "flexivit" the same, the patch embedding
      N(0, 1/width). "moco_v3": Xavier uniform there and in the blocks, CLS N(0, 1e-6).
    pos_table: "learned"; "sincos" is fixed and no parameter (MoCo v3); "sincos_scrambled" the public code's order of it,
      another one on grids that are not square; "sincos2d" is big_vision's, made for the grid at hand.
    class_token: whether there is one; without it position slot 0 is a patch's, and "pooled" is the mean of the patches.
    class_position: whether the learned table has a slot for CLS; big_vision's and some of timm's have none.
    pool: what "pooled" is: "cls"; "mean" of the patches, float32; "map", attention by a learned query
      (`vit_blocks.MapHead`); "auto", CLS where there is one, else the mean.
    final_norm: of the "tokens", or of the mean alone ("pooled", timm's fc_norm): tokens and CLS are not normed then.
    registers: learned tokens after CLS that have no position and are in none of the outputs but "registers".
    mask_token: whether there is a learned one, for `masked`.
    layer_scale: initial LayerScale of both branches; None has none.
    stem_channels: () for the linear patch embedding, (48, 96, 192, 384) for MSN's convolutional stem of stride 16.
    block: "sequential", or "parallel": attention and MLP read the same normed tokens (ViT-22B).
    mlp: "gelu", or "swiglu" (DINOv2's largest), whose hidden width mlp_dim is then.
    norm: of the blocks and at the end, "layernorm" or "rmsnorm"; norm_bias, whether a LayerNorm has one.
    pre_norm: a norm between embedding and blocks (timm's xp models, whose patch embedding has no bias then).
    patch_bias: whether the patch embedding has a bias.
    qkv_bias: whether query, key and value have biases.
    qk_norm: "layernorm" or "rmsnorm" of queries and keys per head, or "none".
    kernel_patch: patch size (or height, width) of the stored kernel where it is not `patch`: the kernel is PI-resized from it in every call.
    pos_grid: side (or height, width) of the learned table where it is not image_size / kernel_patch; FlexiViT's is 7.
    patch_sizes: sizes that training draws from, one per step (see `at_patch`); () trains at `patch`.
    remat: "none"; "full" recomputes the blocks in the backward pass; "dots" keeps the matrix products.
    scan: compile one block for all depths.
    dtype: compute dtype, "float32" or "bfloat16"; parameters, norm statistics and softmax are float32.
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
  patch_init: Literal["dino", "msn", "dinov2", "loca", "big_vision", "flexivit", "moco_v3"] = "dino"
  pos_table: Literal["learned", "sincos", "sincos_scrambled", "sincos2d"] = "learned"
  class_token: bool = True
  class_position: bool = True
  pool: Literal["auto", "cls", "mean", "map"] = "auto"
  final_norm: Literal["tokens", "pooled"] = "tokens"
  registers: int = 0
  mask_token: bool = False
  layer_scale: float | None = None
  stem_channels: tuple[int, ...] = ()
  block: Literal["sequential", "parallel"] = "sequential"
  mlp: Literal["gelu", "swiglu"] = "gelu"
  norm: Literal["layernorm", "rmsnorm"] = "layernorm"
  norm_bias: bool = True
  pre_norm: bool = False
  patch_bias: bool = True
  qkv_bias: bool = True
  qk_norm: Literal["none", "layernorm", "rmsnorm"] = "none"
  kernel_patch: int | tuple[int, int] = 0
  pos_grid: int | tuple[int, int] = 0
  patch_sizes: tuple[int, ...] = ()
  remat: Literal["none", "full", "dots"] = "none"
  scan: bool = False
  dtype: Literal["float32", "bfloat16"] = "float32"

  def size(self) -> Size:
    """The sizes after overrides.

    Raises:
      UserError: unknown variant, "custom" without all four sizes, heads that do not divide the width, drop_path outside
        [0, 1), or a pooling that the tokens do not allow.
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
    if self.pool == "cls" and not self.class_token:
      raise UserError("config.model.pool='cls': needs config.model.class_token=True.")
    if self.final_norm == "pooled" and self.pooling != "mean":
      raise UserError(f"config.model.final_norm='pooled': norms the mean of the patches, but pool={self.pool!r}.")
    return size

  @property
  def pooling(self) -> str:
    """`pool` without "auto"."""
    return self.pool if self.pool != "auto" else ("cls" if self.class_token else "mean")

  def table(self) -> tuple[int, int]:
    """The grid of the learned position table."""
    if self.pos_grid:
      return sides(self.pos_grid)
    stored = self.kernel_patch or self.patch
    (height, width), (rows, columns) = sides(self.image_size), sides(stored)
    if height % rows or width % columns:
      name = "kernel_patch" if self.kernel_patch else "patch"
      raise UserError(f"config.model.{name}={stored}: does not divide config.model.image_size={self.image_size}.")
    return height // rows, width // columns

  def at_patch(self, patch: int) -> ViT:
    """The model that runs the SAME parameters at another patch size (FlexiViT, arXiv 2212.08013, section 3.3)."""
    if patch < 1:
      raise UserError(f"config.model.patch_sizes={self.patch_sizes}: expected sizes of at least 1, found {patch}.")
    return self.clone(patch=patch, kernel_patch=self.kernel_patch or self.patch, pos_grid=self.table())

  @nn.compact
  def __call__(
    self,
    images: Array,
    *,
    train: bool,
    keep: Array | None = None,
    mask: Array | None = None,
    masked: Array | None = None,
    attention_layers: tuple[int, ...] = (),
    token_layers: tuple[int, ...] = (),
    add_positions: bool = True,
    patch: int | tuple[int, int] | None = None,
  ) -> dict[str, Any]:
    """Runs the transformer.

    Args:
      images: [N, H, W, C].
      keep: int32 indices of the patches that stay, [K] for all images or [N, K]; positions are added before, CLS and
        registers always stay.
      mask: bool [N, T, T] or broadcastable to [N, heads, T, T]; False is not attended.
      masked: bool [N, h * w]; the embeddings of these patches become the mask token, before positions are added.
      attention_layers: blocks whose attention probabilities are returned, from 0; nothing is scanned then.
      token_layers: blocks whose tokens are returned, from 0; nothing is scanned then.
      add_positions: False leaves the patches without positions (LOCA's location-only queries).
      patch: side (or height, width) of the patches in this call, static; the field where None.

    Returns:
      "pooled" [N, D], see `pool`; "cls": [N, D], CLS after the final norm; "tokens": [N, T, D], patches after it;
      "cls_layers": [N, L, D], CLS after every block WITHOUT the final norm; "cls_layers_normed" with it; "registers":
      [N, R, D] after the norm; "attention": {layer: [N, heads, T, T]}; "token_layers" and "token_layers_normed": {layer:
      [N, 1 + R + T, D]}. What the model does not have is absent.

    Raises:
      UserError: sizes, channels, `keep`, `masked` or layers that do not fit; "config.model..." says which.
    """
    self._check(images, attention_layers=attention_layers, token_layers=token_layers)
    patch = sides(self.patch if patch is None else patch)
    x = self._embed(images, patch=patch, keep=keep, masked=masked, train=train, add_positions=add_positions)
    if mask is not None and mask.ndim == 3:
      mask = mask[:, None]
    layers = self._blocks(x, train=train, mask=mask, attention_layers=attention_layers, token_layers=token_layers)
    norm = self._norm("norm") if self.final_norm == "tokens" else lambda tokens: tokens
    x, first = norm(layers.last), int(self.class_token)
    out: dict[str, Any] = {"tokens": x[:, first + self.registers :]}
    if self.registers:
      out["registers"] = x[:, first : first + self.registers]
    if self.class_token:
      out |= {"cls": x[:, 0], "cls_layers": layers.cls, "cls_layers_normed": norm(layers.cls)}
    out["pooled"] = self._pool(out)
    if attention_layers:
      out["attention"] = layers.attention
    if token_layers:
      normed = {i: norm(tokens) for i, tokens in layers.tokens.items()}
      out |= {"token_layers": layers.tokens, "token_layers_normed": normed}
    return out

  def _check(self, images: Array, **layers: tuple[int, ...]) -> None:
    depth = self.size().depth
    for name, chosen in layers.items():
      if any(not 0 <= i < depth for i in chosen):
        raise UserError(f"{name}={chosen}: the blocks are 0 to {depth - 1}.")
    if images.shape[-1] != self.channels:
      raise UserError(f"config.model.channels={self.channels}: the images have {images.shape[-1]} channels.")

  def _norm(self, name: str) -> nn.Module:
    return make_norm(self.norm, epsilon=self.layernorm_eps, dtype=self.dtype, use_bias=self.norm_bias, name=name)

  def _pool(self, out: dict[str, Array]) -> Array:
    if self.pooling == "cls":
      return out["cls"]
    if self.pooling == "mean":
      mean = jnp.mean(out["tokens"].astype(jnp.float32), axis=1)
      return self._norm("fc_norm")(mean) if self.final_norm == "pooled" else mean
    size = self.size()
    head = MapHead(
      size.heads,
      size.mlp_dim,
      self.layernorm_eps,
      self.gelu,
      self.dtype,
      self.patch_init,
      self.norm,
      self.norm_bias,
      name="map_head",
    )
    return head(out["tokens"])

  def _embed(
    self,
    images: Array,
    *,
    patch: tuple[int, int],
    keep: Array | None,
    masked: Array | None,
    train: bool,
    add_positions: bool,
  ) -> Array:
    """CLS with its position, registers without, and the patches that stay with theirs, [N, 1 + R + T, D]."""
    width, inits = self.size().width, initializers(self.patch_init, width=self.size().width)
    patches = self._patches(images, patch=patch, train=train)
    grid = patches.shape[1:3]
    cls = self.param("cls_token", inits.cls, (1, 1, width), jnp.float32) if self.class_token else None
    patches = self._mask(patches.reshape(patches.shape[0], -1, width), masked)
    slots = int(self.class_token and self.class_position)
    pos = self._positions(inits.positions, grid=grid, slots=slots)  # [1, slots + table, D]
    if add_positions:
      patches = patches + self._resampled(pos[0, slots:], grid=grid, image=images.shape[1:3])[None].astype(self.dtype)
    if keep is not None:
      patches = select(patches, keep)
    tokens = [] if cls is None else [cls + pos[:, :1] if slots else cls]
    if self.registers:
      tokens.append(self.param("registers", nn.initializers.normal(1e-6), (1, self.registers, width), jnp.float32))
    tokens = [jnp.broadcast_to(t.astype(self.dtype), (patches.shape[0], *t.shape[1:])) for t in tokens]
    x = jnp.concatenate([*tokens, patches], axis=1)
    return self._norm("norm_pre")(x) if self.pre_norm else x

  def _patches(self, images: Array, *, patch: tuple[int, int], train: bool) -> Array:
    """[N, h, w, D] without positions."""
    width, stored = self.size().width, self.kernel_patch or self.patch
    if self.patch_sizes and any(side > p and side % p for side, p in zip(images.shape[1:3], patch, strict=True)):
      sides = f"{images.shape[1]}x{images.shape[2]}"
      raise UserError(f"config.model.patch_sizes={self.patch_sizes}: {patch[0]} leaves a rest of images of {sides} pixels.")
    if not self.stem_channels:
      embed = PatchEmbed(width, stored, self.patch_init, self.dtype, self.patch_bias, name="patch_embed")
      return embed(images, patch=patch)
    height, across = images.shape[1:3]
    stride = 2 ** len(self.stem_channels)
    if min(height, across) < self.patch:
      raise UserError(f"config.model.patch={self.patch}: the images are {height}x{across}, smaller than one patch.")
    if patch != (stride, stride):
      raise UserError(f"config.model.stem_channels={self.stem_channels}: a stride of {stride}, but config.model.patch={patch[0]}.")
    return ConvStem(width, self.stem_channels, self.patch_init, self.dtype, name="patch_embed")(images, train=train)

  def _mask(self, patches: Array, masked: Array | None) -> Array:
    if not self.mask_token:
      if masked is not None:
        raise UserError("config.model.mask_token=False: there is no token for masked patches.")
      return patches
    token = self.param("mask_token", nn.initializers.zeros, (1, patches.shape[-1]), jnp.float32)
    if masked is None:
      return patches
    if masked.shape != patches.shape[:2]:
      raise UserError(f"masked: expected {list(patches.shape[:2])}, one value per patch; found {list(masked.shape)}.")
    return jnp.where(masked[..., None], token[None].astype(patches.dtype), patches)

  def _positions(self, init: nn.initializers.Initializer, *, grid: tuple[int, int], slots: int) -> Array:
    """The table with a slot for CLS, or without; fixed ones add nothing to CLS. [1, slots + h * w, D]."""
    table, width = self.table(), self.size().width
    if self.pos_table == "learned":
      return self.param("pos_embed", init, (1, slots + table[0] * table[1], width), jnp.float32)
    if self.pos_table == "sincos2d":
      fixed = positions.sincos2d(grid, width=width)
    else:
      fixed = positions.sincos(table, width=width, scrambled=self.pos_table == "sincos_scrambled")
    return jnp.pad(jnp.asarray(fixed), ((slots, 0), (0, 0)))[None]

  def _resampled(self, table: Array, *, grid: tuple[int, int], image: tuple[int, int]) -> Array:
    if self.pos_table == "sincos2d":
      return table
    return positions.resample(table, rule=self.pos_rule, grid=grid, image=image, xp=jnp, table_shape=self.table())

  def _blocks(
    self,
    x: Array,
    *,
    train: bool,
    mask: Array | None,
    attention_layers: tuple[int, ...],
    token_layers: tuple[int, ...],
  ) -> _Layers:
    depth, make = self.size().depth, self._make_block()
    if self.is_initializing():
      for i in range(depth):
        make(name=f"block_{i}")(x)
    params = [self.variables["params"][f"block_{i}"] for i in range(depth)]
    rates = np.linspace(0.0 if self.drop_path_decay == "linear" else self.drop_path, self.drop_path, depth)
    key = self.make_rng("drop_path") if train and self.drop_path > 0 and not self.is_initializing() else None
    keys = None if key is None else jax.random.split(key, depth)
    block = make(parent=None)

    def body(x: Array, p: Any, rate: Array, key: Array | None) -> Array:
      # Without being told, the compiler spreads the tokens over "fsdp" as the kernels are, and sends whole activations.
      return over_devices(block.apply({"params": p}, over_devices(x), rate=rate, key=key, mask=mask)[0])

    if self.remat != "none":
      policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.remat == "dots" else None
      body = jax.checkpoint(body, policy=policy)
    if self.scan and not attention_layers and not token_layers:
      stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

      def step(x: Array, layer: tuple) -> tuple[Array, Array]:
        x = body(x, *layer)
        return x, x[:, 0]

      x, cls = jax.lax.scan(step, x, (stacked, jnp.asarray(rates, jnp.float32), keys))
      return _Layers(x, cls.swapaxes(0, 1), {}, {})
    cls, tokens, weights = [], {}, {}
    for i in range(depth):
      layer_key = None if keys is None else keys[i]
      if i in attention_layers:
        kwargs = {"rate": rates[i], "key": layer_key, "mask": mask, "return_weights": True}
        x, weights[i] = block.apply({"params": params[i]}, x, **kwargs)
      else:
        x = body(x, params[i], rates[i], layer_key)
      cls.append(x[:, 0])
      if i in token_layers:
        tokens[i] = x
    return _Layers(x, jnp.stack(cls, axis=1), tokens, weights)

  def _make_block(self) -> Callable[..., Block]:
    size = self.size()
    return functools.partial(
      BLOCKS[self.block],
      size.heads,
      size.mlp_dim,
      self.layernorm_eps,
      self.gelu,
      self.dtype,
      self.layer_scale,
      self.patch_init,
      self.mlp,
      self.norm,
      self.norm_bias,
      self.qkv_bias,
      self.qk_norm,
    )
