"""One markdown table of the last evaluations of many runs: `python -m big_ssl.table RUNS`, RUNS/<method>-<seed> each a work directory."""

from __future__ import annotations

import argparse
import collections
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Sequence

_YARDSTICKS = ("random_init", "raw_pixels")


def last_scores(workdir: pathlib.Path) -> dict[str, float]:
  """{"knn/top1_k20": percent, ...} of the evaluation at the last logged step; nothing where that has not been evaluated."""
  file = workdir / "metrics.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
  last = max((row["step"] for row in rows if "loss" in row), default=-1)
  scores = {}
  for row in rows:
    if row["step"] == last:
      scores |= {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/") and isinstance(v, (int, float))}
  return scores


def collect(runs: pathlib.Path) -> dict[str, dict[str, list[float]]]:
  """{method: {score: one value per seed}} of the runs that have been evaluated."""
  found: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: collections.defaultdict(list))
  for workdir in sorted(p for p in runs.iterdir() if p.is_dir()):
    method, _, _ = workdir.name.rpartition("-")
    for key, value in last_scores(workdir).items():
      found[method][key].append(value)
  return found


def markdown(found: dict[str, dict[str, list[float]]]) -> str:
  """Methods by their first score, best first; the yardsticks, which are the same network untrained and the pixels, last."""
  keys = [k for k in sorted({k for scores in found.values() for k in scores}) if "top1" in k and not any(y in k for y in _YARDSTICKS)]
  rows = [(name, [_mean(scores.get(k, [])) for k in keys], max(map(len, scores.values()))) for name, scores in found.items() if scores]
  rows.sort(key=lambda row: [-v for v in row[1]])
  lines = [f"| Method | {' | '.join(keys)} | seeds |", "|---|" + "---|" * (len(keys) + 1)]
  for name, _, seeds in rows:
    lines.append(f"| {name} | {' | '.join(_cell(found[name].get(k, [])) for k in keys)} | {seeds} |")
  for yardstick in _YARDSTICKS:
    values = [[v for scores in found.values() for v in scores.get(_of(k, yardstick), [])] for k in keys]
    if any(values):
      lines.append(f"| *{yardstick.replace('_', ' ')}* | {' | '.join(map(_cell, values))} | |")
  return "\n".join(lines)


def _of(key: str, yardstick: str) -> str:
  evaluator, _, score = key.partition("/")
  return f"{evaluator}/{yardstick}/{score}"


def _mean(values: Sequence[float]) -> float:
  return statistics.fmean(values) if values else -math.inf


def _cell(values: Sequence[float]) -> str:
  if not values:
    return "-"
  spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
  return f"{statistics.fmean(values):.1f}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m big_ssl.table", description=__doc__)
  parser.add_argument("runs", type=pathlib.Path)
  runs = parser.parse_args(argv).runs
  if not runs.is_dir():
    print(f"error: {runs}: no such folder of runs.", file=sys.stderr)
    return 2
  print(markdown(collect(runs)))
  return 0


if __name__ == "__main__":
  sys.exit(main())
