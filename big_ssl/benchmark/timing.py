"""How long something takes, for comparisons within one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def rate(run: Callable[[], int], *, seconds: float) -> float:
  """Items per second of `run`, which returns how many it did; one call warms up."""
  run()
  done, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    done += run()
  return done / (time.perf_counter() - start)


def seconds_of(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def matmul_flops(devices: int = 1, *, dtype: str = "float32", precision: jax.lax.Precision = jax.lax.Precision.HIGHEST) -> float:
  """FLOP/s of a square product of `dtype`, the best of three, times `devices`: none of them waits for another."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  share = devices if jax.default_backend() != "cpu" else 1  # simulated devices of a CPU are the same cores
  x = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
  jax.block_until_ready(product(x))
  return share * 2.0 * size**3 / min(seconds_of(lambda: jax.block_until_ready(product(x))) for _ in range(3))
