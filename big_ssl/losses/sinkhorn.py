"""Balanced assignment by Sinkhorn-Knopp, in logarithms."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array


def sinkhorn(log_q: Array, *, iterations: int = 3) -> Array:
  """Alternates between equal use of the prototypes and unit mass per sample.

  Each iteration divides by the mass of every prototype over the whole batch, then by the mass of every sample (SwAV,
  arXiv 2006.09882, section 3.1; MSN, arXiv 2204.07141, appendix). The factors K, B and the first total of the published
  codes cancel in the next division by the mass of the sample, so they are not there. SwAV passes scores / epsilon, MSN
  the logarithm of its sharpened targets; in logs neither overflows, and a prototype that nobody uses gives no 0/0.

  Args:
    log_q: [B, K] logarithms of the unnormalized assignment; under jit over a mesh B is the global batch.
    iterations: at least 1.

  Returns:
    [B, K] float32 log-probabilities; rows sum to 1.

  Raises:
    ValueError: fewer than one iteration.
  """
  if iterations < 1:
    raise ValueError(f"iterations={iterations}: at least 1 is needed")
  log_q = log_q.astype(jnp.float32)
  for _ in range(iterations):
    log_q = log_q - _log_mass(log_q, axis=0)
    log_q = log_q - _log_mass(log_q, axis=1)
  return log_q


def _log_mass(log_q: Array, *, axis: int) -> Array:
  mass = jax.nn.logsumexp(log_q, axis=axis, keepdims=True)
  return jnp.where(jnp.isneginf(mass), 0.0, mass)
