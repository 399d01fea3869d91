"""Schedules as pure functions of the step; `xp` is jax.numpy (float32) inside the step, numpy (float64) outside."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax.numpy as jnp

Number = Any  # a Python number, a numpy array or a traced scalar


def linear(step: Number, *, start: float, final: float, total: float, xp: ModuleType = jnp) -> Number:
  """start + (final - start) step / total, constant after `total`."""
  return start + (final - start) * _share(step, total, xp)


def cosine(step: Number, *, start: float, final: float, total: float, xp: ModuleType = jnp) -> Number:
  """final + (start - final) (1 + cos(pi step / total)) / 2, constant after `total`; goes up where final > start."""
  # (1 + cos(pi x)) / 2 = sin(pi (1 - x) / 2)^2: the sum cancels near the end, where float32 would lose a small value.
  left = _share(total - step, total, xp)
  return final + (start - final) * xp.square(xp.sin(0.5 * xp.pi * left))


def warmup_cosine(
  step: Number,
  *,
  start: float,
  peak: float,
  final: float,
  warmup: float,
  total: float,
  inclusive: bool = False,
  xp: ModuleType = jnp,
) -> Number:
  """Linear from `start` to `peak` over `warmup` steps, then a cosine to `final` at `total`.

  Args:
    step: the update, from 0. MSN (arXiv 2204.07141, released code) steps its scheduler before the update: pass
      step + 1, and 1.25 times the training as `total`.
    inclusive: the warm-up is DINO's and SwAV's linspace that includes both ends, so that the peak is used twice, at
      `warmup` - 1 and at `warmup`. In either form `final` is reached at `total` only, which is after the last update.
  """
  up_length = max(warmup - 1, 1) if inclusive else max(warmup, 1)
  up = linear(step, start=start, final=peak, total=up_length, xp=xp)
  down = cosine(step - warmup, start=peak, final=final, total=max(total - warmup, 1), xp=xp)
  return xp.where(step < warmup, up, down)


def poly(step: Number, *, start: float, final: float, power: float, total: float, xp: ModuleType = jnp) -> Number:
  """final + (start - final) (1 - step / total)^power, constant after `total`."""
  return final + (start - final) * _share(total - step, total, xp) ** power


def staircase(step: Number, *, start: float, boundaries: Sequence[int], factor: float, xp: ModuleType = jnp) -> Number:
  """start * factor^n, n the number of `boundaries` that `step` has reached."""
  reached = sum((xp.asarray(step >= b, dtype=xp.float32) for b in boundaries), xp.zeros(()))
  return start * factor**reached


def _share(step: Number, total: float, xp: ModuleType) -> Number:
  step = xp.asarray(step, dtype=xp.float32 if xp is jnp else xp.float64)
  return xp.clip(step / max(total, 1e-9), 0.0, 1.0)
