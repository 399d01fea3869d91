"""The page: one self-contained file without scripts; every word from outside goes through `html.escape`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from big_ssl.report import svg, words
from big_ssl.report.collect import BASELINES, Evaluation, Record, Shown
from big_ssl.report.style import CSS

# Curves that are shown at once; the others are behind a fold.
_MAIN = ("loss", "lr")
_HEALTH = ("std", "rank", "agreement", "target_entropy", "target_mean_entropy", "target_use", "teacher_entropy", "teacher_mean_entropy")
_SPEED = ("images_per_sec", "data_wait_fraction", "mfu")
_MOST_PROBLEMS = 200
_PARTS = {  # of `core.logger.PARTS`, in words
  "data": "waiting for data",
  "step": "training steps",
  "refresh": "clustering and memory",
  "checkpoint": "checkpoints",
  "eval": "evaluation",
  "compile": "compilation",
  "other": "start and the rest",
}
_KEYS = ("#4e79a7", "#59a14f", "#b07aa1", "#9c755f", "#f28e2b", "#e15759", "#8b8f94")


def render(record: Record) -> str:
  """HTML of a record, the same for the same record."""
  sections = (_evaluations, _curves, _health, _pictures, _speed, _data, _made, _config)
  body = "\n".join(part for section in sections if (part := section(record)))
  headline = words.headline(record)
  found = "".join(f"<li>{escape(sentence)}</li>" for sentence in words.findings(record))
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(f"{words.method(record)} on {words.data(record)}: {record.name}")}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{escape(headline)}</h1>
<p>{_chips(record)}</p>
<ul>{found}</ul>
</header>
{body}
</body>
</html>
"""


def _chips(record: Record) -> str:
  status = record.facts.get("status", "")
  chips = [("failed" if status == "failed" else "plain", status)] if status else []
  if record.verdicts:
    chips.append((record.verdicts[-1].state, record.verdicts[-1].state))
  made = record.facts.get("written", "")
  return "".join(f'<span class="chip {escape(kind)}">{escape(text)}</span>' for kind, text in chips) + (
    f'<span class="quiet">{escape(record.name)}{escape(f", {made}") if made else ""}</span>'
  )


def _section(title: str, *parts: str) -> str:
  inside = "\n".join(part for part in parts if part)
  return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kinds: Callable[[int], str] = lambda column: "") -> str:
  """Cells are text; they are escaped here."""
  cell = lambda i, text: f'<td class="{kinds(i)}">{escape(text)}</td>' if kinds(i) else f"<td>{escape(text)}</td>"
  lines = "".join(f"<tr>{''.join(cell(i, c) for i, c in enumerate(row))}</tr>" for row in rows)
  titles = "".join(f'<th class="{kinds(i)}">{escape(h)}</th>' if kinds(i) else f"<th>{escape(h)}</th>" for i, h in enumerate(head))
  return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _evaluations(record: Record) -> str:
  cards = "\n".join(_card(e) for e in sorted(record.latest, key=lambda e: not e.scores))  # what was not computed comes last
  return _section("Evaluation", f'<div class="cards">{cards}</div>' if cards else "")


def _card(evaluation: Evaluation) -> str:
  baselines = [p for p in BASELINES if any(k.startswith(p) for k in evaluation.scores)]
  rows = [
    [words.title(score), words.value(score, number), *(_cell(score, evaluation.baseline(p, score)) for p in baselines)]
    for score, number in evaluation.own.items()
  ]
  head = ["", "this run", *(BASELINES[p].replace("initialization", "init") for p in baselines)]
  table = _table(head, rows, kinds=lambda column: "best" if column == 1 else "") if rows else ""
  name = escape(words.title(evaluation.name))
  step = f'<span class="quiet">step {evaluation.step:,}</span>'
  return f'<div class="card"><h3>{name} {step}</h3>{table}<p class="protocol">{escape(evaluation.protocol)}</p></div>'


def _cell(score: str, number: float | None) -> str:
  return "-" if number is None else words.value(score, number)


def _curves(record: Record) -> str:
  charts = [svg.curve(record.series(key), title=words.title(key)) for key in _MAIN if record.series(key)]
  charts += _score_curves(record)
  others = [k for k in record.numbers() if k not in (*_MAIN, *_HEALTH, *_SPEED, "epoch", "skipped", "nonfinite")]
  rest = "".join(svg.curve(record.series(key), title=words.title(key)) for key in others)
  fold = f'<details><summary>All {len(others)} other numbers of training</summary><div class="charts">{rest}</div></details>' if rest else ""
  return _section("Curves", _charts(charts), fold)


