"""What a value of a config may be; every check raises one `UserError` that names the key."""

from __future__ import annotations

import re

from big_ssl.core.types import Interval, UserError


def check_least(section: str, *, values: object, **least: float) -> None:
  """Refuses a field of `values` below its least value: check_least("config.data", values=self, threads=0)."""
  for name, bound in least.items():
    value = getattr(values, name)
    if value < bound:
      raise UserError(f"{section}.{name}={value}: expected {bound} or more.")


def check_longer_than_nothing(path: str, interval: Interval | None) -> None:
  """Refuses an interval of length 0, as nothing can be done every 0 steps; None is a cadence that is not used."""
  if interval is not None and interval.value <= 0:
    raise UserError(f"{path}={interval}: expected an interval above 0, such as '40steps'.")


def check_pattern(path: str, pattern: str) -> None:
  """Refuses what is not a regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise UserError(f"{path}={pattern!r}: not a regular expression: {error}.") from None
