"""Contrastive losses over the global batch."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.ops.normalize import l2_normalize


@flax.struct.dataclass
class NTXent:
  """Value of `nt_xent`.

  Attributes:
    loss: scalar.
    per_anchor: [2B], unscaled.
    accuracy: share of all anchors whose positive is the most similar of the 2B - 1 others.
  """

  loss: Array
  per_anchor: Array
  accuracy: Array


def nt_xent(z: Array, *, temperature: float | Array, loss_scale: float = 1.0) -> NTXent:
  """The normalized temperature-scaled cross-entropy of SimCLR (arXiv 2002.05709, eq. 1).

    l_i = logsumexp_{j != i} s_ij - s_{i,p(i)},   s_ij = cos(z_i, z_j) / temperature,   p(i) = (i + B) mod 2B

  Gradients flow through both sides of s, and under jit over a mesh all 2B - 2 negatives of the global batch take part.
  Memory is 4 (2B)^2 bytes for the similarities, spread over the devices.

  Args:
    z: [2B, D] embeddings of any length; rows 0 ... B-1 are view 1, rows B ... 2B-1 view 2 of the same images.
    temperature: positive.
    loss_scale: 1 is the paper's mean over all anchors; 2 the official code's sum of the means of both views.

  Raises:
    UserError: one image only, which has no negatives.
    ValueError: an odd number of rows.
  """
  rows = z.shape[0]
  if rows % 2:
    raise ValueError(f"nt_xent: {rows} rows cannot be two views of each image")
  if rows < 4:
    raise UserError(f"config.batch_size={rows // 2}: a contrastive loss needs at least 2 images, for negatives.")
  z = l2_normalize(z)
  s = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature  # [2B, 2B]
  positive = jnp.sum(z * jnp.roll(z, rows // 2, axis=0), axis=-1) / temperature  # [2B]
  anchor = jnp.arange(rows)
  s = jnp.where(anchor[:, None] == anchor[None, :], -jnp.inf, s)
  per_anchor = jax.nn.logsumexp(s, axis=-1) - positive
  hits = jnp.argmax(s, axis=-1) == (anchor + rows // 2) % rows
  return NTXent(
    loss=loss_scale * jnp.mean(per_anchor), per_anchor=per_anchor, accuracy=jnp.mean(hits, dtype=jnp.float32)
  )


@flax.struct.dataclass
class InfoNCE:
  """Value of `queue_nce` and `batch_nce`.

  Attributes:
    loss: scalar in nats, times the scale where there is one.
    logits: [B, candidates] cosine / temperature.
    accuracy: share of queries whose positive has the largest logit.
  """

  loss: Array
  logits: Array
  accuracy: Array


def queue_nce(queries: Array, keys: Array, *, queue: Array, temperature: float | Array) -> InfoNCE:
  """InfoNCE against a queue of earlier keys (MoCo, arXiv 1911.05722, eq. 1 and Algorithm 1).

    l_i = -log exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_j exp(q_i . queue_j / T))

  Keys and queue carry no gradient. Queries and keys are normalized here, the queue holds unit rows already; the queue
  is the one from before these keys are put into it.

  Args:
    queries: [B, D], any length.
    keys: [B, D] of the same images, any length.
    queue: [K, D] unit rows.
    temperature: T.

  Returns:
    Logits [B, 1 + K], the positive first.
  """
  q, k = l2_normalize(queries), jax.lax.stop_gradient(l2_normalize(keys))
  positive = jnp.sum(q * k, axis=-1, keepdims=True)  # [B, 1]
  negative = jnp.matmul(q, jax.lax.stop_gradient(queue).T, precision=jax.lax.Precision.HIGHEST)  # [B, K]
  logits = jnp.concatenate([positive, negative], axis=-1) / temperature
  return _info_nce(logits, labels=jnp.zeros(len(q), jnp.int32))


def batch_nce(queries: Array, keys: Array, *, temperature: float | Array, loss_scale: float | Array = 1.0) -> InfoNCE:
  """InfoNCE of each query among the keys of the batch (MoCo v3, arXiv 2104.02057, Algorithm 1).

    l_i = -scale log exp(q_i . k_i / T) / sum_j exp(q_i . k_j / T)

  Keys carry no gradient. Under jit over a mesh they are those of the global batch.

  Args:
    queries: [B, D], any length; row i belongs to keys[i].
    keys: [B, D], any length.
    temperature: T.
    loss_scale: 2 T in MoCo v3, which keeps the size of the gradient whatever T is.

  Raises:
    UserError: one image only, which has no negatives.
  """
  if keys.shape[0] < 2:
    raise UserError(f"config.batch_size={keys.shape[0]}: a contrastive loss needs at least 2 images, for negatives.")
  q, k = l2_normalize(queries), jax.lax.stop_gradient(l2_normalize(keys))
  logits = jnp.matmul(q, k.T, precision=jax.lax.Precision.HIGHEST) / temperature  # [B, B]
  return _info_nce(logits, labels=jnp.arange(len(q)), scale=loss_scale)


def _info_nce(logits: Array, *, labels: Array, scale: float | Array = 1.0) -> InfoNCE:
  hit = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
  loss = scale * jnp.mean(jax.nn.logsumexp(logits, axis=-1) - hit)
  # A tie is not a hit: embeddings that are all equal find nothing.
  others = jnp.where(jnp.arange(logits.shape[-1]) == labels[:, None], -jnp.inf, logits)
  accuracy = jnp.mean(hit > jnp.max(others, axis=-1), dtype=jnp.float32)
  return InfoNCE(loss=loss, logits=logits, accuracy=accuracy)
