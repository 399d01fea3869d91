"""What a whitening is: numbers alone, so that metrics need no accelerator library."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Whitening:
  """x -> (x - mean) axes.

  Attributes:
    mean: [D] float32.
    axes: [D, d] float32, the principal axes divided by the square roots of their eigenvalues; in each the largest
      component in magnitude is positive, so that rounding flips no sign.
    eigenvalues: [D] float64 of the covariance (sums divided by N), descending.
  """

  mean: np.ndarray
  axes: np.ndarray
  eigenvalues: np.ndarray
