"""What a work directory says about its run: config.json, metrics.jsonl, run.json and pictures/*.png."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from big_ssl.core import config as config_lib
from big_ssl.core import health
from big_ssl.core.types import UserError

FACTS = "run.json"
BASELINES = {
  **{"random_init/": "random initialization", "raw_pixels/": "raw pixels", "raw_colors/": "mean colors of patches"},
  "first_mask/": "the first mask kept",
}
_FIRST = ("knn", "linear")
_ORDER = ("attention", "pca", "neighbors", "embedding", "prototypes", "views")
_LARGE = 150_000  # bytes of a PNG above which the page has it as JPEG


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One evaluation: its scores by name, baselines under their prefixes, and its protocol."""

  name: str
  step: int
  scores: dict[str, float]
  protocol: str

  def baseline(self, prefix: str, score: str) -> float | None:
    return self.scores.get(prefix + score)

  @property
  def own(self) -> dict[str, float]:
    """Without the baselines."""
    return {k: v for k, v in self.scores.items() if not k.startswith(tuple(BASELINES))}


@dataclasses.dataclass(frozen=True)
class Verdict:
  step: int
  state: str
  message: str
  hint: str


@dataclasses.dataclass(frozen=True)
class Shown:
  """A picture: its file's bytes and media type, its size in pixels and what it shows."""

  name: str
  data: bytes
  media: str
  width: int
  height: int
  caption: str


@dataclasses.dataclass(frozen=True)
class Record:
  """Of a run.

  Attributes:
    name: of the work directory.
    config: as in config.json.
    facts: of run.json, see `write.facts`; {} for a run that left none.
    lines: of training, by step.
    evaluations: by step, all of them.
    verdicts: one per line that has one.
    pictures: of pictures/.
  """

  name: str
  config: dict[str, Any]
  facts: dict[str, Any]
  lines: list[dict[str, Any]]
  evaluations: list[Evaluation]
  verdicts: list[Verdict]
  pictures: list[Shown]

  @property
  def last_step(self) -> int:
    steps = [line["step"] for line in self.lines] + [e.step for e in self.evaluations]
    return max(steps, default=0)

  @property
  def latest(self) -> list[Evaluation]:
    """The last evaluation of every evaluator: k-NN, the linear probe, then the others in the order of their first."""
    found = {e.name: e for e in self.evaluations}
    return sorted(found.values(), key=lambda e: _FIRST.index(e.name) if e.name in _FIRST else len(_FIRST))

  def series(self, key: str) -> list[tuple[float, float | None]]:
    """(step, value) of a logged number; None where it was not finite."""
    return [(line["step"], line[key]) for line in self.lines if key in line]

  def numbers(self) -> list[str]:
    """Names of all numbers that training logged, in the order of their first line."""
    found = {k: None for line in self.lines for k, v in line.items() if v is None or isinstance(v, (int, float))}
    return [k for k in found if k != "step"]


def collect(workdir: pathlib.Path) -> Record:
  """Reads a work directory; torn or foreign lines of metrics.jsonl are left out.

  Raises:
    UserError: there is no config.json, or it cannot be read.
  """
  config = _json(workdir / "config.json")
  if config is None:
    raise UserError(f"--workdir={workdir}: no config.json in it that can be read; expected the work directory of a run.")
  rows = _rows(workdir / "metrics.jsonl")
  lines = [row for row in rows if "loss" in row]
  return Record(
    name=workdir.resolve().name,
    config=config,
    facts=_json(workdir / FACTS) or {},
    lines=lines,
    evaluations=[e for row in rows if (e := _evaluation(row)) is not None],
    verdicts=_verdicts(lines, config.get("health", {})),
    pictures=_pictures(workdir / "pictures"),
  )


def _json(file: pathlib.Path) -> dict[str, Any] | None:
  try:
    found = json.loads(file.read_text())
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def _rows(file: pathlib.Path) -> list[dict[str, Any]]:
  try:
    text = file.read_text(errors="replace")
  except OSError:
    return []
  rows = []
  for line in text.splitlines():
    try:
      row = json.loads(line)
    except ValueError:
      continue
    if isinstance(row, dict) and isinstance(row.get("step"), int):
      rows.append(row)
  return sorted(rows, key=lambda row: row["step"])


def _evaluation(row: Mapping[str, Any]) -> Evaluation | None:
  """The evaluation of a row; the row of `core.logger.Logger.log_eval` has one evaluator."""
  keys = [k for k in row if k.startswith("eval/") and k.endswith("/protocol")]
  if not keys:
    return None
  name = keys[0].split("/")[1]
  prefix = f"eval/{name}/"
  scores = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix) and isinstance(v, (int, float))}
  return Evaluation(name, row["step"], scores, str(row[keys[0]]))


def _verdicts(lines: Sequence[Mapping[str, Any]], thresholds: Any) -> list[Verdict]:
  """The logged verdicts, with their words by the thresholds of the run."""
  try:
    limits = config_lib.build(health.HealthConfig, thresholds, path="config.health")
  except UserError:  # of another version
    limits = health.HealthConfig()
  found = []
  for line in lines:
    if "health" not in line:
      continue
    numbers = {k: math.nan if v is None else float(v) for k, v in line.items() if v is None or isinstance(v, (int, float))}
    judged = health.judge(numbers, thresholds=limits)
    same = judged.state == line["health"]
    found.append(Verdict(line["step"], line["health"], judged.message if same else "", judged.hint if same else ""))
  return found


def _pictures(directory: pathlib.Path) -> list[Shown]:
  """The PNG files of a folder by name, those of the known kinds first; what is no picture is left out."""
  from PIL import Image

  place = lambda file: (_ORDER.index(file.stem) if file.stem in _ORDER else len(_ORDER), file.stem)
  shown = []
  for file in sorted(directory.glob("*.png"), key=place):
    try:
      data, media = file.read_bytes(), "image/png"
      with Image.open(io.BytesIO(data)) as image:
        image.load()
        caption, size = str(getattr(image, "text", {}).get("Description", "")), image.size
        if len(data) > _LARGE:
          smaller = io.BytesIO()
          image.convert("RGB").save(smaller, format="JPEG", quality=85, subsampling=0)
          data, media = smaller.getvalue(), "image/jpeg"
    except (OSError, SyntaxError):  # Pillow raises both for damaged files
      continue
    shown.append(Shown(file.stem, data, media, *size, caption))
  return shown
