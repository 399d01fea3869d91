"""`python -m big_ssl.suite --workdir=RUN --manifest=tasks.json`: one checkpoint on many data sets, as one table.

The manifest is a list of tasks; each is the run's own config on other data:

  [{"name": "pets", "data": "DIR/pets", "eval_fraction": 0.875, "evals": {"knn": {"k": 20}, "linear": {}}},
   {"name": "imagenet-a", "data": "DIR/imagenet", "eval_split": "imagenet-a", "evals": {"robustness": {}}}]

Nothing is downloaded. A task whose data are missing or do not fit is reported as skipped, with the reason. `results.json`
and `results.md` go to --out, by default RUN/suite, and are rewritten after every task.
Exit codes: 0 done, tasks may have been skipped; 2 bad manifest or no checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from big_ssl.core.command import exit_code

# What a task has no key for, such as `canvas`, is the run's; all that chooses images is the task's own.
_DATA_KEYS = {
  **{"data": "source", "data_dir": "dir", "split": "split", "eval_split": "eval_split", "eval_examples": "eval_examples"},
  **{name: name for name in ("labels_per_class", "labels_share", "labels_seed", "labels_file")},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One data set of a manifest.

  Attributes:
    name: in the table.
    data: as of --data.
    evals: evaluators and their fields, as `config.evals`.
    data_dir, split, eval_split: as of `config.data`; "" lets the source choose.
    eval_examples: the most held-out images; 0 is all.
    labels_per_class, labels_share, labels_seed, labels_file: as of `config.data`, which training images are used; those of
      the run are for its own data, so here all are where the task says nothing.
    eval_fraction: share of the shorter side that the evaluation crop keeps, 0 squashes the whole image; None is the run's.
  """

  name: str
  data: str
  evals: Mapping[str, Any]
  data_dir: str = ""
  split: str = ""
  eval_split: str = ""
  eval_examples: int = 0
  labels_per_class: int = 0
  labels_share: float = 0.0
  labels_seed: int = 0
  labels_file: str = ""
  eval_fraction: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One number, or a task or an evaluator without one.

  Attributes:
    task, evaluator, metric: names; "" where there is none.
    value: as the evaluator gives it, shares in percent.
    low, high: 95 % for the draw of the held-out images: the evaluator's own, or Wilson's for accuracies; None for others.
    n: held-out images, or what else the metric is a mean over, see `evals.base.Report.images`.
    protocol: of the evaluator, in words.
    seed: of the run.
    seconds: of the evaluator.
    skipped: why there is no number, or "".
  """

  task: str
  evaluator: str = ""
  metric: str = ""
  value: float | None = None
  low: float | None = None
  high: float | None = None
  n: int | None = None
  protocol: str = ""
  seed: int = 0
  seconds: float | None = None
  skipped: str = ""


def read_manifest(file: pathlib.Path) -> tuple[Task, ...]:
  """Raises `UserError` naming the file, the task and what is wrong with it."""
  from big_ssl.core.config import build
  from big_ssl.core.types import UserError

  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"--manifest={file}: cannot be read: {error.strerror}.") from None
  except ValueError as error:
    raise UserError(f"--manifest={file}: not JSON: {error}.") from None
  if not isinstance(found, list) or not found or not all(isinstance(t, dict) for t in found):
    raise UserError(f"--manifest={file}: expected a list of tasks such as [{{\"name\": ..., \"data\": ..., \"evals\": {{...}}}}].")
  for i, task in enumerate(found):
    missing = [key for key in ("name", "data", "evals") if not task.get(key)]
    if missing:
      raise UserError(f"--manifest={file}: task {i} has no {', '.join(missing)}.")
  tasks = tuple(build(Task, task, path=f"{file.name}:{task['name']}") for task in found)
  names = [task.name for task in tasks]
  if len(set(names)) < len(names):
    raise UserError(f"--manifest={file}: the name '{max(names, key=names.count)}' is there twice.")
  return tasks


def task_run(run: Any, task: Task) -> Any:
  """The run on the data of a task; raises `UserError` where these are missing or do not fit."""
  from big_ssl import setup
  from big_ssl.core.types import UserError

  data = dataclasses.replace(run.config.data, **{field: getattr(task, key) for key, field in _DATA_KEYS.items()})
  method, fields = run.method, dict(run.config.method)
  if task.eval_fraction is not None:
    if not hasattr(method, "eval_fraction"):
      raise UserError(f"{task.name}.eval_fraction={task.eval_fraction}: config.method.name={fields['name']} has no such field.")
    method, fields = method.replace(eval_fraction=task.eval_fraction), fields | {"eval_fraction": task.eval_fraction}
  config = dataclasses.replace(run.config, data=data, method=fields, evals=task.evals)
  return setup.on_other_data(dataclasses.replace(run, method=method), config)


def evaluate_task(run: Any, task: Task, state: Any, *, workdir: pathlib.Path, notice: Callable[[str], None]) -> list[Row]:
  """The rows of one task; what cannot be computed is a row that says why."""
  from big_ssl.core.types import UserError
  from big_ssl.evaluate import foreign_classes, keeping_extractor

  try:
    on_task = task_run(run, task)
  except UserError as error:
    return [Row(task=task.name, seed=run.config.seed, skipped=str(error))]
  extract = keeping_extractor(on_task, workdir, notice=notice)
  extract.state = state
  rows = []
  for name, evaluator in on_task.evaluators.items():
    common, start = {"task": task.name, "evaluator": name, "seed": run.config.seed}, time.perf_counter()
    try:
      report = evaluator(extract, mesh=on_task.mesh)
    except UserError as error:
      rows.append(Row(**common, skipped=str(error)))
      continue
    common |= {"protocol": report.protocol, "seconds": round(time.perf_counter() - start, 3)}
    if not report.metrics:
      why = foreign_classes(on_task)
      rows.append(Row(**common, skipped=f"{report.protocol}; {why}" if why else report.protocol))
    rows += metric_rows(report, images=_labeled_count(on_task), common=common)
  return rows


def _labeled_count(run: Any) -> int:
  source = run.sources["eval"]
  return len(source) if source.labels is None else int((source.labels >= 0).sum())


def metric_rows(report: Any, *, images: int, common: Mapping[str, Any]) -> list[Row]:
  """A row for each metric; those that are the ends of another's interval go with it."""
  metrics, counts = report.metrics, images if report.images is None else report.images
  rows = []
  for name, value in metrics.items():
    count = counts.get(name, images) if isinstance(counts, Mapping) else counts
    ends = [_end(name, end) for end in ("low", "high")]
    if any(name.endswith(end) and len(name) > len(end) + 1 for end in ("_low", "_high", "/low", "/high")):
      continue
    low, high = (metrics.get(end) for end in ends)
    if low is None:
      low, high = _wilson(name, value, count)
    group = metrics.get(f"{name.rpartition('/')[0]}/n") if _of_group(name) else None
    rows.append(Row(**common, metric=name, value=value, low=low, high=high, n=count if group is None else int(group)))
  return [row for row in rows if not row.metric.endswith("/n")]


