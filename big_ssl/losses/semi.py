"""Semi-supervised losses against labeled support samples: PAWS and SuNCEt."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.losses.distill import cross_entropy, sharpened
from big_ssl.losses.regularizers import entropy
from big_ssl.ops.normalize import l2_normalize

_TINY = 1e-37  # smallest normal float32, about; without smoothing a probability may be 0


def label_matrix(labels: Array, *, columns: Array, smoothing: float = 0.0) -> Array:
  """The rows of the classes of some images: 1 - s + s/C in the column of the class, s/C elsewhere; rows sum to 1.

  Built from the labels of the images themselves, so that no order of the sampler can go out of step with it.

  Args:
    labels: [N] integers.
    columns: [C] the class of each column, distinct; an entry that no image has is a class without support.
    smoothing: s in [0, 1).

  Returns:
    [N, C] float32.
  """
  hit = (labels[:, None] == columns[None, :]).astype(jnp.float32)
  return (1.0 - smoothing) * hit + smoothing / columns.shape[0]


def soft_neighbors(queries: Array, supports: Array, *, labels: Array, temperature: float | Array) -> Array:
  """The soft nearest-neighbor classifier p = softmax(cos(q, S) / temperature) Y (PAWS, arXiv 2104.13963, section 3).

  Args:
    queries: [Q, D], any length and float dtype.
    supports: [S, D].
    labels: Y, [S, C]; rows that sum to 1 make the result a distribution.
    temperature: positive.

  Returns:
    [Q, C] float32.
  """
  cosine = jnp.matmul(l2_normalize(queries), l2_normalize(supports).T, precision=jax.lax.Precision.HIGHEST)
  weights = jax.nn.softmax(cosine / temperature)
  return jnp.matmul(weights, labels.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


@flax.struct.dataclass
class SupportAssignments:
  """Terms of the PAWS loss.

  Attributes:
    total: ce + memax_weight * memax, scalar.
    ce: mean cross-entropy of the anchors, in nats.
    memax: -H of the mean sharpened prediction, in nats; at least -log C.
    targets: [(2+M)*B, C] of all anchors, sharpened, swapped and floored.
    probabilities: [(2+M)*B, C] of the anchors, not sharpened.
  """

  total: Array
  ce: Array
  memax: Array
  targets: Array
  probabilities: Array


def paws_loss(
  anchors: Array,
  anchor_supports: Array,
  targets: Array,
  target_supports: Array,
  *,
  labels: Array,
  temperature: float | Array,
  sharpen: float | Array,
  memax_weight: float = 1.0,
  floor: float = 1e-4,
) -> SupportAssignments:
  """The loss of PAWS (arXiv 2104.13963, eq. 1 to 3; details as in the released code).

    p = softmax(cos(z, z_S) / tau) Y,   t = rho(softmax(cos(h, h_S) / tau) Y),   rho(x) = x^(1/T) / sum x^(1/T)
    loss = mean H(t, p) - memax_weight H(mean rho(p))

  A big view is compared with the target of the other one, a small view with the mean of the two. Target entries below
  `floor` become 0 without renormalization. Gradients flow to anchors and their supports, never to the targets' side;
  sums run over the global batch.

  Args:
    anchors: z, [(2+M)*B, D], view-major: the two big views, then M small ones.
    anchor_supports: z_S, [S, D].
    targets: h, [2*B, D], the same two big views in the same order.
    target_supports: h_S, [S, D].
    labels: Y, [S, C] (see `label_matrix`).
    temperature: tau.
    sharpen: T of rho.
    memax_weight: 1 in the paper; the term supposes that the unlabeled images have the classes in equal shares.
    floor: see above; 0 keeps all.

  Raises:
    UserError: one column only.
    ValueError: the anchors are not two or more views of the targets' images.
  """
  batch, odd = divmod(targets.shape[0], 2)
  if odd or not batch or anchors.shape[0] % batch or anchors.shape[0] < 2 * batch:
    raise ValueError(f"paws_loss: {anchors.shape[0]} anchors and {targets.shape[0]} targets are not views of the same images")
  if labels.shape[-1] < 2:
    raise UserError("config.method.classes_per_step=1: the support needs at least 2 classes, one says nothing.")
  p = soft_neighbors(anchors, anchor_supports, labels=labels, temperature=temperature)  # [(2+M)*B, C]
  log_p = jnp.log(jnp.maximum(p, _TINY))

  t = soft_neighbors(targets, target_supports, labels=labels, temperature=temperature)
  t = jnp.exp(sharpened(jnp.log(jnp.maximum(t, _TINY)), temperature=sharpen)).reshape(2, batch, -1)  # [2, B, C]
  views = anchors.shape[0] // batch
  small = jnp.broadcast_to(jnp.mean(t, axis=0), (views - 2, *t.shape[1:]))
  t = jnp.concatenate([t[::-1], small]).reshape(p.shape)
  t = jax.lax.stop_gradient(jnp.where(t < floor, 0.0, t))

  ce = jnp.mean(cross_entropy(log_p, targets=t))
  memax = -entropy(jnp.mean(jnp.exp(sharpened(log_p, temperature=sharpen)), axis=0))
  return SupportAssignments(total=ce + memax_weight * memax, ce=ce, memax=memax, targets=t, probabilities=p)


@flax.struct.dataclass
class Suncet:
  """loss, scalar in nats; accuracy: share of rows whose likeliest class among the others is their own."""

  loss: Array
  accuracy: Array


def suncet_loss(z: Array, *, labels: Array, temperature: float | Array) -> Suncet:
  """Supervised noise-contrastive estimation (SuNCEt, arXiv 2006.10803, eq. 1; form of the PAWS release).

    loss = -1/N sum_i sum_c Y_ic log p_ic,   p_i = softmax_{j != i}(cos(z_i, z_j) / temperature) Y

  Args:
    z: [N, D] embeddings of any length; each class should have at least two rows.
    labels: Y, [N, C].
    temperature: positive.

  Raises:
    ValueError: one row only, which has no others.
  """
  rows = z.shape[0]
  if rows < 2:
    raise ValueError("suncet_loss: one embedding has no others to be compared with")
  z = l2_normalize(z)
  s = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature
  row = jnp.arange(rows)
  weights = jax.nn.softmax(jnp.where(row[:, None] == row[None, :], -jnp.inf, s))
  labels = labels.astype(jnp.float32)
  p = jnp.matmul(weights, labels, precision=jax.lax.Precision.HIGHEST)
  hits = jnp.argmax(p, axis=-1) == jnp.argmax(labels, axis=-1)
  loss = jnp.mean(cross_entropy(jnp.log(jnp.maximum(p, _TINY)), targets=labels))
  return Suncet(loss=loss, accuracy=jnp.mean(hits, dtype=jnp.float32))
