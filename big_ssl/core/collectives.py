"""What a compiled step sends between devices, read from its program text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BITS = {"pred": 8, "bf16": 16, "f16": 16}  # others say their bits: f32, s64, u8
_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(")
_CALL = re.compile(r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Of one kind of collective in one step on one device: how often it runs and the bytes of its results."""

  kind: str
  count: int
  bytes: int


@dataclasses.dataclass
class _Computation:
  collectives: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # kind, bytes
  calls: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # computation, times


def traffic(program: str) -> tuple[Traffic, ...]:
  """The collectives of a program in XLA's text form (`compiled.as_text()`); what a loop repeats counts as often."""
  computations, entry = _parse(program)
  total: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])

  def visit(name: str, times: int) -> None:
    for kind, size in computations[name].collectives:
      total[kind][0] += times
      total[kind][1] += times * size
    for callee, repeats in computations[name].calls:
      if callee in computations:
        visit(callee, times * repeats)

  visit(entry, 1)
  return tuple(Traffic(kind, *total[kind]) for kind in KINDS if kind in total)


def _parse(program: str) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  current, entry = _Computation(), ""
  for line in program.splitlines():
    if not line.startswith(" ") and (head := _HEAD.match(line)):
      current = computations.setdefault(head[2], _Computation())
      entry = head[2] if head[1] else entry
      continue
    if found := _COLLECTIVE.search(line):
      current.collectives.append((found[2], _result_bytes(found[1], started=bool(found[3]))))
      continue  # its to_apply is the addition of two numbers
    trips = _TRIPS.search(line)
    times = int(trips[1]) if trips else 1
    current.calls += [(name, times) for name in _CALL.findall(line)]
    for names in _BRANCHES.findall(line):
      current.calls += [(name.strip().lstrip("%"), 1) for name in names.split(",")]
  return computations, entry


def _result_bytes(shapes: str, *, started: bool) -> int:
  """Bytes of "f32[8,4]{1,0}" or of a tuple; an asynchronous start gives (operands, results), whose last is the result."""
  sizes = [
    math.prod(int(n) for n in dims.split(",") if n) * (_BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8)) // 8
    for kind, dims in _SHAPE.findall(shapes)
  ]
  return max(sizes, default=0) if started else sum(sizes)


def summary(program: str) -> str:
  """One line per kind."""
  found = traffic(program)
  if not found:
    return "a step sends nothing between devices"
  lines = [f"  {t.kind:18} {t.count:6,} times {t.bytes / 2**20:12,.1f} MiB" for t in found]
  return "\n".join(["collectives of a step, results per device:", *lines])
