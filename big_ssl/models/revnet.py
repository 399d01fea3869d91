"""RevNet-50 of arXiv 1901.09005 (public code, TensorFlow): pre-activation units that can be run backward.

A unit takes the halves (x1, x2) of the channels to (x2, x1 + F(x2)), so that x2 and x1 = y - F(x2) follow from its
output (arXiv 1707.04585, eq. 8): the backward pass rebuilds activations instead of keeping them, and a network twice as
deep needs no more memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, Params, PyTree, UserError
from big_ssl.models.layers import Backbone, BatchNorm, check_images

Residual = Callable[[Params, PyTree, Array], tuple[Array, PyTree]]


class Bottleneck(nn.Module):
  """F: BN, ReLU, 1x1 to a quarter, BN, ReLU, 3x3, BN, ReLU, 1x1 back; BN as TensorFlow's layers are, epsilon 1e-3."""

  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    width, inner = x.shape[-1], x.shape[-1] // 4
    for i, (features, kernel) in enumerate(((inner, 1), (inner, 3), (width, 1)), 1):
      x = nn.relu(_norm(self.groups, self.dtype, name=f"bn{i}")(x, train=train))
      x = _conv(features, kernel, dtype=self.dtype, name=f"conv{i}")(x)
    return x


def _conv(features: int, kernel: int, *, stride: int = 1, dtype: str, name: str) -> nn.Conv:
  return nn.Conv(
    features,
    (kernel, kernel),
    strides=(stride, stride),
    padding=kernel // 2,
    use_bias=False,
    kernel_init=nn.initializers.glorot_uniform(),
    dtype=dtype,
    name=name,
  )


def _norm(groups: int, dtype: str, *, name: str) -> BatchNorm:
  return BatchNorm(momentum=0.99, epsilon=1e-3, groups=groups, dtype=dtype, name=name)


def units(residual: Residual, params: tuple[Params, ...], stats: tuple[PyTree, ...], x: Array) -> tuple[Array, tuple]:
  """Units one after the other: (x1, x2) -> (x2, x1 + F(x2)).

  Args:
    residual: (parameters, batch statistics, x2) -> (F(x2), batch statistics afterwards); a pure function.
    params, stats: one entry per unit.
    x: [N, h, w, C] float32, x1 in the first half of the channels.

  Returns:
    [N, h, w, C] and the statistics afterwards.
  """
  x1, x2 = jnp.split(x, 2, axis=-1)
  after = []
  for p, s in zip(params, stats, strict=True):
    y, updated = residual(p, s, x2)
    x1, x2 = x2, x1 + y.astype(x1.dtype)
    after.append(updated)
  return jnp.concatenate([x1, x2], axis=-1), tuple(after)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reversible_units(
  residual: Residual, params: tuple[Params, ...], stats: tuple[PyTree, ...], x: Array
) -> tuple[Array, tuple]:
  """`units`, but the backward pass gets their activations from the output; statistics have no gradient."""
  return units(residual, params, stats, x)


def _forward(residual: Residual, params: tuple, stats: tuple, x: Array) -> tuple[tuple[Array, tuple], tuple]:
  out, after = units(residual, params, stats, x)
  return (out, after), (params, stats, out)


def _backward(residual: Residual, kept: tuple, cotangents: tuple) -> tuple[tuple, tuple, Array]:
  params, stats, out = kept
  a, b = jnp.split(out, 2, axis=-1)
  da, db = jnp.split(cotangents[0], 2, axis=-1)
  gradients = []
  for p, s in zip(reversed(params), reversed(stats), strict=True):
    y, pull, _ = jax.vjp(lambda p, x, s=s: residual(p, s, x), p, a, has_aux=True)
    gradient, dx = pull(db.astype(y.dtype))
    a, b = b - y.astype(b.dtype), a
    da, db = db, da + dx
    # The barrier holds the units apart: without it the compiler may rebuild all of them first, and so store them all.
    (a, b, da, db, gradient) = jax.lax.optimization_barrier((a, b, da, db, gradient))
    gradients.append(gradient)
  return tuple(reversed(gradients)), jax.tree.map(jnp.zeros_like, stats), jnp.concatenate([da, db], axis=-1)


reversible_units.defvjp(_forward, _backward)


def inverse_units(residual: Residual, params: tuple[Params, ...], stats: tuple[PyTree, ...], out: Array) -> Array:
  """The input of `units` from its output."""
  a, b = jnp.split(out, 2, axis=-1)
  for p, s in zip(reversed(params), reversed(stats), strict=True):
    a, b = b - residual(p, s, a)[0].astype(b.dtype), a
  return jnp.concatenate([a, b], axis=-1)


