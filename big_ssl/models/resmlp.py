"""ResMLP (arXiv 2105.03404): residual MLPs over patches and over channels, no attention, no normalization statistics.

The token layer has one weight per pair of patches, so that a network is for images of one size; others are an error, or
on request an approximation by resampling that layer.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError, nearest
from big_ssl.models import positions
from big_ssl.models.layers import Backbone, LayerScale, Mlp, PatchEmbed, check_images, drop_path


@dataclasses.dataclass(frozen=True)
class Size:
  """width, depth, patch and initial LayerScale (public code)."""

  width: int
  depth: int
  patch: int
  layer_scale: float


SIZES = {
  "S12": Size(384, 12, 16, 0.1),
  "S24": Size(384, 24, 16, 1e-5),
  "S36": Size(384, 36, 16, 1e-6),
  "B24": Size(768, 24, 8, 1e-6),
}


class Affine(nn.Module):
  """scale * x + bias per channel, in place of a normalization (section 2); float32 in, `dtype` out."""

  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    return (scale * x.astype(jnp.float32) + bias).astype(self.dtype)


class TokenMix(nn.Module):
  """One linear layer over the patches, shared by all channels: [N, T, D] -> [N, T, D]; kernel [T in, T out], bias [T].

  On another grid than `table` the kernel is resampled (own choice, an approximation): both indices bilinearly,
  times old T / new T so that sums over the inputs stay, and the bias as a map.
  """

  table: tuple[int, int]
  dtype: str

  @nn.compact
  def __call__(self, x: Array, *, grid: tuple[int, int]) -> Array:
    tokens = self.table[0] * self.table[1]
    kernel = self.param("kernel", nn.initializers.normal(0.02), (tokens, tokens), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (tokens,), jnp.float32)
    if grid != self.table:
      matrices = positions.resample_matrices("linear", table=self.table, grid=grid, image=grid)
      y, x_axis = (jnp.asarray(m, jnp.float32) for m in matrices)
      count = grid[0] * grid[1]
      maps = kernel.reshape(*self.table, *self.table)
      maps = jnp.einsum("ih,jw,hwab,ka,lb->ijkl", y, x_axis, maps, y, x_axis, precision="highest", optimize="optimal")
      kernel = maps.reshape(count, count) * (tokens / count)
      bias = jnp.einsum("ih,jw,hw->ij", y, x_axis, bias.reshape(self.table), precision="highest").reshape(count)
    out = jnp.einsum("nid,io->nod", x, kernel.astype(self.dtype))
    return out + bias.astype(self.dtype)[:, None]


class Block(nn.Module):
  """x += ls1 mix(affine1 x); x += ls2 mlp(affine2 x). The stream is float32: nothing else keeps it from drifting."""

  mlp_dim: int
  table: tuple[int, int]
  grid: tuple[int, int]
  layer_scale: float
  drop_path: float
  dtype: str

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    keys = (None, None)
    if train and self.drop_path > 0 and not self.is_initializing():
      keys = jax.random.split(self.make_rng("drop_path"))
    mixed = TokenMix(self.table, self.dtype, name="mix")(Affine(self.dtype, name="norm1")(x), grid=self.grid)
    mixed = LayerScale(self.layer_scale, name="ls1")(mixed.astype(jnp.float32))
    x = x + drop_path(mixed, rate=self.drop_path, key=keys[0])
    y = Mlp(self.mlp_dim, dtype=self.dtype, name="mlp")(Affine(self.dtype, name="norm2")(x))
    y = LayerScale(self.layer_scale, name="ls2")(y.astype(jnp.float32))
    return x + drop_path(y, rate=self.drop_path, key=keys[1])


class ResMLP(Backbone):
  """A residual MLP.

  Attributes:
    variant: a key of `SIZES`, such as "S12", or "custom"; width, depth, patch and layer_scale override it where they
      are not 0 or None.
    image_size: side (or height, width) of the images that the token layers are for.
    resample: what other images do: "none", an error; "bilinear", the approximation of `TokenMix`.
    mlp_ratio: width of the MLPs over that of the tokens.
    layer_scale: of all branches; 0.1 with 12 blocks, 1e-5 with 24, 1e-6 with 36 and B24.
    drop_path: stochastic depth, the same in all blocks (public code).
    channels: of the images.
    remat: "full" recomputes each block in the backward pass.
    dtype: compute dtype; parameters and the residual stream are float32.
  """

  variant: str = "S12"
  patch: int | None = None
  image_size: int | tuple[int, int] = 224
  resample: Literal["none", "bilinear"] = "none"
  width: int = 0
  depth: int = 0
  mlp_ratio: float = 4.0
  layer_scale: float | None = None
  drop_path: float = 0.0
  channels: int = 3
  remat: Literal["none", "full"] = "none"
  dtype: Literal["float32", "bfloat16"] = "float32"

  def size(self) -> Size:
    """The sizes after overrides.

    Raises:
      UserError: unknown variant, "custom" without sizes, or drop_path outside [0, 1).
    """
    if self.variant not in SIZES and self.variant != "custom":
      near = nearest(self.variant, SIZES)
      raise UserError(f"config.model.variant={self.variant!r}: expected custom or one of {', '.join(SIZES)}.{near}")
    base = SIZES.get(self.variant, Size(0, 0, 0, 0.1))
    scale = base.layer_scale if self.layer_scale is None else self.layer_scale
    size = Size(self.width or base.width, self.depth or base.depth, self.patch or base.patch, scale)
    if not (size.width and size.depth and size.patch):
      raise UserError(f"config.model.variant='custom': give width, depth and patch; found {size}.")
    if not 0 <= self.drop_path < 1:
      raise UserError(f"config.model.drop_path={self.drop_path}: expected a rate in [0, 1).")
    return size

  def table(self) -> tuple[int, int]:
    """The grid of patches that the token layers are for."""
    patch = self.size().patch
    height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
    if height % patch or width % patch:
      raise UserError(f"config.model.patch={patch}: does not divide config.model.image_size={self.image_size}.")
    return height // patch, width // patch

  @nn.compact
  def __call__(
    self, images: Array, *, train: bool, keep: Array | None = None, mask: Array | None = None
  ) -> dict[str, Array]:
    """Runs the network.

    Args:
      images: [N, H, W, C].
      keep, mask: None; the token layers need every patch at its place.

    Returns:
      "pooled": [N, D] float32, the mean of "tokens"; "tokens": [N, T, D], patches after the last affine map; "stages":
      the maps [N, h, w, D] of the patch embedding and of every block.

    Raises:
      UserError: sizes or channels that do not fit, or images of another size without `resample`.
    """
    size, table = self.size(), self.table()
    check_images(self, images, keep=keep, mask=mask)
    x = PatchEmbed(size.width, size.patch, dtype=self.dtype, name="patch_embed")(images)
    grid = x.shape[1:3]
    if grid != table and self.resample == "none":
      found = f"{grid[0]}x{grid[1]} patches of {images.shape[1]}x{images.shape[2]} images"
      raise UserError(
        f"config.model.image_size={self.image_size}: the token layers mix {table[0]}x{table[1]} patches, found {found};"
        " use views of that size only (no local crops), or config.model.resample='bilinear', an approximation."
      )
    x = x.reshape(x.shape[0], -1, size.width).astype(jnp.float32)
    as_map = lambda x: x.reshape(x.shape[0], *grid, size.width)
    make = nn.remat(Block, static_argnums=(2,)) if self.remat == "full" else Block
    stages, hidden = [as_map(x)], round(size.width * self.mlp_ratio)
    for i in range(size.depth):
      x = make(hidden, table, grid, size.layer_scale, self.drop_path, self.dtype, name=f"block_{i}")(x, train)
      stages.append(as_map(x))
    tokens = Affine(self.dtype, name="norm")(x)
    pooled = jnp.mean(tokens.astype(jnp.float32), axis=1)
    return {"pooled": pooled, "tokens": tokens, "stages": tuple(stages)}
