"""Layers shared by the backbones, with the numerics of the public releases."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, Size, UserError, sides
from big_ssl.models.patch_resize import resize_kernel


class Backbone(nn.Module):
  """The contract of a backbone: `__call__(images [N, H, W, C], *, train, ...) -> dict`.

  "pooled" [N, D] always; where the architecture has them "cls" [N, D], "tokens" [N, T, D], "cls_layers" [N, L, D],
  "stages".
  Parameters are float32; `dtype` is the compute dtype. Batch statistics live in the collection "batch_stats".
  """


def with_fields(model: Backbone, **fields: Any) -> Backbone:
  """The network with those of the fields that it has."""
  return model.clone(**{name: value for name, value in fields.items() if hasattr(model, name)})


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
  """torch's default for convolutions and linears: uniform within +-1/sqrt(fan_in)."""
  return uniform_within(fan_in**-0.5)


def uniform_within(bound: float) -> nn.initializers.Initializer:
  """Uniform within +-bound."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class LayerNorm(nn.Module):
  """Layer normalization with float32 statistics; the output has the compute dtype.

  The variance is the two-pass one, as in torch: E[x^2] - E[x]^2 cancels on tokens whose mean is far from 0.
  """

  epsilon: float = 1e-6
  dtype: str = "float32"
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    norm = nn.LayerNorm(
      epsilon=self.epsilon, dtype=jnp.float32, use_bias=self.use_bias, use_fast_variance=False, name="norm"
    )
    return norm(x).astype(self.dtype)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale, statistics in float32 (arXiv 1910.07467); the output has the compute dtype."""

  epsilon: float = 1e-6
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return nn.RMSNorm(epsilon=self.epsilon, dtype=jnp.float32, name="norm")(x).astype(self.dtype)


def make_norm(
  kind: str, *, epsilon: float, dtype: str, use_bias: bool = True, name: str | None = None
) -> LayerNorm | RMSNorm:
  """The normalization called "layernorm" or "rmsnorm"; the latter never has a bias."""
  if kind == "rmsnorm":
    return RMSNorm(epsilon, dtype, name=name)
  return LayerNorm(epsilon, dtype, use_bias, name=name)


def drop_path(x: Array, *, rate: float | Array, key: Array | None) -> Array:
  """Stochastic depth (arXiv 1603.09382): drops a residual branch per sample and scales the kept ones by 1 / keep.

  Args:
    x: [N, ...] residual branch.
    rate: probability of dropping; may be traced, so that depths of different rates are one compiled body.
    key: None keeps everything.
  """
  if key is None:
    return x
  keep = 1.0 - rate
  shape = (x.shape[0],) + (1,) * (x.ndim - 1)
  return x * (jax.random.bernoulli(key, keep, shape) / keep).astype(x.dtype)


class LayerScale(nn.Module):
  """A learned factor per channel on a residual branch (arXiv 2103.17239, section 3), `init` at the start."""

  init: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return x * self.param("scale", nn.initializers.constant(self.init), (x.shape[-1],), jnp.float32).astype(x.dtype)


class Mlp(nn.Module):
  """Dense, GELU, Dense; `gelu` is "exact" (torch) or "tanh" (big_vision)."""

  hidden: int
  gelu: str = "exact"
  dtype: str = "float32"
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init, bias_init=self.bias_init)
    h = nn.gelu(dense(self.hidden, name="fc1")(x), approximate=self.gelu == "tanh")
    return dense(x.shape[-1], name="fc2")(h)


class SwiGLU(nn.Module):
  """out(silu(gate(x)) * value(x)), `hidden` wide between (arXiv 2002.05202; DINOv2's MLP)."""

  hidden: int
  dtype: str = "float32"
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init, bias_init=self.bias_init)
    gated = nn.silu(dense(self.hidden, name="gate")(x)) * dense(self.hidden, name="value")(x)
    return dense(x.shape[-1], name="out")(gated)


