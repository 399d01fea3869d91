"""Schedules against reference curves: exact in float64, to rounding in float32 inside jit."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core import schedules
from big_ssl.core.schedules import ScheduleConfig
from big_ssl.core.types import Interval, UserError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
MSN, DINO, BYOL = (np.load(GOLDENS / f"{name}_schedules.npz") for name in ("msn", "dino", "byol"))


def check(curve, golden, *, steps=None):
  """`curve(step, xp)` is the golden to 1e-12 in numpy, and to 1e-6 of the largest value as a traced function."""
  steps = np.arange(len(golden)) if steps is None else steps
  np.testing.assert_allclose(curve(steps, np), golden, rtol=1e-12, atol=1e-15)
  traced = jax.jit(jax.vmap(lambda i: curve(i, jnp)))(jnp.asarray(steps, jnp.int32))
  assert traced.dtype == jnp.float32
  np.testing.assert_allclose(traced, golden, rtol=1e-6, atol=1e-9)


def msn_curves():
  total = int(MSN["epochs"]) * int(MSN["iters_per_epoch"])
  warmup = Interval(int(MSN["warmup_epochs"]) * int(MSN["iters_per_epoch"]), "steps")
  start, peak, final = map(float, MSN["start_ref_final_lr"])
  decay, decay_final = map(float, MSN["wd_ref_final"])
  sharpen, sharpen_final = map(float, MSN["T_start_final"])
  lr = ScheduleConfig(name="warmup_cosine", start=start, peak=peak, final=final, warmup=warmup, stretch=1.25, offset=1)
  return total, {
    "lr": lr,
    "weight_decay": ScheduleConfig(name="cosine", start=decay, final=decay_final, stretch=1.25, offset=1),
    "ema_momentum": ScheduleConfig(name="linear", start=0.996, final=1.0, stretch=1.25),
    "sharpen_T": ScheduleConfig(name="linear", start=sharpen, final=sharpen_final, stretch=1.25),
  }


@pytest.mark.parametrize("name", ["lr", "weight_decay", "ema_momentum", "sharpen_T"])
def test_msn_curves_match_the_reference(name):
  total, curves = msn_curves()
  value = curves[name].build(total)
  check(lambda i, xp: value(i, xp=xp), MSN[name])


@pytest.mark.parametrize("case", [0, 1, 2])
def test_dino_curves_match_the_reference(case):
  base, final, epochs, per_epoch, warmup, start = DINO[f"case{case}/base_final_epochs_niter_warmup_start"]
  kwargs = dict(
    start=float(start),
    peak=float(base),
    final=float(final),
    warmup=int(warmup * per_epoch),
    total=int(epochs * per_epoch),
  )
  check(lambda i, xp: schedules.warmup_cosine(i, inclusive=True, xp=xp, **kwargs), DINO[f"case{case}/schedule"])


@pytest.mark.parametrize("case", [0, 1])
def test_dino_teacher_temperature_matches_the_reference(case):
  start, final, warmup, epochs = DINO[f"teacher_temp{case}/start_final_warmup_nepochs"]
  kwargs = dict(start=float(start), final=float(final), total=max(int(warmup) - 1, 1))
  check(
    lambda i, xp: schedules.linear(i, xp=xp, **kwargs),
    DINO[f"teacher_temp{case}/per_epoch"],
    steps=np.arange(int(epochs)),
  )


def test_byol_curves_match_the_reference():
  lr = lambda i, xp: schedules.warmup_cosine(i, start=0.0, peak=3.2, final=0.0, warmup=100, total=1000, xp=xp)  # noqa: E731
  tau = lambda i, xp: schedules.cosine(i, start=0.996, final=1.0, total=1000, xp=xp)  # noqa: E731
  for curve, name in ((lr, "learning_rate"), (tau, "tau")):
    traced = jax.vmap(lambda i, curve=curve: curve(i, jnp))(jnp.asarray(BYOL["step"]))
    # The reference is float32 and cancels in 1 + cos: at step 999 it is off by 2e-8, 6e-9 of the peak.
    np.testing.assert_allclose(traced, BYOL[name], rtol=1e-6, atol=1e-7 * 3.2)


def test_the_last_updates_of_a_long_cosine_keep_their_relative_accuracy_in_float32():
  total = 1_000_000
  steps = np.arange(total - 5, total)
  exact = np.sin(np.pi * (total - steps) / total / 2) ** 2
  traced = jax.vmap(lambda i: schedules.cosine(i, start=1.0, final=0.0, total=total))(jnp.asarray(steps))
  np.testing.assert_allclose(traced, exact, rtol=1e-6)


def test_curves_stay_at_their_end_after_the_end():
  assert float(schedules.linear(99, start=1.0, final=3.0, total=10)) == 3.0
  assert float(schedules.cosine(99, start=1.0, final=3.0, total=10)) == 3.0
  assert float(schedules.warmup_cosine(99, start=0.0, peak=1.0, final=0.5, warmup=3, total=10)) == 0.5


def test_step_schedule_falls_at_each_boundary_and_constant_does_not():
  value = ScheduleConfig(name="step", start=0.8, factor=0.5, boundaries=(0.5, 0.75)).build(8)
  np.testing.assert_allclose([float(value(i)) for i in range(8)], [0.8] * 4 + [0.4] * 2 + [0.2] * 2, rtol=1e-6)
  assert float(ScheduleConfig(start=0.3).build(8)(jnp.int32(5))) == pytest.approx(0.3)


def test_warmup_in_epochs_is_resolved_to_steps():
  config = ScheduleConfig(name="warmup_cosine", peak=1.0, warmup=Interval(2, "epochs"))
  value = config.build(100, batch_size=10, examples=50)  # 5 steps per epoch
  assert float(value(5)) == pytest.approx(0.5) and float(value(10)) == pytest.approx(1.0)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (
      ScheduleConfig(name="warmup_cosine", warmup=Interval(20, "steps")),
      "config.method.lr.warmup=20steps: 20 steps, but",
    ),
    (ScheduleConfig(name="step", boundaries=(0.5, 3.0)), r"config.method.lr.boundaries=\(0.5, 3.0\)"),
  ],
)
def test_impossible_schedules_are_named(config, message):
  with pytest.raises(UserError, match=message):
    config.build(10, path="config.method.lr")
