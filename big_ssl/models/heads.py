"""Heads on top of a backbone: projection MLPs and linear classifiers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError, nearest
from big_ssl.models.layers import BatchNorm, torch_uniform
from big_ssl.ops.normalize import l2_normalize

ACTIVATIONS = ("gelu", "relu")


class ProjectionHead(nn.Module):
  """Linear, [BN], activation, ..., Linear, [BN]; the output is float32.

  MSN (arXiv 2204.07141, released code): hidden (2048, 2048), output 256, GELU, BN after the hidden layers.
  SimCLR (arXiv 2002.05709, official code): no biases, ReLU, BN everywhere, the last one without bias.

  Attributes:
    hidden: widths of the hidden layers; 0 is as wide as the input of the head.
    output: output width.
    activation: "gelu" (exact) or "relu".
    batch_norm: BN after each hidden linear layer.
    final_batch_norm: BN with scale but no bias after the last one; without `final_scale` it has neither (MoCo v3).
    use_bias: biases of the linear layers; without `final_bias` the last one has none in any case (BYOL).
    init_std: of the normal initialization; None is torch's default, uniform within +-1/sqrt(fan_in), biases too; "lecun"
      is a normal of 1/sqrt(fan_in) cut at two deviations (Haiku).
  """

  hidden: tuple[int, ...]
  output: int
  activation: str = "gelu"
  batch_norm: bool = True
  final_batch_norm: bool = False
  use_bias: bool = True
  init_std: float | str | None = 0.02
  dtype: str = "float32"
  final_scale: bool = True
  final_bias: bool = True

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, d] -> [N, output]."""
    if self.activation not in ACTIVATIONS:
      near = nearest(self.activation, ACTIVATIONS)
      raise UserError(f"activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}.{near}")
    features = x.shape[-1]
    for i, width in enumerate(self.hidden):
      x = self._dense(width or features, x.shape[-1], f"fc{i + 1}")(x)
      if self.batch_norm:
        x = BatchNorm(dtype=self.dtype, name=f"bn{i + 1}")(x, train=train)
      x = nn.relu(x) if self.activation == "relu" else nn.gelu(x, approximate=False)
    x = self._dense(self.output, x.shape[-1], f"fc{len(self.hidden) + 1}", bias=self.final_bias)(x)
    if self.final_batch_norm:
      x = BatchNorm(use_bias=False, use_scale=self.final_scale, name=f"bn{len(self.hidden) + 1}")(x, train=train)
    return x.astype(jnp.float32)

  def _dense(self, width: int, fan_in: int, name: str, *, bias: bool = True) -> nn.Dense:
    bias_init = nn.initializers.zeros
    if self.init_std is None:
      kernel = bias_init = torch_uniform(fan_in)
    elif self.init_std == "lecun":
      kernel = nn.initializers.truncated_normal(fan_in**-0.5)
    else:
      kernel = nn.initializers.normal(self.init_std)
    use_bias = self.use_bias and bias
    return nn.Dense(width, use_bias=use_bias, kernel_init=kernel, bias_init=bias_init, dtype=self.dtype, name=name)


