"""The words every other module speaks: state, intervals, parameter rules, user errors.

Nothing here knows about data, models or methods, so that `losses`, `ops` and `augment` may import it freely.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax

PyTree = Any
Array = jax.Array
Size = int | tuple[int, int]  # of an image in pixels: both sides, or height and width
Params = PyTree
Extra = dict[str, PyTree]
Metrics = dict[str, Array]


class UserError(ValueError):
  """A mistake in a config, a file or a flag: one clear message, exit code 2, no traceback.

  The message names the config path or the file, the value found and what is accepted.
  """


def nearest(name: str, options: Iterable[str]) -> str:
  """Returns " Did you mean 'x'?" for the option nearest to `name`, or "" when none is near."""
  close = difflib.get_close_matches(str(name), list(options), n=1, cutoff=0.5)
  return f" Did you mean '{close[0]}'?" if close else ""


@flax.struct.dataclass
class TrainState:
  """Everything that influences the future of a run; a checkpoint is this pytree and a small record.

  Attributes:
    step: int32 scalar, finished updates; the only clock and the only data position.
    params: what the optimizer owns.
    opt_state: moments and the like, as the optimizer keeps them.
    extra: all else that must survive: teacher, batch statistics, center, queue, bank, assignments.
  """

  step: Array
  params: PyTree
  opt_state: PyTree
  extra: PyTree


_INTERVAL = re.compile(r"^\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*(steps?|epochs?|images?)\s*$", re.IGNORECASE)
_LONGEST = 1e15


@dataclasses.dataclass(frozen=True)
class Interval:
  """A length of training written as "40steps", "10epochs" or "1e6images"."""

  value: float
  unit: str  # "steps", "epochs" or "images"

  @classmethod
  def parse(cls, text: str | Interval, *, path: str = "interval") -> Interval:
    """Reads an interval; raises `UserError` naming `path` when the text is not one."""
    if isinstance(text, Interval):
      return text
    match = _INTERVAL.match(text) if isinstance(text, str) else None
    try:
      value = float(match[1]) if match else math.nan  # "1.2.3" has the form, and is no number
    except ValueError:
      value = math.nan
    if not value <= _LONGEST:
      raise UserError(f"{path}={text!r}: expected a number and a unit, such as '40steps', '10epochs' or '1e6images'.")
    return cls(value, match[2].lower().rstrip("s") + "s")

  def steps(self, *, batch_size: int, examples: int) -> int:
    """The interval in updates, rounded to the nearest; 0 stays 0, anything longer is at least 1."""
    return max(1, round(self.updates(batch_size=batch_size, examples=examples))) if self.value > 0 else 0

  def updates(self, *, batch_size: int, examples: int) -> float:
    """The interval in updates, not rounded."""
    per_step = {"steps": 1.0, "epochs": batch_size / max(examples, 1), "images": float(batch_size)}[self.unit]
    return self.value / per_step

  def __str__(self) -> str:
    return f"{self.value:g}{self.unit}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """How the optimizer treats the parameters whose path matches `pattern` (`re.search`); the first match wins.

  Attributes:
    pattern: regular expression on "encoder/block_0/attention/query/kernel"-like paths.
    lr_mult: factor on the scheduled learning rate; 0 freezes for good.
    weight_decay: factor on the scheduled weight decay.
    trust_ratio: whether LARS and LARC adapt the tensor.
    clip: whether the tensor is inside gradient clipping.
    freeze_until: no update, no decay and no moments before this point of training.
    momentum: factor on the momentum of "sgd", "lars" and "larc".
  """

  pattern: str
  lr_mult: float = 1.0
  weight_decay: float = 1.0
  trust_ratio: bool = True
  clip: bool = True
  freeze_until: Interval | None = None
  momentum: float = 1.0


def sides(size: Size) -> tuple[int, int]:
  """Height and width."""
  return (size, size) if isinstance(size, int) else tuple(size)
