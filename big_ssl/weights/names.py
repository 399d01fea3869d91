"""Names of tensors: templates with integers in them, and paths of nested dicts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from big_ssl.core.types import PyTree

_HOLE = re.compile(r"\{(?:(\d+)\*)?([a-z])([+-]\d+)?\}")


class Template:
  """A name with integers in it."""

  def __init__(self, text: str):
    self.text = text
    self._holes = tuple((int(a or 1), letter, int(b or 0)) for a, letter, b in _HOLE.findall(text))
    parts = [re.escape(part).replace(r"\*", ".*") for part in _HOLE.sub("\0", text).split("\0")]
    self._regex = re.compile(r"(\d+)".join(parts))

  def match(self, name: str) -> tuple[tuple[str, int], ...] | None:
    """The integers, sorted by letter, or None."""
    found = self._regex.fullmatch(name)
    if found is None:
      return None
    values: dict[str, int] = {}
    for (factor, letter, shift), digits in zip(self._holes, found.groups(), strict=True):
      value, rest = divmod(int(digits) - shift, factor)
      if rest or value < 0 or values.setdefault(letter, value) != value:
        return None
    return tuple(sorted(values.items()))

  def fill(self, values: Iterable[tuple[str, int]]) -> str:
    known = dict(values)
    return _HOLE.sub(lambda m: str(int(m[1] or 1) * known[m[2]] + int(m[3] or 0)), self.text)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b": x} -> {"a": {"b": x}}."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def flatten(tree: PyTree, prefix: str = "") -> dict[str, Any]:
  """The inverse of `nest`, with `prefix` in front of the names."""
  out: dict[str, Any] = {}
  for key, value in tree.items():
    out |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
  return out
