"""The protocol of an evaluator: features in, numbers and the protocol they were measured under out."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Protocol

import numpy as np

from big_ssl.core.types import Interval


@dataclasses.dataclass(frozen=True)
class Features:
  """features [N, D] float32; labels [N] int32 or None; index [N] rows of the source."""

  features: np.ndarray
  labels: np.ndarray | None
  index: np.ndarray


class Extract(Protocol):
  """Features of a whole split, by the current or the random weights."""

  def __call__(self, split: str, *, output: str = "pooled", weights: str = "current") -> Features: ...


@dataclasses.dataclass(frozen=True)
class Report:
  """metrics by name, and the protocol in words, which is printed next to them."""

  metrics: dict[str, float]
  protocol: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(abc.ABC):
  """An evaluation of frozen features.

  Attributes:
    every: cadence in training; None is once, at the end.
    output: which output of `Method.features` is read.
  """

  every: Interval | None = None
  output: str = "pooled"

  @abc.abstractmethod
  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    """Evaluates the features that `extract` gives."""
