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
  """The normalised temperature-scaled cross-entropy of SimCLR (arXiv 2002.05709, eq. 1).

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
