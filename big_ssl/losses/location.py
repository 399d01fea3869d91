"""Cross-entropies over the patches of a query that lie inside the reference (LOCA, arXiv 2212.02400)."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.losses.distill import cross_entropy
from big_ssl.losses.regularizers import entropy
from big_ssl.losses.sinkhorn import sinkhorn

_FEW = 1e-8  # valid patches, so that a batch without any costs nothing


def valid_mean(values: Array, *, valid: Array, groups: int = 1) -> Array:
  """sum v x / (sum v + 1e-8), in each group of consecutive images; the mean over groups.

  The released code divides by the valid patches of each device, then averages over devices; `groups` is their number.

  Args:
    values: [B, M]; what is not valid may be any finite number.
    valid: [B, M] bool.
    groups: divides B.

  Raises:
    UserError: it does not.
  """
  if values.shape[0] % groups:
    raise UserError(f"config.method.loss_groups={groups}: does not divide the {values.shape[0]} images of a batch.")
  values, weight = (x.reshape(groups, -1) for x in (jnp.where(valid, values, 0.0), valid.astype(jnp.float32)))
  return jnp.mean(jnp.sum(values, axis=1) / (jnp.sum(weight, axis=1) + _FEW))


@flax.struct.dataclass
class PositionPrediction:
  """Value of `position_loss`.

  Attributes:
    loss: in nats.
    accuracy: share of the valid patches whose place is found.
    valid: share of the query patches that lie inside the reference.
  """

  loss: Array
  accuracy: Array
  valid: Array


def position_loss(logits: Array, positions: Array, *, groups: int = 1) -> PositionPrediction:
  """Classification of the place that each query patch has in the reference, over the patches that have one.

  Args:
    logits: [B, M, P].
    positions: [B, M] integers below P, -1 where the patch is outside the reference.
    groups: see `valid_mean`.
  """
  valid = positions >= 0
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
  label = jnp.maximum(positions, 0)  # -1 would wrap around
  ce = -jnp.take_along_axis(log_p, label[..., None], axis=-1)[..., 0]
  hits = (jnp.argmax(logits, axis=-1) == positions).astype(jnp.float32)
  return PositionPrediction(
    loss=valid_mean(ce, valid=valid, groups=groups),
    accuracy=valid_mean(hits, valid=valid),
    valid=jnp.mean(valid, dtype=jnp.float32),
  )


@flax.struct.dataclass
class ClusterPrediction:
  """Terms of `patch_cluster_loss`.

  Attributes:
    ce: cross-entropy over the valid patches, in nats.
    memax: sum_k q_k log q_k of the mean prediction q over ALL query patches; -ln K when all prototypes are used alike.
    targets: [B, P, K] balanced.
    probabilities: [B, M, K] of the queries.
  """

  ce: Array
  memax: Array
  targets: Array
  probabilities: Array


def patch_cluster_loss(
  cosines: Array,
  teacher: Array,
  positions: Array,
  *,
  temperature: float | Array = 0.1,
  sharpen: float | Array = 0.05,
  sinkhorn_iterations: int = 3,
  groups: int = 1,
) -> ClusterPrediction:
  """Every query patch predicts the cluster that the teacher gives to the reference patch at its place.

  The teacher's probabilities softmax(cos / sharpen) are balanced over all patches of the global batch: no exponential
  on top, prototypes first, patches last. They carry no gradient.

  Args:
    cosines: [B, M, K] of the query patches to the prototypes.
    teacher: [B, P, K] of all reference patches.
    positions: [B, M] integers below P, -1 where the patch is outside the reference.
    groups: see `valid_mean`; Sinkhorn and me-max are over the global batch in any case.
  """
  log_t = jax.nn.log_softmax(jax.lax.stop_gradient(teacher).astype(jnp.float32) / sharpen)
  log_t = sinkhorn(log_t.reshape(-1, teacher.shape[-1]), iterations=sinkhorn_iterations)
  targets = jnp.exp(log_t).reshape(teacher.shape)
  wanted = jnp.take_along_axis(targets, jnp.maximum(positions, 0)[..., None], axis=1)  # [B, M, K]
  log_p = jax.nn.log_softmax(cosines.astype(jnp.float32) / temperature)
  p = jnp.exp(log_p)
  return ClusterPrediction(
    ce=valid_mean(cross_entropy(log_p, targets=wanted), valid=positions >= 0, groups=groups),
    memax=-entropy(jnp.mean(p, axis=(0, 1))),
    targets=targets,
    probabilities=p,
  )
