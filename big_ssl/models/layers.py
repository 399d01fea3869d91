"""Layers shared by the backbones, with the numerics of the public releases."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError


class Backbone(nn.Module):
  """The contract of a backbone: `__call__(images [N, H, W, C], *, train, ...) -> dict`.

  "pooled" [N, D] always; where the architecture has them "cls" [N, D], "tokens" [N, T, D], "cls_layers" [N, L, D],
  "stages".
  Parameters are float32; `dtype` is the compute dtype. Batch statistics live in the collection "batch_stats".
  """


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
  """torch's default for convolutions and linears: uniform within +-1/sqrt(fan_in)."""
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class LayerNorm(nn.Module):
  """Layer normalization with float32 statistics; the output has the compute dtype.

  The variance is the two-pass one, as in torch: E[x^2] - E[x]^2 cancels on tokens whose mean is far from 0.
  """

  epsilon: float = 1e-6
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return nn.LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, use_fast_variance=False, name="norm")(x).astype(
      self.dtype
    )


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


class PatchEmbed(nn.Module):
  """VALID convolution with stride = patch; a right or bottom remainder is cut off. [N, H, W, C] -> [N, h, w, D].

  Attributes:
    init: "dino", torch's uniform default for kernel and bias; "msn", Kaiming normal over fan-in and a zero bias; "loca",
      LeCun normal and a zero bias, flax's default; "moco_v3", uniform within sqrt(6 / (values of a patch + width)) and a
      zero bias: Xavier over the linear map of a patch, not over the receptive field as is usual for convolutions.
  """

  width: int
  patch: int
  init: str = "dino"
  dtype: str = "float32"

  @nn.compact
  def __call__(self, images: Array) -> Array:
    height, width, channels = images.shape[1:]
    if min(height, width) < self.patch:
      raise UserError(f"config.model.patch={self.patch}: the images are {height}x{width}, smaller than one patch.")
    uniform = torch_uniform(channels * self.patch**2)
    inits: dict[str, Any] = {"kernel_init": uniform, "bias_init": uniform}
    if self.init == "msn":
      inits = {"kernel_init": nn.initializers.variance_scaling(2.0, "fan_in", "normal")}
    elif self.init == "loca":
      inits = {"kernel_init": nn.initializers.lecun_normal()}
    elif self.init == "moco_v3":
      bound = math.sqrt(6 / (channels * self.patch**2 + self.width))
      inits = {"kernel_init": lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)}
    size = (self.patch, self.patch)
    return nn.Conv(self.width, size, strides=size, padding="VALID", dtype=self.dtype, name="conv", **inits)(images)


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