def _end(name: str, end: str) -> str:
  """ "top1_masked" -> "top1_masked_low"; "group/a/top1" -> "group/a/low"."""
  return f"{name.rpartition('/')[0]}/{end}" if _of_group(name) else f"{name}_{end}"


def _of_group(name: str) -> bool:
  """Whether it is of one group of images, also of a baseline: "random_init/group/a/top1"."""
  return "group" in name.split("/")[:-1]


def _wilson(name: str, value: float, count: int) -> tuple[float | None, float | None]:
  from big_ssl.ops.group_scores import wilson

  accuracy = name.rpartition("/")[2].startswith(("top1", "top5")) and not name.endswith("_std")
  if not accuracy or not count or not 0 <= value <= 100:
    return None, None
  share = wilson(value / 100 * count, count=count)
  return share.low, share.high


def markdown(rows: Sequence[Row], *, title: str) -> str:
  """The table, the protocols under it, and what was skipped."""
  lines = [f"# {title}", "", "| task | evaluator | metric | value | 95 % | n | seed | seconds |", "|---|---|---|---|---|---|---|---|"]
  clean = lambda text: str(text).replace("|", "/").replace("\n", " ")
  for row in (r for r in rows if not r.skipped):
    interval = "-" if row.low is None else f"{row.low:.2f} - {row.high:.2f}"
    cells = (row.task, row.evaluator, row.metric, f"{row.value:.2f}", interval, row.n, row.seed, f"{row.seconds:.1f}")
    lines.append(f"| {' | '.join(map(clean, cells))} |")
  protocols = {(r.task, r.evaluator): r.protocol for r in rows if not r.skipped}
  if protocols:
    lines += ["", "## Protocols", ""] + [f"- {task}, {name}: {clean(text)}" for (task, name), text in protocols.items()]
  skipped = [r for r in rows if r.skipped]
  if skipped:
    names = [f"{r.task}, {r.evaluator}" if r.evaluator else r.task for r in skipped]
    lines += ["", "## Skipped", ""] + [f"- {name}: {clean(r.skipped)}" for name, r in zip(names, skipped, strict=True)]
  return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], directory: pathlib.Path, *, title: str) -> None:
  """results.json and results.md, each in one move."""
  from big_ssl.core.types import UserError

  texts = {"results.json": json.dumps([dataclasses.asdict(r) for r in rows], indent=1) + "\n", "results.md": markdown(rows, title=title)}
  try:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
      temporary = directory / f".{name}.tmp"
      temporary.write_text(text, encoding="utf-8")
      os.replace(temporary, directory / name)
  except OSError as error:
    raise UserError(f"--out={directory}: cannot be written: {error.strerror or error}.") from None


