"""LOCA's heads on patch tokens (arXiv 2212.02400; released code): clusters, and positions by cross-attention."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array
from big_ssl.models.attention import MultiHeadAttention
from big_ssl.models.layers import LayerNorm, Mlp
from big_ssl.ops.normalize import l2_normalize


class ClusterHead(nn.Module):
  """Dense, GELU, Dense, GELU, Dense, l2: cosines to the columns of "prototypes/kernel" [output, K]; float32, no BN.

  The columns are normalized inside, so that gradients see it; initializations are flax's, LeCun normal and zeros.

  Attributes:
    prototypes: K.
    hidden: widths of the hidden layers.
    output: width of the bottleneck.
  """

  prototypes: int
  hidden: tuple[int, ...] = (2048, 2048)
  output: int = 256

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [..., d] -> [..., K] in [-1, 1]."""
    del train
    x = x.astype(jnp.float32)
    for i, width in enumerate(self.hidden):
      x = nn.gelu(nn.Dense(width, name=f"fc{i + 1}")(x), approximate=True)
    x = l2_normalize(nn.Dense(self.output, name=f"fc{len(self.hidden) + 1}")(x))
    return UnitColumns(self.prototypes, name="prototypes")(x)


class UnitColumns(nn.Module):
  """x W with the columns of W at length 1, no bias; [..., d] -> [..., columns]."""

  columns: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def unit(key: Array, shape: tuple[int, int]) -> Array:
      return l2_normalize(nn.initializers.lecun_normal()(key, shape), axis=0)

    kernel = self.param("kernel", unit, (x.shape[-1], self.columns))
    return jnp.matmul(x, l2_normalize(kernel, axis=0), precision=jax.lax.Precision.HIGHEST)


class PositionHead(nn.Module):
  """Which reference position is each query token from? One pre-norm cross-attention block, LayerNorm, Dense.

  Queries and reference have their own LayerNorms; there is no stochastic depth. Initializations as in the encoder.

  Attributes:
    positions: classes.
    heads, mlp_dim: of the block, the encoder's.
    epsilon: of the LayerNorms.
    dtype: compute dtype; the logits are float32.
  """

  positions: int
  heads: int
  mlp_dim: int
  epsilon: float = 1e-6
  dtype: str = "float32"

  @nn.compact
  def __call__(self, queries: Array, reference: Array) -> Array:
    """queries: [B, M, D], reference: [B, R, D], the visible tokens -> [B, M, positions]."""
    xavier, tiny = nn.initializers.xavier_uniform(), nn.initializers.normal(1e-6)
    x = queries.astype(self.dtype)
    y = LayerNorm(self.epsilon, self.dtype, name="norm_query")(x)
    context = LayerNorm(self.epsilon, self.dtype, name="norm_reference")(reference.astype(self.dtype))
    attend = MultiHeadAttention(self.heads, dtype=self.dtype, kernel_init=xavier, name="attention")
    x = x + attend(y, context=context)[0]
    y = LayerNorm(self.epsilon, self.dtype, name="norm_mlp")(x)
    x = x + Mlp(self.mlp_dim, gelu="tanh", dtype=self.dtype, kernel_init=xavier, bias_init=tiny, name="mlp")(y)
    x = LayerNorm(self.epsilon, name="norm")(x)
    return nn.Dense(self.positions, name="predictor")(x)
