"""Predicting clusters: codes computed online from the batch (SwAV), or labels fixed for an epoch (DeepCluster-v2, SeLa)."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array
from big_ssl.losses.distill import cross_entropy
from big_ssl.losses.sinkhorn import sinkhorn

IGNORE = -100  # label of an image without an assignment


@flax.struct.dataclass
class Swapped:
  """Value of `swapped_prediction`.

  Attributes:
    loss: scalar, in nats.
    codes: [A, B, K] targets from the assigning crops; rows sum to 1, no gradient.
    predictions: [V, B, K] log-probabilities of all crops.
  """

  loss: Array
  codes: Array
  predictions: Array


def codes(
  scores: Array, *, epsilon: float, iterations: int, queue_scores: Array | None = None, use_queue: bool | Array = True
) -> Array:
  """Soft cluster assignments by optimal transport over the batch (SwAV, arXiv 2006.09882, section 3.1), no gradient.

  Sinkhorn starts from scores / epsilon in logarithms, over the queue's rows and then the batch's. Rows that do not take
  part have the logarithm of 0, so that the decision may be traced.

  Args:
    scores: [B, K]; under jit over a mesh B is the global batch.
    epsilon: entropy of the transport; low is sharp.
    iterations: of Sinkhorn, at least 1.
    queue_scores: [L, K] of the queued embeddings with the current prototypes.
    use_queue: whether the queue takes part.

  Returns:
    [B, K] float32, rows sum to 1.
  """
  log_q = jax.lax.stop_gradient(scores).astype(jnp.float32) / epsilon
  if queue_scores is not None:
    queued = jax.lax.stop_gradient(queue_scores).astype(jnp.float32) / epsilon
    log_q = jnp.concatenate([jnp.where(use_queue, queued, -jnp.inf), log_q])
  return jnp.exp(sinkhorn(log_q, iterations=iterations)[-scores.shape[0] :])


def swapped_prediction(
  scores: Array,
  *,
  num_crops: int,
  assign_crops: int,
  epsilon: float = 0.05,
  iterations: int = 3,
  temperature: float | Array = 0.1,
  queue_scores: Array | None = None,
  use_queue: bool | Array = True,
) -> Swapped:
  """The loss of SwAV with multi-crop (arXiv 2006.09882, eq. 1, 2 and 6; as in the public code).

    1/A sum_a 1/(V-1) sum_{v != a} mean_b -sum_k q_abk log softmax(s_vb / temperature)_k

  Codes q carry no gradient; it reaches embeddings and prototypes through the predictions alone.

  Args:
    scores: [V*B, K] products of normalized embeddings and prototypes, crop-major, the assigning crops first.
    num_crops: V, at least 2.
    assign_crops: A, at most V.
    epsilon, iterations, queue_scores [A, L, K], use_queue: see `codes`.
    temperature: positive.

  Raises:
    ValueError: the rows are no multiple of V, or A or V is out of range.
  """
  if scores.shape[0] % num_crops or num_crops < 2 or not 1 <= assign_crops <= num_crops:
    raise ValueError(f"swapped_prediction: {scores.shape[0]} rows, {num_crops} crops of which {assign_crops} assign")
  scores = scores.reshape(num_crops, -1, scores.shape[-1]).astype(jnp.float32)  # [V, B, K]
  log_p = jax.nn.log_softmax(scores / temperature)
  loss, targets = 0.0, []
  for a in range(assign_crops):
    queued = None if queue_scores is None else queue_scores[a]
    q = codes(scores[a], epsilon=epsilon, iterations=iterations, queue_scores=queued, use_queue=use_queue)
    per_crop = jnp.mean(cross_entropy(log_p, targets=q), axis=1)  # [V]
    loss += jnp.sum(jnp.where(jnp.arange(num_crops) == a, 0.0, per_crop)) / (num_crops - 1)
    targets.append(q)
  return Swapped(loss=loss / assign_crops, codes=jnp.stack(targets), predictions=log_p)


def labeled_cross_entropy(logits: Array, *, labels: Array) -> Array:
  """Softmax cross-entropy, the mean over the rows that have a label; 0 where none has one.

  Args:
    logits: [..., K], any float dtype; computed in float32.
    labels: [...] integers in 0 ... K - 1, or `IGNORE`.

  Returns:
    Scalar, in nats.
  """
  known = labels != IGNORE
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  hit = jnp.take_along_axis(log_p, jnp.where(known, labels, 0)[..., None], axis=-1)[..., 0]
  return -jnp.sum(jnp.where(known, hit, 0.0)) / jnp.maximum(jnp.sum(known), 1)
