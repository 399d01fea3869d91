"""Distillation: through soft assignments to prototypes (MSN and DINO), and of class probabilities."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array
from big_ssl.losses.regularizers import entropy, mean_entropy_deficit
from big_ssl.losses.sinkhorn import sinkhorn as balance
from big_ssl.ops.normalize import l2_normalize


def assign(z: Array, prototypes: Array, *, temperature: float | Array, label_smoothing: float = 0.0) -> Array:
  """Soft assignment by cosine: log(softmax(cos(z, q) / temperature) Y).

  Y is the label matrix of the prototypes: 1 - s + s/K on the diagonal, s/K elsewhere; since rows of the softmax sum to
  1, the product is (1 - s) p + s/K and no K x K matrix is made. Without smoothing it is a plain log_softmax, finite
  for every finite input.

  Args:
    z: [N, D], any length and float dtype.
    prototypes: [K, D], any length.
    temperature: positive; may be traced.
    label_smoothing: s in [0, 1).

  Returns:
    [N, K] float32 log-probabilities.
  """
  cosine = cosines(z, prototypes)
  log_p = jax.nn.log_softmax(cosine / temperature)
  if label_smoothing == 0.0:
    return log_p
  return jnp.log((1.0 - label_smoothing) * jnp.exp(log_p) + label_smoothing / prototypes.shape[0])


def cosines(z: Array, prototypes: Array) -> Array:
  """[N, K] cosines of embeddings [N, D] and prototypes [K, D], in full float32 precision."""
  return jnp.matmul(l2_normalize(z), l2_normalize(prototypes).T, precision=jax.lax.Precision.HIGHEST)


def sharpened(log_p: Array, *, temperature: float | Array) -> Array:
  """Logarithm of p^(1/T) / sum p^(1/T); of softmax(x / tau) this is softmax(x / (tau T))."""
  return jax.nn.log_softmax(log_p / temperature)


def cross_entropy(log_p: Array, *, targets: Array) -> Array:
  """-sum_k targets log p per row, in nats.

  Args:
    log_p: [..., K] finite log-probabilities.
    targets: [..., K] probabilities, no gradient.
  """
  return -jnp.sum(jax.lax.stop_gradient(targets) * log_p, axis=-1)


def kl_divergence(student: Array, *, teacher: Array, temperature: float = 1.0) -> Array:
  """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over images (arXiv 1503.02531, section 2).

  Args:
    student: [B, K] logits.
    teacher: [B, K] logits, no gradient.
    temperature: T; with T^2 the size of the gradient does not depend on it, roughly.

  Returns:
    Scalar in nats.
  """
  log_p = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
  log_t = jax.lax.stop_gradient(jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature))
  return temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_p), axis=-1))


@flax.struct.dataclass
class SiamesePrototypes:
  """Terms of the MSN loss.

  Attributes:
    total: ce + memax_weight * memax + entropy_weight * entropy, scalar.
    ce, memax, entropy: the terms, unweighted, in nats.
    targets: [B, K] sharpened and balanced targets.
    probabilities: [M*B, K] of the anchors.
    max_target: mean of the largest target probability; 1/K is uniform collapse.
    distinct_targets: number of prototypes that are the first choice of some target; 1 is collapse.
  """

  total: Array
  ce: Array
  memax: Array
  entropy: Array
  targets: Array
  probabilities: Array
  max_target: Array
  distinct_targets: Array


def msn_loss(
  anchors: Array,
  targets: Array,
  prototypes: Array,
  *,
  num_views: int,
  temperature: float | Array,
  sharpen: float | Array,
  sinkhorn: bool,
  sinkhorn_iterations: int = 3,
  memax_weight: float = 1.0,
  entropy_weight: float = 0.0,
  label_smoothing: float = 0.0,
) -> SiamesePrototypes:
  """The loss of Masked Siamese Networks (arXiv 2204.07141, eq. 1; details as in the released code).

  Targets carry no gradient, neither to the encoder nor to the prototypes, which learn through the anchors alone. All
  sums run over the global batch.

  Args:
    anchors: [M*B, D], view-major: all images of view 0, then of view 1.
    targets: [B, D].
    prototypes: [K, D].
    num_views: M.
    temperature: tau.
    sharpen: T of the targets.
    sinkhorn: whether to balance the sharpened targets.
    sinkhorn_iterations: of that.
    memax_weight: lambda.
    entropy_weight: weight of the mean entropy of the anchors.
    label_smoothing: s of the prototype labels.

  Raises:
    ValueError: the anchors are not `num_views` times the targets.
  """
  if anchors.shape[0] != num_views * targets.shape[0]:
    raise ValueError(f"msn_loss: {anchors.shape[0]} anchors are not {num_views} views of {targets.shape[0]} targets")
  log_p = assign(anchors, prototypes, temperature=temperature, label_smoothing=label_smoothing)  # [M*B, K]
  log_t = assign(targets, prototypes, temperature=temperature, label_smoothing=label_smoothing)  # [B, K]
  log_t = sharpened(log_t, temperature=sharpen)
  if sinkhorn:
    log_t = balance(log_t, iterations=sinkhorn_iterations)
  t, p = jax.lax.stop_gradient(jnp.exp(log_t)), jnp.exp(log_p)

  by_view = log_p.reshape(num_views, *log_t.shape)  # [M, B, K]
  ce = jnp.mean(cross_entropy(by_view, targets=t))
  memax = mean_entropy_deficit(p)
  mean_entropy = jnp.mean(entropy(p))
  return SiamesePrototypes(
    total=ce + memax_weight * memax + entropy_weight * mean_entropy,
    ce=ce,
    memax=memax,
    entropy=mean_entropy,
    targets=t,
    probabilities=p,
    max_target=jnp.mean(jnp.max(t, axis=-1)),
    distinct_targets=jnp.sum(jnp.zeros(t.shape[-1], jnp.float32).at[jnp.argmax(t, axis=-1)].set(1.0)),
  )


def dino_loss(
  student: Array,
  teacher: Array,
  *,
  center: Array,
  student_temperature: float | Array = 0.1,
  teacher_temperature: float | Array = 0.04,
) -> Array:
  """Cross-entropy of every student view against every other teacher view (DINO, arXiv 2104.14294, eq. 3).

  The first views of the student are the teacher's; a pair of one view with itself is left out. `center` is the one from
  before this batch.

  Args:
    student: [V, B, K] logits, crop-major, global crops first.
    teacher: [G, B, K] logits of the global crops; no gradient.
    center: [K] or [1, K] running mean of the teacher's logits.
    student_temperature: of the student's softmax.
    teacher_temperature: of the teacher's.

  Returns:
    Scalar in nats, mean over pairs and images.

  Raises:
    ValueError: no pair of different views.
  """
  views, teacher_views, batch = student.shape[0], teacher.shape[0], student.shape[1]
  if views < 2 or views < teacher_views:
    raise ValueError(f"dino_loss: {views} student and {teacher_views} teacher views leave no pair of different views")
  center = center.astype(jnp.float32).reshape(-1)
  targets = jax.lax.stop_gradient(jax.nn.softmax((teacher.astype(jnp.float32) - center) / teacher_temperature))
  log_p = jax.nn.log_softmax(student.astype(jnp.float32) / student_temperature)
  pairs = -jnp.einsum("gbk,vbk->gv", targets, log_p, precision=jax.lax.Precision.HIGHEST) / batch
  return jnp.sum(pairs * (1.0 - jnp.eye(teacher_views, views))) / (teacher_views * (views - 1))


def update_center(center: Array, *, teacher: Array, momentum: float = 0.9) -> Array:
  """momentum * center + (1 - momentum) * mean of the teacher's logits [..., K] over the global batch (DINO, eq. 4)."""
  mean = jnp.mean(teacher.astype(jnp.float32).reshape(-1, teacher.shape[-1]), axis=0)
  return jax.lax.stop_gradient(momentum * center + (1.0 - momentum) * mean.reshape(center.shape))