def run_suite(args: argparse.Namespace) -> int:
  """Evaluates every task on the checkpoint."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  from big_ssl import setup
  from big_ssl.core import config as config_lib
  from big_ssl.core.checkpoint import quiet_storage
  from big_ssl.core.logger import Logger
  from big_ssl.start import saved_state

  workdir = pathlib.Path(args.workdir)
  tasks = read_manifest(pathlib.Path(args.manifest))
  config, _ = config_lib.read(workdir)
  for task in tasks:  # a wrong field is told before the first task is computed
    setup.make_evaluators(dataclasses.replace(config, evals=task.evals))
  quiet_storage()
  setup.keep_compiled()
  run = setup.make_run(config)
  out = pathlib.Path(args.out) if args.out else workdir / "suite"
  logger = Logger(out, total_steps=run.total_steps, examples_per_epoch=run.examples, batch_size=config.batch_size, write=False)
  state = saved_state(run, workdir, logger, step=args.step)
  title = f"{workdir.resolve().name}, step {int(state.step)}, {config.method['name']} on {run.sources['train'].describe()['name']}"
  rows: list[Row] = []
  for task in tasks:
    found = evaluate_task(run, task, state, workdir=workdir, notice=print)
    for row in found:
      what = " ".join(part for part in (row.task, row.evaluator, row.metric) if part)
      print(f"{what}: skipped, {row.skipped}" if row.skipped else f"{what}: {row.value:.2f}", flush=True)
    rows += found
    write(rows, out, title=title)
  print(f"wrote {out / 'results.md'} and results.json")
  return 0


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="big_ssl.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="of a run with a checkpoint; its config.json is read")
  parser.add_argument("--manifest", required=True, help="JSON file of tasks")
  parser.add_argument("--out", default="", help="folder of the tables; default WORKDIR/suite")
  parser.add_argument("--step", type=int, default=None, help="of the checkpoint; default the newest")
  args = parser.parse_args(argv)
  return exit_code(lambda: run_suite(args))


if __name__ == "__main__":
  sys.exit(main())
