"""Curves as inline SVG: no script, colors from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 22
_POINTS = 300  # drawn of a series; the extremes of what is left out are kept

Point = tuple[float, float | None]


def curve(points: Sequence[Point], *, title: str, marks: Sequence[tuple[float, str]] = ()) -> str:
  """A chart of (step, value); None is a gap. `marks` are dashed horizontal lines with their names."""
  known = [v for _, v in points if _finite(v)]
  if not known:
    return f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption><p class="quiet">no finite value</p></figure>'
  low, high = min([*known, *(m for m, _ in marks)]), max([*known, *(m for m, _ in marks)])
  ticks = nice_ticks(low, high)
  low, high = min(low, ticks[0]), max(high, ticks[-1])
  first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
  across = lambda step: _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)
  up = lambda v: _HEIGHT - _BOTTOM - (v - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
  parts = [_tick(up(t), number(t)) for t in ticks]
  parts += [f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(m):.1f}" y2="{up(m):.1f}"/>' for m, _ in marks]
  parts += [
    f'<text class="marked" x="{_WIDTH - _RIGHT}" y="{up(m) - 3:.1f}" text-anchor="end">{html.escape(name)}</text>' for m, name in marks
  ]
  drawn = thin(points)
  for part in _segments(drawn):
    if len(part) > 1:
      parts.append('<polyline class="line" points="' + " ".join(f"{across(s):.1f},{up(v):.1f}" for s, v in part) + '"/>')
  if len(drawn) <= 60:
    parts += [
      f'<circle class="dot" cx="{across(s):.1f}" cy="{up(v):.1f}" r="2.2"><title>step {s:,}: {number(v)}</title></circle>'
      for s, v in drawn
      if _finite(v)
    ]
  parts += [
    f'<text class="tick" x="{_LEFT}" y="{_HEIGHT - 6}">{first:,}</text>',
    f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">step {last:,}</text>',
  ]
  latest = f'<span class="latest">{number(known[-1])}</span>'
  body = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
  return f'<figure class="chart"><figcaption>{html.escape(title)} {latest}</figcaption>{body}</figure>'


def strip(states: Sequence[tuple[int, str]]) -> str:
  """A band over the steps, colored by state; each (step, state) is what was found since the one before."""
  if not states:
    return ""
  first, last = 0, max(states[-1][0], 1)
  across = lambda step: (step - first) / (last - first) * _WIDTH
  parts, start = [], first
  for i, (end, state) in enumerate(states):
    if i + 1 < len(states) and states[i + 1][1] == state:
      continue
    shape = f'x="{across(start):.1f}" y="0" width="{max(across(end) - across(start), 0.5):.1f}" height="14"'
    parts.append(f'<rect class="state {html.escape(state)}" {shape}><title>{html.escape(state)} to step {end:,}</title></rect>')
    start = end
  return f'<svg class="strip" viewBox="0 0 {_WIDTH} 14" preserveAspectRatio="none" role="img" aria-label="health over time">{"".join(parts)}</svg>'


def bar(shares: Sequence[tuple[str, float]]) -> str:
  """One stacked bar of named amounts."""
  total, at, parts = sum(v for _, v in shares) or 1.0, 0.0, []
  for i, (name, amount) in enumerate(shares):
    width = amount / total * _WIDTH
    shape = f'x="{at:.1f}" y="0" width="{width:.1f}" height="14"'
    parts.append(f'<rect class="part p{i}" {shape}><title>{html.escape(name)}: {amount / total:.1%}</title></rect>')
    at += width
  return f'<svg class="strip" viewBox="0 0 {_WIDTH} 14" preserveAspectRatio="none" role="img" aria-label="shares of the time">{"".join(parts)}</svg>'


def thin(points: Sequence[Point]) -> list[Point]:
  """At most about `_POINTS` of them: of each stretch its smallest and its largest, so that no spike is lost."""
  if len(points) <= _POINTS:
    return list(points)
  size = math.ceil(2 * len(points) / _POINTS)
  kept = []
  for start in range(0, len(points), size):
    part = points[start : start + size]
    known = [p for p in part if _finite(p[1])]
    ends = {min(known, key=lambda p: p[1]), max(known, key=lambda p: p[1])} if known else {part[0]}
    kept += sorted(ends, key=lambda p: p[0])
  return kept


def nice_ticks(low: float, high: float, *, count: int = 4) -> list[float]:
  """About `count` round numbers, multiples of 1, 2 or 5 times a power of ten, from at most `low` to at least `high`."""
  if high - low < 1e-12 * max(abs(high), 1e-300):
    span = abs(high) or 1.0
    low, high = low - 0.1 * span, high + 0.1 * span
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def number(value: float) -> str:
  """Short: 4 digits, thousands apart."""
  if value and not 1e-3 <= abs(value) < 1e6:
    return f"{value:.3g}"
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(value: float | None) -> bool:
  return value is not None and math.isfinite(value)


def _segments(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
  parts: list[list[tuple[float, float]]] = [[]]
  for at, value in points:
    if _finite(value):
      parts[-1].append((at, value))
    elif parts[-1]:
      parts.append([])
  return [part for part in parts if part]


def _tick(y: float, text: str) -> str:
  line = f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
  return f'{line}<text class="tick" x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
