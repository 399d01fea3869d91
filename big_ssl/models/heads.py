"""Heads on top of a backbone: projection MLPs and linear classifiers."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError, nearest
from big_ssl.models.layers import BatchNorm, torch_uniform

ACTIVATIONS = ("gelu", "relu")


class ProjectionHead(nn.Module):
  """Linear, [BN], activation, ..., Linear, [BN]; the output is float32.

  MSN (arXiv 2204.07141, released code): hidden (2048, 2048), output 256, GELU, BN after the hidden layers.
  SimCLR (arXiv 2002.05709, official code): no biases, ReLU, BN everywhere, the last one without bias.

  Attributes:
    hidden: widths of the hidden layers.
    output: output width.
    activation: "gelu" (exact) or "relu".
    batch_norm: BN after each hidden linear layer.
    final_batch_norm: BN with scale but no bias after the last one.
    use_bias: biases of the linear layers.
    init_std: of the normal initialization; None is torch's default, uniform within +-1/sqrt(fan_in), biases too.
  """

  hidden: tuple[int, ...]
  output: int
  activation: str = "gelu"
  batch_norm: bool = True
  final_batch_norm: bool = False
  use_bias: bool = True
  init_std: float | None = 0.02
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, d] -> [N, output]."""
    if self.activation not in ACTIVATIONS:
      near = nearest(self.activation, ACTIVATIONS)
      raise UserError(f"activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}.{near}")
    for i, width in enumerate(self.hidden):
      x = self._dense(width, x.shape[-1], f"fc{i + 1}")(x)
      if self.batch_norm:
        x = BatchNorm(dtype=self.dtype, name=f"bn{i + 1}")(x, train=train)
      x = nn.relu(x) if self.activation == "relu" else nn.gelu(x, approximate=False)
    x = self._dense(self.output, x.shape[-1], f"fc{len(self.hidden) + 1}")(x)
    if self.final_batch_norm:
      x = BatchNorm(use_bias=False, name=f"bn{len(self.hidden) + 1}")(x, train=train)
    return x.astype(jnp.float32)

  def _dense(self, width: int, fan_in: int, name: str) -> nn.Dense:
    kernel, bias = nn.initializers.normal(self.init_std or 0.0), nn.initializers.zeros
    if self.init_std is None:
      kernel = bias = torch_uniform(fan_in)
    return nn.Dense(width, use_bias=self.use_bias, kernel_init=kernel, bias_init=bias, dtype=self.dtype, name=name)


class Linear(nn.Module):
  """A linear classifier in float32, N(0, 0.01) as in the field's probes."""

  output: int

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, d] -> [N, output]."""
    del train
    return nn.Dense(self.output, kernel_init=nn.initializers.normal(0.01), name="fc")(x.astype(jnp.float32))
