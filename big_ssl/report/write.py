"""Writes `report.html`, and during a run the facts and pictures that it shows; a failure here never ends a run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import pathlib
import shlex
import sys
import time
from typing import Any

import jax

from big_ssl import __version__
from big_ssl.core.logger import Logger
from big_ssl.core.types import UserError
from big_ssl.evaluate import Extractor
from big_ssl.report.collect import FACTS, collect
from big_ssl.report.page import render
from big_ssl.setup import Run

_LISTED = 200  # images that could not be read
_LIBRARIES = ("jax", "flax", "optax", "numpy")


def write_page(workdir: pathlib.Path, *, to: pathlib.Path | None = None) -> pathlib.Path:
  """Writes WORKDIR/report.html, or `to`, from what the work directory holds, in one move.

  Raises:
    UserError: no config.json in it, or the file cannot be written.
  """
  file = to or workdir / "report.html"
  _replace(file, render(collect(workdir)))
  return file


def write_report(run: Run, workdir: pathlib.Path, logger: Logger, *, status: str, message: str = "", extract: Extractor | None = None) -> None:
  """Brings run.json and report.html up to date; every process calls it and the first writes.

  Args:
    status: "training", "finished", "stopped", "failed"; "evaluated" keeps what training wrote.
    message: of a failure.
    extract: draws the pictures of `config.report` of its state; None leaves those there are.
  """
  first = jax.process_index() == 0
  try:
    if extract is not None and run.config.report.pictures:
      _draw(run, workdir, logger, extract, first)
    if first:
      _replace(workdir / FACTS, json.dumps(_updated(run, workdir, logger, status, message), indent=2) + "\n")
      file = write_page(workdir)
      if extract is not None:
        logger.notice(f"wrote {file}")
  except Exception as error:  # a page is never worth a run
    logger.warning(f"report.html not written: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}")


def facts(run: Run) -> dict[str, Any]:
  """What run.json says of how a run was made; no paths but those of the command."""
  sources = {split: source.describe() for split, source in run.sources.items()}
  labels = run.sources["train"].labels
  labeled = labels is not None and bool((labels >= 0).any())
  devices = jax.devices()
  return {
    "method": type(run.method).__name__,
    "version": __version__,
    "libraries": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES),
    "devices": f"{run.mesh.size} x {devices[0].device_kind}",
    "processes": jax.process_count(),
    "seed": run.config.seed,
    "batch_size": run.config.batch_size,
    "total_steps": run.total_steps,
    "examples": run.examples,
    "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(run.abstract_state.params)),
    "data": sources | {"labels": labeled, "classes": int(labels.max()) + 1 if labeled else 0},
  }


def _updated(run: Run, workdir: pathlib.Path, logger: Logger, status: str, message: str) -> dict[str, Any]:
  """run.json as it is now: one session per process that trained, and the images that could not be read."""
  try:
    before = json.loads((workdir / FACTS).read_text())
  except (OSError, ValueError):
    before = {}
  now = time.strftime("%Y-%m-%d %H:%M", time.localtime())
  problems = sorted({tuple(p) for source in run.sources.values() for p in source.problems} | {tuple(p) for p in before.get("problems", [])})
  count = max(len(problems), before.get("problem_count", 0))
  found = {"problems": problems[:_LISTED], "problem_count": count, "written": now}
  if status == "evaluated" and before:
    return before | found
  started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(logger.started))
  session = {"started": started, "seconds": {k: round(v, 2) for k, v in logger.seconds().items()}}
  sessions = [s for s in before.get("sessions", []) if s["started"] != started]
  command = {} if status == "evaluated" else {"command": _command()}
  own = {"status": status, "message": message, "sessions": [*sessions, session] if status != "evaluated" else sessions}
  return facts(run) | command | own | found


def _command() -> str:
  program = pathlib.Path(sys.argv[0])
  start = "python -m big_ssl.main" if program.name == "main.py" else program.name
  return " ".join([start, *map(shlex.quote, sys.argv[1:])])


def _draw(run: Run, workdir: pathlib.Path, logger: Logger, extract: Extractor, write: bool) -> None:
  from big_ssl.visualize.kinds import draw_for_report
  from big_ssl.visualize.subject import Subject

  wanted = run.config.report
  draw_for_report(
    Subject(run, extract),
    workdir / "pictures",
    names=wanted.pictures,
    count=wanted.images,
    write=write,
    warn=logger.warning,
  )


def _replace(file: pathlib.Path, text: str) -> None:
  temporary = file.with_name(f"{file.name}.tmp")
  try:
    temporary.write_text(text)
    temporary.replace(file)
  except OSError as error:
    raise UserError(f"{file}: cannot be written: {error.strerror or error}.") from None
