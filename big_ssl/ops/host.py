"""Arrays of a mesh on the host."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from big_ssl.core.types import Array


def gather(x: Array) -> np.ndarray:
  """The whole array on every process, whichever devices hold its rows."""
  return np.asarray(multihost_utils.process_allgather(x, tiled=True)) if jax.process_count() > 1 else np.asarray(x)