def _score_curves(record: Record) -> list[str]:
  """Of every score that was evaluated more than once, with its baselines as dashed lines."""
  charts = []
  for latest in record.latest:
    every = [e for e in record.evaluations if e.name == latest.name]
    for score in latest.own if len(every) > 1 else ():
      points = [(e.step, e.scores.get(score)) for e in every]
      marks = [(v, text) for p, text in BASELINES.items() if (v := latest.baseline(p, score)) is not None]
      percent = ", %" if words.is_percent(score) else ""
      charts.append(svg.curve(points, title=f"{words.title(latest.name)} {words.title(score)}{percent}", marks=marks))
  return charts


def _charts(charts: Sequence[str]) -> str:
  return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _health(record: Record) -> str:
  band = svg.strip([(v.step, v.state) for v in record.verdicts])
  spans: list[list[Any]] = []  # first step, last step, verdict
  for verdict in record.verdicts:
    kind = verdict.message.partition(":")[0].partition("(")[0]
    if spans and spans[-1][2].state == verdict.state and spans[-1][3] == kind:
      spans[-1][1:3] = [verdict.step, verdict]
    else:
      spans.append([verdict.step, verdict.step, verdict, kind])
  rows = [(f"{a:,} to {b:,}" if a != b else f"{a:,}", v.state, f"{v.message} {v.hint}".strip()) for a, b, v, _ in spans[-30:]]
  table = _table(("steps", "verdict", "finding"), rows, kinds=lambda column: "text" if column == 2 else "word") if rows else ""
  charts = [svg.curve(record.series(key), title=words.title(key)) for key in _HEALTH if record.series(key)]
  return _section("Health", band, table, _charts(charts))


def _pictures(record: Record) -> str:
  return _section("Pictures", *map(_picture, record.pictures))


def _picture(shown: Shown) -> str:
  source = f"data:{shown.media};base64,{base64.b64encode(shown.data).decode()}"
  size = f'width="{shown.width}" height="{shown.height}"'
  image = f'<img src="{source}" {size} alt="{escape(shown.caption or shown.name)}">'
  title = escape(words.title(shown.name).capitalize() if shown.name != "pca" else "PCA of patch features")
  return f'<figure class="picture"><h3>{title}</h3><div class="scroll">{image}</div><figcaption>{escape(shown.caption)}</figcaption></figure>'


def _speed(record: Record) -> str:
  seconds: dict[str, float] = {}
  for session in record.facts.get("sessions", []):
    for part, amount in session.get("seconds", {}).items():
      seconds[part] = seconds.get(part, 0.0) + amount
  total, split = sum(seconds.values()), ""
  if total > 0:
    named = [(_PARTS.get(part, part), amount) for part, amount in seconds.items()]
    rows = "".join(
      f'<tr><td><span class="key" style="background:{_KEYS[i % len(_KEYS)]}"></span>{escape(name)}</td>'
      f"<td>{amount:,.1f} s</td><td>{amount / total:.1%}</td></tr>"
      for i, (name, amount) in enumerate(named)
    )
    whole = f"<tr><td>in all</td><td>{total:,.1f} s</td><td></td></tr>"
    table = f'<div class="scroll"><table><tbody>{rows}{whole}</tbody></table></div>'
    split = f"<h3>Where the time went</h3>{svg.bar(named)}{table}"
  charts = [svg.curve(record.series(key), title=words.title(key)) for key in _SPEED if record.series(key)]
  return _section("Speed", _charts(charts), split)


def _data(record: Record) -> str:
  described = record.facts.get("data", {})
  entries = []
  for split in ("train", "eval"):
    if found := described.get(split):
      hashed = f", content hash {found['hash']}" if found.get("hash") else ""
      entries.append((split, f"{found.get('name')}: {found.get('count', 0):,} images{hashed}"))
  if "labels" in described:
    entries.append(("labels", f"{described.get('classes', 0):,} classes" if described["labels"] else "none"))
  problems = record.facts.get("problems", [])
  count = record.facts.get("problem_count", len(problems))
  rows = [(str(name), str(reason)) for name, reason in problems[:_MOST_PROBLEMS]]
  listed = _table(("skipped image", "reason"), rows, kinds=lambda column: "text") if rows else ""
  more = f'<p class="quiet">and {count - len(rows):,} more</p>' if count > len(rows) else ""
  clean = '<p class="quiet">No image was found that could not be read.</p>' if described and not count else ""
  return _section("Data", _list(entries), listed, more, clean)


def _made(record: Record) -> str:
  facts = record.facts
  names = ("command", "version", "libraries", "devices", "processes", "seed", "batch_size", "parameters")
  entries = [(words.title(name), f"{facts[name]:,}" if name == "parameters" else str(facts[name])) for name in names if name in facts]
  if not facts and "seed" in record.config:
    entries = [("seed", str(record.config["seed"]))]
  return _section("How it was made", _list(entries))


def _config(record: Record) -> str:
  text = json.dumps(record.config, indent=2, default=str)
  return _section("Config", f"<details open><summary>config.json</summary><pre>{escape(text)}</pre></details>")


def _list(entries: Sequence[tuple[str, str]]) -> str:
  return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in entries)}</dl>" if entries else ""