class DINOHead(nn.Module):
  """MLP, l2 bottleneck, weight-normalized prototypes (DINO, arXiv 2104.14294, section 3.1 and App. C; public code).

    logit_k = g_k v_k . y / (|v_k| |y|),   y = MLP(x)

  Parameters {"mlp": a `ProjectionHead`, "last_layer": {"v": [K, bottleneck], "g": [K, 1]}}.

  Attributes:
    prototypes: K.
    hidden: width of the MLP.
    bottleneck: its output width.
    layers: linear layers of the MLP.
    batch_norm: BN after each hidden layer, for convolutional networks.
    fix_scale: g gets no gradient; it is 1 at the start.
  """

  prototypes: int
  hidden: int = 2048
  bottleneck: int = 256
  layers: int = 3
  batch_norm: bool = False
  fix_scale: bool = True
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, d] -> [N, K] float32 logits, accumulated in float32.

    Temperatures of a few hundredths multiply their errors: in float32 no shorter format is used for the product.
    """
    hidden = (self.hidden,) * (self.layers - 1)
    options = {"batch_norm": self.batch_norm, "dtype": self.dtype}
    mlp = ProjectionHead(hidden=hidden, output=self.bottleneck, **options, name="mlp")
    y = l2_normalize(mlp(x, train=train)).astype(self.dtype)
    weight = WeightNorm(self.prototypes, self.bottleneck, self.fix_scale, name="last_layer")()
    precision = jax.lax.Precision.HIGHEST if self.dtype == "float32" else None
    return jnp.matmul(y, weight.astype(self.dtype).T, precision=precision, preferred_element_type=jnp.float32)


class WeightNorm(nn.Module):
  """The rows g_k v_k / |v_k| (arXiv 1602.07868, eq. 2), [rows, width] float32; torch's default for v, g starts at 1."""

  rows: int
  width: int
  fix_scale: bool

  @nn.compact
  def __call__(self) -> Array:
    v = self.param("v", torch_uniform(self.width), (self.rows, self.width), jnp.float32)
    g = self.param("g", nn.initializers.ones, (self.rows, 1), jnp.float32)
    return (jax.lax.stop_gradient(g) if self.fix_scale else g) * l2_normalize(v)


class Linear(nn.Module):
  """A linear classifier in float32, N(0, 0.01) as in the field's probes."""

  output: int

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, d] -> [N, output]."""
    del train
    return nn.Dense(self.output, kernel_init=nn.initializers.normal(0.01), name="fc")(x.astype(jnp.float32))


class Classifier(nn.Module):
  """Linear, BN, ReLU for each of `hidden` (0 is as wide as the input), then a linear classifier, N(0, 0.01) or zero.

  The hidden layers are named and initialized as those of PAWS's projection head, which its fine-tuning keeps.

  Attributes:
    pre_logits: width of a linear layer with tanh before the classifier (arXiv 2010.11929, section 3.1); 0 has none.
    bias_init: where every bias of the classifier starts.
  """

  output: int
  hidden: tuple[int, ...] = ()
  zero_init: bool = False
  dtype: str = "float32"
  pre_logits: int = 0
  bias_init: float = 0.0

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, d] -> [N, output] float32."""
    for i, width in enumerate(self.hidden):
      init = torch_uniform(x.shape[-1])
      dense = nn.Dense(width or x.shape[-1], kernel_init=init, bias_init=init, dtype=self.dtype, name=f"fc{i + 1}")
      x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{i + 1}")(dense(x), train=train))
    if self.pre_logits:
      x = nn.tanh(nn.Dense(self.pre_logits, dtype=self.dtype, name="pre_logits")(x))
    init = nn.initializers.zeros if self.zero_init else nn.initializers.normal(0.01)
    bias_init = nn.initializers.constant(self.bias_init)
    return nn.Dense(self.output, kernel_init=init, bias_init=bias_init, name="fc")(x.astype(jnp.float32))


class LinearHeads(nn.Module):
  """H linear classifiers of the same input, in float32, N(0, 0.01) and zero bias (SeLa, arXiv 1911.05371)."""

  heads: int
  output: int

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, d] -> [N, H, output]."""
    del train
    shape = (self.heads, x.shape[-1], self.output)
    kernel = self.param("kernel", nn.initializers.normal(0.01), shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.heads, self.output), jnp.float32)
    return jnp.einsum("nd,hdk->nhk", x.astype(jnp.float32), kernel) + bias


class BottleneckPredictor(nn.Module):
  """PAWS's prediction head (arXiv 2104.13963, released code): BN, Linear D -> D/4, BN, ReLU, Linear D/4 -> D.

  torch's initialization; the output is float32.
  """

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    """x: [N, D] -> [N, D]; D is a multiple of 4."""
    width = x.shape[-1]
    if width % 4:
      raise UserError(f"config.method.output_dim={width}: the prediction head needs a multiple of 4.")
    inner, outer = torch_uniform(width), torch_uniform(width // 4)
    x = BatchNorm(name="bn1")(x, train=train)
    x = nn.Dense(width // 4, kernel_init=inner, bias_init=inner, name="fc1")(x)
    x = nn.relu(BatchNorm(name="bn2")(x, train=train))
    return nn.Dense(width, kernel_init=outer, bias_init=outer, name="fc2")(x)
