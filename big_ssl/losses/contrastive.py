"""Contrastive losses over the global batch."""

from __future__ import annotations

import functools
from typing import Literal

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
    cross_accuracy: share of the anchors of view 1 whose positive is the most similar of view 2 alone: the official
      code's number.
  """

  loss: Array
  per_anchor: Array
  accuracy: Array
  cross_accuracy: Array


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
  cross = jnp.argmax(s[: rows // 2, rows // 2 :], axis=-1) == jnp.arange(rows // 2)
  return NTXent(
    loss=loss_scale * jnp.mean(per_anchor),
    per_anchor=per_anchor,
    accuracy=jnp.mean(hits, dtype=jnp.float32),
    cross_accuracy=jnp.mean(cross, dtype=jnp.float32),
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


@flax.struct.dataclass
class PairLoss:
  """Value of `pair_loss`.

  Attributes:
    loss: scalar in nats, the mean over the valid pairs.
    accuracy: share of the valid rows of `a` whose partner has the largest logit, ties lost.
    count: valid pairs.
  """

  loss: Array
  accuracy: Array
  count: Array


def pair_loss(
  a: Array,
  b: Array,
  *,
  scale: float | Array,
  bias: float | Array = 0.0,
  kind: Literal["softmax", "sigmoid"] = "softmax",
  valid: Array | None = None,
  chunk: int = 0,
) -> PairLoss:
  """Contrastive loss of two sets of embeddings of the same examples, in chunks of columns.

    l_ij = scale cos(a_i, b_j) + bias
    softmax: mean_i (logsumexp_j l_ij + logsumexp_j l_ji) / 2 - l_ii       (CLIP, arXiv 2103.00020, figure 3)
    sigmoid: mean_i sum_j -log sigmoid(y_ij l_ij),  y = 1 on the diagonal, -1 elsewhere    (arXiv 2303.15343, eq. 1)

  The [N, N] logits never exist: a chunk of columns at a time is computed, added to running sums (row maxima and sums of
  exponentials; arXiv 2307.06304, section 2.2), and computed again in the backward pass. Memory is 4 N chunk bytes, the rows
  spread over the devices, and 8 N^2 / chunk for the running sums that the backward pass needs. The value is that of one
  chunk but for rounding; under jit over a mesh all pairs of the global batch take part.

  Args:
    a, b: [N, D] of any length; rows of the same number belong together.
    scale: inverse temperature, above 0.
    bias: of the sigmoid; the softmax does not see it.
    valid: [N] bool; False takes a row out of both sets, as padding does. None is all.
    chunk: columns at a time; 0 is all.

  Raises:
    ValueError: sets of different shapes, an unknown kind, or a negative chunk.
  """
  if a.shape != b.shape or a.ndim != 2 or (valid is not None and valid.shape != a.shape[:1]):
    raise ValueError(f"pair_loss: {a.shape} and {b.shape} with valid {None if valid is None else valid.shape}")
  if kind not in ("softmax", "sigmoid") or chunk < 0:
    raise ValueError(f"pair_loss: kind={kind!r}, chunk={chunk}: expected softmax or sigmoid, and a number of columns")
  rows, width = a.shape
  size = min(chunk or rows, rows)
  valid = jnp.ones(rows, bool) if valid is None else valid
  # A row of padding may hold anything: zeros have a normalization, and its gradient is exactly zero.
  a, b = (l2_normalize(jnp.where(valid[:, None], x.astype(jnp.float32), 0.0)) for x in (a, b))
  diagonal = scale * jnp.sum(a * b, axis=-1) + bias  # [N]
  extra = -rows % size
  chunks = (
    jnp.pad(b, ((0, extra), (0, 0))).reshape(-1, size, width),
    jnp.pad(valid, (0, extra)).reshape(-1, size),
    jnp.arange(rows + extra).reshape(-1, size),
  )
  running = _Running(*(jnp.full(rows, value, jnp.float32) for value in (_LOWEST, 0.0, _LOWEST, 0.0)))
  body = jax.checkpoint(functools.partial(_pair_chunk, a=a, valid=valid, scale=scale, bias=bias, kind=kind))
  running, columns = jax.lax.scan(body, running, chunks)  # columns [chunks, size]
  count = jnp.maximum(jnp.sum(valid), 1)
  mean = lambda x: jnp.sum(jnp.where(valid, x, 0.0)) / count
  if kind == "softmax":
    by_row = running.largest + jnp.log(jnp.maximum(running.total, _TINY))
    loss = mean((by_row + columns.reshape(-1)[:rows]) / 2 - diagonal)
  else:
    loss = mean(running.pairs)
  hits = diagonal > running.others
  return PairLoss(loss=loss, accuracy=jax.lax.stop_gradient(mean(hits)), count=jnp.sum(valid))


_LOWEST, _TINY = -1e30, 1e-37  # below every logit, and not infinite: the difference of two must be a number


@flax.struct.dataclass
class _Running:
  """Over the columns so far, per row [N]: largest logit, sum of exp(logit - largest), largest but the partner's, sigmoid terms."""

  largest: Array
  total: Array
  others: Array
  pairs: Array


def _pair_chunk(
  running: _Running, chunk: tuple, *, a: Array, valid: Array, scale: Array, bias: Array, kind: str
) -> tuple[_Running, Array]:
  """Adds columns to the sums; returns them and each column's logsumexp over the rows, [size], 0 for the sigmoid."""
  b, columns, number = chunk
  logits = scale * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST) + bias  # [N, size]
  partner = jnp.arange(len(a))[:, None] == number
  pair = valid[:, None] & columns
  others = jnp.max(jnp.where(pair & ~partner, logits, _LOWEST), axis=1)
  running = running.replace(others=jnp.maximum(running.others, jax.lax.stop_gradient(others)))
  if kind == "sigmoid":
    terms = jnp.where(pair, -jax.nn.log_sigmoid(jnp.where(partner, logits, -logits)), 0.0)
    return running.replace(pairs=running.pairs + jnp.sum(terms, axis=1)), jnp.zeros(len(b))
  logits = jnp.where(pair, logits, _LOWEST)
  largest = jax.lax.stop_gradient(jnp.maximum(running.largest, jnp.max(logits, axis=1)))
  total = running.total * jnp.exp(running.largest - largest)
  total = total + jnp.sum(jnp.where(pair, jnp.exp(logits - largest[:, None]), 0.0), axis=1)
  return running.replace(largest=largest, total=total), jax.nn.logsumexp(logits, axis=0)
