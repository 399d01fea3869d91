"""What a Vision Transformer is made of: sizes, blocks, pooling by attention, initial values, selection of patches."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.models.attention import MultiHeadAttention
from big_ssl.models.layers import LayerNorm, LayerScale, Mlp, RMSNorm, SwiGLU, drop_path, make_norm
from big_ssl.ops.sharded import over_devices


@dataclasses.dataclass(frozen=True)
class Size:
  """width, depth, MLP width and heads."""

  width: int
  depth: int
  mlp_dim: int
  heads: int


# arXiv 2010.11929, Table 1; 2106.04560, Table 2; 2302.05442, Table 1; big_vision; giant2 is DINOv2's, to be used with
# mlp="swiglu" (2304.07193, Table 17).
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
  "g-opt": Size(1536, 40, 6144, 16),
  "giant2": Size(1536, 40, 4096, 24),
  "G": Size(1664, 48, 8192, 16),
  "G-opt": Size(1536, 48, 8192, 16),
  "e": Size(1792, 56, 15360, 16),
  "22B": Size(6144, 48, 24576, 48),
}


@dataclasses.dataclass(frozen=True)
class Initializers:
  """Initial values that differ between the releases; those of the patch embedding are in `layers.PatchEmbed`."""

  kernel: nn.initializers.Initializer  # of attention and MLP
  bias: nn.initializers.Initializer  # of the MLP
  cls: nn.initializers.Initializer
  positions: nn.initializers.Initializer


def initializers(init: str, *, width: int) -> Initializers:
  """The initial values called `init`, the ViT's `patch_init`.

  Query, key and value are separate kernels of fan-out `width`, so that Xavier's bound is MoCo v3's for its fused one.
  """
  normal, tiny, zeros = nn.initializers.normal(0.02), nn.initializers.normal(1e-6), nn.initializers.zeros
  xavier, spread = nn.initializers.xavier_uniform(), nn.initializers.normal(width**-0.5)
  return {
    "dinov2": Initializers(normal, zeros, tiny, normal),
    "loca": Initializers(xavier, tiny, normal, spread),
    "big_vision": Initializers(xavier, tiny, zeros, spread),
    "flexivit": Initializers(xavier, tiny, zeros, spread),
    "moco_v3": Initializers(xavier, zeros, tiny, normal),
  }.get(init, Initializers(normal, zeros, normal, normal))


class Block(nn.Module):
  """x += drop_path(scale attention(norm x)); x += drop_path(scale mlp(norm x)); without LayerScale the scale is 1.

  The fields are those of `models.vit.ViT`; `init` is its `patch_init`.
  """

  heads: int
  mlp_dim: int
  epsilon: float = 1e-6
  gelu: str = "exact"
  dtype: str = "float32"
  layer_scale: float | None = None
  init: str = "dino"
  mlp: str = "gelu"
  norm: str = "layernorm"
  norm_bias: bool = True
  qkv_bias: bool = True
  qk_norm: str = "none"

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
    y, weights = self._attention(x.shape[-1])(self._norm("norm1")(x), mask=mask, return_weights=return_weights)
    x = x + drop_path(self._scaled(y, "ls1"), rate=rate, key=keys[0])
    y = self._mlp(x.shape[-1])(self._norm("norm2")(x))
    return x + drop_path(self._scaled(y, "ls2"), rate=rate, key=keys[1]), weights

  def _norm(self, name: str) -> LayerNorm | RMSNorm:
    return make_norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, use_bias=self.norm_bias, name=name)

  def _attention(self, width: int) -> MultiHeadAttention:
    return MultiHeadAttention(
      self.heads,
      dtype=self.dtype,
      kernel_init=initializers(self.init, width=width).kernel,
      qkv_bias=self.qkv_bias,
      qk_norm=self.qk_norm,
      epsilon=self.epsilon,
      norm_bias=self.norm_bias,
      name="attention",
    )

  def _mlp(self, width: int) -> Mlp | SwiGLU:
    inits = initializers(self.init, width=width)
    make = SwiGLU if self.mlp == "swiglu" else functools.partial(Mlp, gelu=self.gelu)
    return make(self.mlp_dim, dtype=self.dtype, kernel_init=inits.kernel, bias_init=inits.bias, name="mlp")

  def _scaled(self, y: Array, name: str) -> Array:
    return y if self.layer_scale is None else LayerScale(self.layer_scale, name=name)(y)


class ParallelBlock(Block):
  """x += drop_path(scale (attention(y) + mlp(y))) with y = norm x (ViT-22B, arXiv 2302.05442, section 2).

  The paper multiplies y by one matrix for MLP, queries, keys and values; here these are kernels of their own, so that
  each is split over devices along its own heads or hidden channels.
  """

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
    y = self._norm("norm")(x)
    attended, weights = self._attention(x.shape[-1])(y, mask=mask, return_weights=return_weights)
    y = self._scaled(attended + self._mlp(x.shape[-1])(y), "ls")
    return x + drop_path(y, rate=rate, key=key), weights


BLOCKS = {"sequential": Block, "parallel": ParallelBlock}


class MapHead(nn.Module):
  """Pooling by attention (arXiv 2106.04560, section 3.3): y = attention(probe, tokens); y + mlp(norm y).

  There is no residual from the probe (public code). The fields are those of `models.vit.ViT`.
  """

  heads: int
  mlp_dim: int
  epsilon: float = 1e-6
  gelu: str = "exact"
  dtype: str = "float32"
  init: str = "dino"
  norm: str = "layernorm"
  norm_bias: bool = True

  @nn.compact
  def __call__(self, tokens: Array, *, mask: Array | None = None) -> Array:
    """tokens [N, T, D] -> [N, D]; mask: bool, broadcastable to [N, heads, 1, T]; False is not pooled."""
    width = tokens.shape[-1]
    inits = initializers(self.init, width=width)
    # [1, 1, D]: big_vision's Xavier over these axes, timm's N(0, 1/D); both are about 1/sqrt(D) wide.
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width), jnp.float32)
    probe = jnp.broadcast_to(probe.astype(self.dtype), (tokens.shape[0], 1, width))
    attend = MultiHeadAttention(self.heads, dtype=self.dtype, kernel_init=inits.kernel, name="attention")
    y, _ = attend(over_devices(probe), context=tokens, mask=mask)
    mlp = Mlp(
      self.mlp_dim,
      gelu=self.gelu,
      dtype=self.dtype,
      kernel_init=inits.kernel,
      bias_init=inits.bias,
      name="mlp",
    )
    norm = make_norm(self.norm, epsilon=self.epsilon, dtype=self.dtype, use_bias=self.norm_bias, name="norm")
    y = over_devices(y)  # one token per image: the compiler would rather split its channels
    return over_devices(y + mlp(norm(y)))[:, 0]


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