class RevNet(Backbone):
  """A reversible network; the features of its four stages are 64 k, 128 k, 256 k and 512 k wide, "pooled" the last.

  Attributes:
    filters_factor: k; 4 is the ordinary width, 8, 12 and 16 the paper's wider ones.
    blocks: units per stage; (3, 4, 6, 3) is RevNet-50.
    last_relu: after the final BN; the paper's "(-)" variants have none.
    root_stride: of the 7x7 convolution; 1 for the tasks on patches of 64 pixels. A 3x3 stride-2 max pool follows.
    strides: of the average pools before stages 2, 3 and 4; (2, 2, 1) for the tasks on patches.
    reversible: rebuild activations in the backward pass; False stores them, with the same result within rounding.
    bn_groups: groups with own BN statistics; 1 is the global batch.
    channels: of the images.
    dtype: compute dtype of the residual functions; parameters and the stream, which has to be inverted, are float32.
  """

  filters_factor: float = 4.0
  blocks: tuple[int, ...] = (3, 4, 6, 3)
  last_relu: bool = True
  root_stride: Literal[1, 2] = 2
  strides: tuple[int, ...] = (2, 2, 2)
  reversible: bool = True
  bn_groups: int = 1
  channels: int = 3
  dtype: Literal["float32", "bfloat16"] = "float32"

  def width(self) -> int:
    """Channels of the root and of stage 1.

    Raises:
      UserError: a factor that gives no bottleneck, or blocks and strides that do not fit.
    """
    if self.filters_factor * 8 < 1 or (self.filters_factor * 8) % 1:
      raise UserError(
        f"config.model.filters_factor={self.filters_factor}: expected a multiple of 1/8; 4 is the usual width."
      )
    if not self.blocks or min(self.blocks) < 1:
      raise UserError(f"config.model.blocks={self.blocks}: expected units per stage, at least 1 each.")
    if len(self.strides) != len(self.blocks) - 1 or min((1, *self.strides)) < 1:
      raise UserError(
        f"config.model.strides={self.strides}: expected {len(self.blocks) - 1}, before each stage but the first."
      )
    return round(64 * self.filters_factor)

  @nn.compact
  def __call__(
    self, images: Array, *, train: bool, keep: Array | None = None, mask: Array | None = None
  ) -> dict[str, Array]:
    """images: [N, H, W, C] -> "pooled" [N, D], "tokens" [N, h*w, D], "stages": the root's map and those of the stages.

    Stages are before the final BN, "pooled" and "tokens" after it; `keep` and `mask` must be None.

    Raises:
      UserError: fields or channels that do not fit.
    """
    width = self.width()
    check_images(self, images, keep=keep, mask=mask)
    x = _conv(width, 7, stride=self.root_stride, dtype=self.dtype, name="conv1")(images).astype(jnp.float32)
    # Zeros around the map, which win over negative values: there is no ReLU before.
    x = nn.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (2, 2), "VALID")
    stages = [x]
    for stage, count in enumerate(self.blocks):
      if stage:
        x = _shrink(x, self.strides[stage - 1])
      x = self._stage(x, [f"layer{stage + 1}_{i}" for i in range(count)], train=train)
      stages.append(x)
    x = _norm(self.bn_groups, "float32", name="bn1")(x, train=train)
    x = nn.relu(x) if self.last_relu else x
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    return {"pooled": jnp.mean(tokens, axis=1), "tokens": tokens, "stages": tuple(stages)}

  def _stage(self, x: Array, names: list[str], *, train: bool) -> Array:
    if self.is_initializing():
      for name in names:
        Bottleneck(self.bn_groups, self.dtype, name=name)(x[..., : x.shape[-1] // 2], train=False)
    params, stats = (tuple(self.variables[kind][name] for name in names) for kind in ("params", "batch_stats"))
    module, moves = Bottleneck(self.bn_groups, self.dtype, parent=None), train and not self.is_initializing()

    def residual(p: Params, s: PyTree, x: Array) -> tuple[Array, PyTree]:
      tree = {"params": p, "batch_stats": s}
      if not moves:
        return module.apply(tree, x, train=False), s
      y, updated = module.apply(tree, x, train=True, mutable=["batch_stats"])
      return y, updated["batch_stats"]

    x, after = (reversible_units if self.reversible else units)(residual, params, stats, x)
    if moves:
      for name, updated in zip(names, after, strict=True):
        self.put_variable("batch_stats", name, updated)
    return x


def _shrink(x: Array, stride: int) -> Array:
  """Average pool, an odd side is rounded up with the mean of what there is; twice the channels, zeros on both sides."""
  if stride > 1:
    size = (stride, stride)
    x = nn.avg_pool(x, size, size, "SAME", count_include_pad=False)
  half = x.shape[-1] // 2
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (half, x.shape[-1] - half)))
