"""How long something takes, for comparisons within one process."""

from __future__ import annotations

import time
from collections.abc import Callable


def rate(run: Callable[[], int], *, seconds: float) -> float:
  """Items per second of `run`, which returns how many it did; one call warms up."""
  run()
  done, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    done += run()
  return done / (time.perf_counter() - start)
