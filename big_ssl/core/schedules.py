"""Schedules as pure functions of the step; `xp` is jax.numpy (float32) inside the step, numpy (float64) outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax.numpy as jnp

from big_ssl.core.types import Interval, UserError

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


def piecewise(
  step: Number, *, start: float, factor: float, boundaries: tuple[float, ...], xp: ModuleType = jnp
) -> Number:
  """start * factor^n, n being how many of the `boundaries` (in steps) the step has reached."""
  dtype = xp.float32 if xp is jnp else xp.float64
  passed = sum((xp.asarray(step >= b, dtype) for b in boundaries), xp.zeros(xp.shape(step), dtype))
  return start * xp.power(xp.asarray(factor, dtype), passed)


def _share(step: Number, total: float, xp: ModuleType) -> Number:
  step = xp.asarray(step, dtype=xp.float32 if xp is jnp else xp.float64)
  return xp.clip(step / max(total, 1e-9), 0.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
  """A curve as a field of a config, such as a teacher temperature or a momentum.

  Attributes:
    name: shape; "constant" is `start` throughout, "step" multiplies it by `factor` at every boundary.
    start, final: values at the first update and at the end of the schedule.
    peak: value after the warm-up, "warmup_cosine" only.
    warmup: length of the rise from `start` to `peak`.
    stretch: the curve is laid over stretch * total steps (MSN: 1.25).
    offset: update i uses the curve at i + offset.
    inclusive: see `warmup_cosine`.
    boundaries, factor: of "step"; boundaries are shares of the training in (0, 1).
  """

  name: Literal["constant", "linear", "cosine", "warmup_cosine", "step"] = "constant"
  start: float = 0.0
  final: float = 0.0
  peak: float = 0.0
  warmup: Interval = Interval(0, "steps")
  stretch: float = 1.0
  offset: int = 0
  inclusive: bool = False
  boundaries: tuple[float, ...] = ()
  factor: float = 0.1

  def build(
    self, total_steps: int, *, batch_size: int = 1, examples: int = 1, path: str = "schedule"
  ) -> Callable[..., Number]:
    """Returns `value(step, xp=jnp)`.

    Args:
      total_steps: updates of the whole training.
      batch_size, examples: what turns a warm-up in epochs or images into steps.
      path: of this field in the config, for messages.

    Raises:
      UserError: the warm-up is longer than the training, or a boundary is outside (0, 1).
    """
    total = total_steps * self.stretch
    warmup = self.warmup.steps(batch_size=batch_size, examples=examples)
    if self.name == "warmup_cosine" and warmup >= total:
      raise UserError(f"{path}.warmup={self.warmup}: {warmup} steps, but the schedule ends after {total:g}.")
    if not all(0 < b < 1 for b in self.boundaries):
      raise UserError(f"{path}.boundaries={self.boundaries}: expected shares of the training in (0, 1).")
    boundaries = tuple(b * total for b in self.boundaries)

    def value(step: Number, *, xp: ModuleType = jnp) -> Number:
      step = step + self.offset
      if self.name == "constant":
        return xp.full(xp.shape(step), self.start, xp.float32 if xp is jnp else xp.float64)
      if self.name == "step":
        return piecewise(step, start=self.start, factor=self.factor, boundaries=boundaries, xp=xp)
      ends = {"start": self.start, "final": self.final, "total": total, "xp": xp}
      if self.name == "warmup_cosine":
        return warmup_cosine(step, peak=self.peak, warmup=warmup, inclusive=self.inclusive, **ends)
      return {"linear": linear, "cosine": cosine}[self.name](step, **ends)

    return value