class BatchNorm(nn.Module):
  """Batch normalization as torch runs it, over all axes but the last.

  Training normalizes by the biased variance of the global batch; the running variance keeps the UNBIASED one (linen's
  own layer keeps the biased one). Under jit the statistics are those of the global batch: synchronized BN by
  construction.

  Attributes:
    momentum: share of the running value that stays: torch's 0.1 is 0.9 here.
    groups: statistics per group of consecutive samples, for recipes with per-device statistics; running values take the
      mean over groups.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  use_scale: bool = True
  use_bias: bool = True
  groups: int = 1
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    features = x.shape[-1]
    mean_state = self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32)
    var_state = self.variable("batch_stats", "var", jnp.ones, (features,), jnp.float32)
    x = x.astype(jnp.float32)
    if train and not self.is_initializing():
      if x.shape[0] % self.groups:
        raise UserError(
          f"config.model.bn_groups={self.groups}: {x.shape[0]} samples do not divide into {self.groups} groups."
        )
      count = x.size // features // self.groups
      if count < 2:
        raise UserError("BatchNorm: needs more than one value per channel in training; raise config.batch_size.")
      grouped = x.reshape(self.groups, -1, features)
      mean = jnp.mean(grouped, axis=1)
      var = jnp.mean(jnp.square(grouped - mean[:, None]), axis=1)
      keep = lambda old, new: self.momentum * old + (1 - self.momentum) * jax.lax.stop_gradient(new)
      mean_state.value = keep(mean_state.value, jnp.mean(mean, axis=0))
      var_state.value = keep(var_state.value, jnp.mean(var, axis=0) * (count / (count - 1)))
      y = ((grouped - mean[:, None]) * jax.lax.rsqrt(var[:, None] + self.epsilon)).reshape(x.shape)
    else:
      y = (x - mean_state.value) * jax.lax.rsqrt(var_state.value + self.epsilon)
    if self.use_scale:
      y = y * self.param("scale", self.scale_init, (features,), jnp.float32)
    if self.use_bias:
      y = y + self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
    return y.astype(self.dtype)


class PatchConv(nn.Module):
  """The convolution of `PatchEmbed`; its kernel is stored at one patch size and runs at any (arXiv 2212.08013).

  Attributes:
    stored: height and width of the kernel parameter.
  """

  width: int
  stored: tuple[int, int]
  kernel_init: nn.initializers.Initializer
  bias_init: nn.initializers.Initializer
  dtype: str
  use_bias: bool = True

  @nn.compact
  def __call__(self, images: Array, *, patch: tuple[int, int]) -> Array:
    kernel = self.param("kernel", self.kernel_init, (*self.stored, images.shape[-1], self.width), jnp.float32)
    kernel = resize_kernel(kernel, size=patch, xp=jnp).astype(self.dtype)
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(images.astype(self.dtype), kernel, patch, "VALID", dimension_numbers=numbers)
    if not self.use_bias:
      return y
    return y + self.param("bias", self.bias_init, (self.width,), jnp.float32).astype(self.dtype)


class PatchEmbed(nn.Module):
  """VALID convolution with stride = patch; a right or bottom remainder is cut off. [N, H, W, C] -> [N, h, w, D].

  Attributes:
    patch: side (or height, width) of the stored kernel; a call may run it at another size, see `models/patch_resize.py`.
    init: "dino" and "dinov2", torch's uniform default for kernel and bias; "msn", Kaiming normal over fan-in and a zero
      bias; "loca" and "big_vision", LeCun normal and a zero bias, flax's default; "flexivit", N(0, 1/width) and a zero
      bias; "moco_v3", uniform within sqrt(6 / (values of a patch + width)) and a zero bias: Xavier over the linear map
      of a patch, not over the receptive field as is usual for convolutions.
    use_bias: whether the convolution has one.
  """

  width: int
  patch: Size
  init: str = "dino"
  dtype: str = "float32"
  use_bias: bool = True

  @nn.compact
  def __call__(self, images: Array, *, patch: tuple[int, int] | None = None) -> Array:
    """`patch`: height and width of the patches of this call; those of the stored kernel where None."""
    height, width, channels = images.shape[1:]
    stored = sides(self.patch)
    patch = patch or stored
    if height < patch[0] or width < patch[1]:
      size = patch[0] if patch[0] == patch[1] else patch
      raise UserError(f"config.model.patch={size}: the images are {height}x{width}, smaller than one patch.")
    values, zeros = channels * math.prod(stored), nn.initializers.zeros
    kernel_init, bias_init = {
      "msn": (nn.initializers.variance_scaling(2.0, "fan_in", "normal"), zeros),
      "loca": (nn.initializers.lecun_normal(), zeros),
      "big_vision": (nn.initializers.lecun_normal(), zeros),
      "flexivit": (nn.initializers.normal(self.width**-0.5), zeros),
      "moco_v3": (uniform_within(math.sqrt(6 / (values + self.width))), zeros),
    }.get(self.init, (torch_uniform(values), torch_uniform(values)))
    conv = PatchConv(self.width, stored, kernel_init, bias_init, self.dtype, self.use_bias, name="conv")
    return conv(images, patch=patch)


class ConvStem(nn.Module):
  """The convolutional stem of MSN and MoCo v3: 3x3 stride-2 convolutions with BN and ReLU, then 1x1 to the width.

  The stride of the whole is 2 ** len(channels).

  Attributes:
    init: "moco_v3" is torch's default; the others Kaiming normal over fan-in and a zero bias, as MSN.
  """

  width: int
  channels: tuple[int, ...]
  init: str = "msn"
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
    torch = self.init == "moco_v3"
    for i, features in enumerate(self.channels):
      x = nn.Conv(
        features,
        (3, 3),
        strides=(2, 2),
        padding=1,
        use_bias=False,
        kernel_init=torch_uniform(9 * x.shape[-1]) if torch else kaiming,
        dtype=self.dtype,
        name=f"conv_{i}",
      )(x)
      x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn_{i}")(x, train=train))
    uniform = torch_uniform(x.shape[-1])
    inits = {"kernel_init": uniform, "bias_init": uniform} if torch else {"kernel_init": kaiming}
    return nn.Conv(self.width, (1, 1), dtype=self.dtype, name="project", **inits)(x)


def check_last_map(model: nn.Module, images: Array) -> None:
  """Raises `UserError` for images whose last map is not the one that `model`'s first fully connected layer was made for."""
  height, width = images.shape[1:3]
  wanted, found = model.map_size(model.image_size), [max(model.map_size(side), 0) for side in (height, width)]
  path = f"config.model.image_size={model.image_size}"
  if wanted < 1:
    raise UserError(f"{path}: too small, no place is left of the last map.")
  if found != [wanted, wanted]:
    raise UserError(
      f"{path}: fc6 expects a last map of {wanted}x{wanted}; images of {height}x{width} give {found[0]}x{found[1]}."
    )


def check_images(model: nn.Module, images: Array, *, keep: Array | None = None, mask: Array | None = None) -> None:
  """Raises `UserError` for images of another number of channels than `model` has, and for `keep` and `mask`.

  For backbones that need all patches of an image, or have none.
  """
  if images.shape[-1] != model.channels:
    raise UserError(f"config.model.channels={model.channels}: the images have {images.shape[-1]} channels.")
  for name, value in (("keep", keep), ("mask", mask)):
    if value is not None:
      raise UserError(
        f"{name}: {type(model).__name__} reads all of an image, no patch can be left out; use a ViT, or a config.method"
        " without dropped or masked patches."
      )
