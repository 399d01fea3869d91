"""Schedules against reference curves: exact in float64, to rounding in float32 inside jit."""

import pathlib

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core import schedules
from big_ssl.core.config import OptimConfig
from big_ssl.core.optim import learning_rate, weight_decay
from big_ssl.core.types import Interval
from big_ssl.methods.msn import MSN as MSNMethod

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
MSN, DINO, BYOL = (np.load(GOLDENS / f"{name}_schedules.npz") for name in ("msn", "dino", "byol"))


def check(curve, golden, *, steps=None):
  """`curve(step, xp)` is the golden to 1e-12 in numpy, and to 1e-6 of the largest value as a traced function."""
  steps = np.arange(len(golden)) if steps is None else steps
  np.testing.assert_allclose(curve(steps, np), golden, rtol=1e-12, atol=1e-15)
  traced = jax.jit(jax.vmap(lambda i: curve(i, jnp)), compiler_options=engine.OPTIMIZED)(jnp.asarray(steps, jnp.int32))
  assert traced.dtype == jnp.float32
  np.testing.assert_allclose(traced, golden, rtol=1e-6, atol=1e-9)


def test_msn_curves_match_the_reference():
  total = int(MSN["epochs"]) * int(MSN["iters_per_epoch"])
  warmup = int(MSN["warmup_epochs"]) * int(MSN["iters_per_epoch"])
  start, peak, final = map(float, MSN["start_ref_final_lr"])
  decay, decay_final = map(float, MSN["wd_ref_final"])
  lr = dict(start=start, peak=peak, final=final, warmup=warmup, total=1.25 * total)
  check(lambda i, xp: schedules.warmup_cosine(i + 1, xp=xp, **lr), MSN["lr"])
  check(lambda i, xp: schedules.cosine(i + 1, start=decay, final=decay_final, total=1.25 * total, xp=xp), MSN["weight_decay"])
  for name, ends in (("ema_momentum", (0.996, 1.0)), ("sharpen_T", map(float, MSN["T_start_final"]))):
    first, last = ends
    check(lambda i, xp, a=first, b=last: schedules.linear(i, start=a, final=b, total=1.25 * total, xp=xp), MSN[name])


def test_the_curves_of_the_optimizer_and_the_method_are_the_reference():
  total, steps = len(MSN["lr"]), range(len(MSN["lr"]))
  start, peak, final = map(float, MSN["start_ref_final_lr"])
  decay, decay_final = map(float, MSN["wd_ref_final"])
  config = OptimConfig(
    lr=peak,
    start_lr=start,
    final_lr=final,
    warmup=Interval(float(MSN["warmup_epochs"]), "epochs"),
    stretch=1.25,
    schedule_offset=1,
    weight_decay=decay,
    weight_decay_final=decay_final,
  )
  sharpen, sharpen_final = map(float, MSN["T_start_final"])
  method = MSNMethod(total_steps=total, sharpen=sharpen, sharpen_final=sharpen_final)
  curves = {
    "lr": learning_rate(config, total_steps=total, batch_size=1, examples=int(MSN["iters_per_epoch"])),
    "weight_decay": weight_decay(config, total_steps=total, batch_size=1, examples=1),
    "ema_momentum": method.ema_momentum,
    "sharpen_T": method.sharpening,
  }
  for name, curve in curves.items():
    np.testing.assert_allclose([float(curve(jnp.int32(i))) for i in steps], MSN[name], rtol=1e-6, atol=1e-9, err_msg=name)


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
  lr = lambda i, xp: schedules.warmup_cosine(i, start=0.0, peak=3.2, final=0.0, warmup=100, total=1000, xp=xp)
  tau = lambda i, xp: schedules.cosine(i, start=0.996, final=1.0, total=1000, xp=xp)
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


def test_poly_is_the_public_formula_at_every_step():
  # Segmenter (arXiv 2105.05633, public code): (base - end) (1 - i / total)^0.9 + end.
  golden = (1e-3 - 1e-5) * (1 - np.arange(50) / 50) ** 0.9 + 1e-5
  check(lambda i, xp: schedules.poly(i, start=1e-3, final=1e-5, power=0.9, total=50, xp=xp), golden)
  config = OptimConfig(lr=1e-3, final_lr=1e-5, schedule="poly", poly_power=2.0)
  curve = learning_rate(config, total_steps=50, batch_size=1, examples=1)
  np.testing.assert_allclose(curve(25), 1e-5 + (1e-3 - 1e-5) / 4, rtol=1e-5)


def test_curves_stay_at_their_end_after_the_end():
  assert float(schedules.linear(99, start=1.0, final=3.0, total=10)) == 3.0
  assert float(schedules.cosine(99, start=1.0, final=3.0, total=10)) == 3.0
  assert float(schedules.warmup_cosine(99, start=0.0, peak=1.0, final=0.5, warmup=3, total=10)) == 0.5
