"""Which patches of an image are seen: random dropping of tokens (MSN, arXiv 2204.07141, section 3)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError


def keep_indices(key: Array, *, tokens: int, ratio: float, batch: int | None = None) -> Array:
  """The tokens that stay when a share `ratio` is dropped at random, floor(tokens * (1 - ratio)) of them.

  Args:
    key: of this step.
    tokens: patches of a view, class token not counted.
    ratio: dropped share, in [0, 1).
    batch: None draws one set for the whole batch, as MSN does; a number draws one per image.

  Returns:
    [K] int32, or [batch, K], in random order.

  Raises:
    UserError: `ratio` is outside [0, 1), or no token is left.
  """
  if not 0.0 <= ratio < 1.0:
    raise UserError(f"masking: ratio={ratio!r}: expected a share of the patches in [0, 1).")
  kept = math.floor(tokens * (1.0 - ratio) + 1e-6)  # 10 * (1 - .9) is below 1 in floating point
  if kept < 1:
    most = 1 - 1 / max(tokens, 1)
    raise UserError(f"masking: ratio={ratio!r} of {tokens} patches leaves none; at most {most:.3g} can go.")
  draw = lambda k: jax.random.permutation(k, tokens)[:kept].astype(jnp.int32)
  if batch is None:
    return draw(key)
  return jax.vmap(lambda row: draw(jax.random.fold_in(key, row)))(jnp.arange(batch))
