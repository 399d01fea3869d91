"""Multi-head attention: one entry point, the fastest kernel that computes the same thing."""

from __future__ import annotations

import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.models.layers import make_norm


@functools.cache
def cudnn_works(tokens: tuple[int, int], width: int, dtype: str, masked: bool) -> bool:
  """Whether cuDNN's fused attention and its gradient compile here for these shapes.

  Compiled ahead of time from shapes alone: attention is called while an outer function is traced, where running a trial
  would only add it to that trace, and its failure would come when the user's step is compiled.

  Args:
    tokens: of the queries and of the keys; support depends on them, the head width and the mask, not on batch or heads.
    width: of a head.
    dtype: of the queries.
  """
  if jax.default_backend() != "gpu":
    return False
  q, k = (jax.ShapeDtypeStruct((1, n, 1, width), dtype) for n in tokens)
  mask = jax.ShapeDtypeStruct((1, 1, *tokens), bool) if masked else None

  def total(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    return jnp.sum(of_even_length(q, k, v, mask=mask, implementation="cudnn").astype(jnp.float32))

  try:
    jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2))).lower(q, k, k, mask).compile()
  except (RuntimeError, ValueError, NotImplementedError):
    return False
  return True


def segment_mask(segments: Array, *, context: Array | None = None) -> Array:
  """Who sees whom in packed sequences: tokens of the same segment (arXiv 2307.06304, section 3.1).

  Padding (a negative number) sees padding, so that no row of the softmax is empty; nobody else sees it.

  Args:
    segments: [B, T] integers, of the queries.
    context: [B, S] of the keys; `segments` where None.

  Returns:
    bool [B, 1, T, S].
  """
  context = segments if context is None else context
  return (jnp.maximum(segments, -1)[:, :, None] == jnp.maximum(context, -1)[:, None, :])[:, None]


def attention(q: Array, k: Array, v: Array, *, mask: Array | None = None) -> Array:
  """softmax(q k^T / sqrt(d)) v; [B, T, N, d] each, softmax in float32.

  cuDNN's fused kernel where it takes these shapes, else XLA's; the same numbers within the rounding of the dtype.

  Args:
    mask: bool, broadcastable to [B, N, T, S]; False is not attended. For packed sequences see `segment_mask`.
  """
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  fused = half and cudnn_works((q.shape[1], k.shape[1]), q.shape[-1], q.dtype.name, mask is not None)
  if mask is not None:
    mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
  if fused:
    return of_even_length(q, k, v, mask=mask, implementation="cudnn")
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def of_even_length(q: Array, k: Array, v: Array, *, mask: Array | None, implementation: Literal["cudnn", "xla"]) -> Array:
  """`attention` by way of even numbers of queries and keys: cuDNN's gradient takes no others, and 14 x 14 patches with a class
  token are 197. What is added is seen by nobody and cut off again.

  Args:
    mask: bool [B, N, T, S] or None.
  """
  queries, keys = q.shape[1], k.shape[1]
  longer = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
  lengths = {}
  if mask is not None:
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, queries % 2), (0, keys % 2)))
  elif queries % 2 or keys % 2:
    whole = lambda n: jnp.full(q.shape[0], n, jnp.int32)
    lengths = {"query_seq_lengths": whole(queries), "key_value_seq_lengths": whole(keys)}
  out = jax.nn.dot_product_attention(longer(q), longer(k), longer(v), mask=mask, implementation=implementation, **lengths)
  return out[:, :queries]


def attention_weights(q: Array, k: Array, *, mask: Array | None = None) -> Array:
  """The probabilities of `attention`, [B, N, T, S] float32."""
  logits = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


class MultiHeadAttention(nn.Module):
  """Self- or cross-attention with separate query, key, value and out projections.

  The projections are separate so that each is split by heads over devices (`core.config.TRANSFORMER_RULES`).

  Attributes:
    heads: number of heads; the width must be a multiple.
    dtype: compute dtype; parameters are float32.
    qkv_bias, out_bias: whether query, key and value, or out, have biases.
    qk_norm: "layernorm" or "rmsnorm" of queries and keys over the width of a head, one scale for all heads, before the
      1 / sqrt(d) (arXiv 2302.05442, section 2); its epsilon and whether it has a bias are `epsilon` and `norm_bias`.
  """

  heads: int
  dtype: str = "float32"
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  qkv_bias: bool = True
  out_bias: bool = True
  qk_norm: Literal["none", "layernorm", "rmsnorm"] = "none"
  epsilon: float = 1e-6
  norm_bias: bool = True

  @nn.compact
  def __call__(
    self,
    x: Array,
    *,
    context: Array | None = None,
    mask: Array | None = None,
    return_weights: bool = False,
  ) -> tuple[Array, Array | None]:
    """x: [B, T, D], context [B, S, D] gives keys and values, x where None -> ([B, T, D], [B, N, T, S] or None)."""
    width = x.shape[-1]
    if width % self.heads:
      raise UserError(f"config.model.heads={self.heads}: must divide the width {width}.")
    context = x if context is None else context
    project = functools.partial(nn.DenseGeneral, dtype=self.dtype, kernel_init=self.kernel_init)
    split = functools.partial(project, (self.heads, width // self.heads), use_bias=self.qkv_bias)
    q, k, v = split(name="query")(x), split(name="key")(context), split(name="value")(context)
    if self.qk_norm != "none":
      norm = functools.partial(make_norm, self.qk_norm, epsilon=self.epsilon, use_bias=self.norm_bias, dtype=self.dtype)
      q, k = norm(name="query_norm")(q), norm(name="key_norm")(k)
    out = attention(q, k, v, mask=mask)
    weights = attention_weights(q, k, mask=mask) if return_weights else None
    return project(width, axis=(-2, -1), use_bias=self.out_bias, name="out")(out), weights
