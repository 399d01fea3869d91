"""`python -m big_ssl.main --config=configs/msn.py`: flags -> config -> dataclasses -> mode."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from big_ssl.core.command import exit_code

DESCRIPTION = """Self-supervised vision in JAX: every system on one engine.

Any config key is a flag: --config.optim.lr=3e-4 --config.total=40steps
Exit codes: 0 done; 2 bad config or input; 3 stopped by a signal after saving (run again to continue); 4 training failed."""


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
  """The flags, and the `--config.a.b=value` overrides as {"a.b": "value"}."""
  parser = argparse.ArgumentParser(
    prog="big_ssl.main", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--config", required=True, help="config file, with an optional argument: configs/msn.py:cifar10; or RUN/config.json")
  parser.add_argument("--workdir", default="", help="where the run is written; default runs/<config>")
  parser.add_argument("--mode", default="train", choices=("train", "eval", "extract", "check"), help="check prints the plan and stops")
  parser.add_argument("--devices", type=int, default=0, help="with --mode=check: plan for this many devices, simulated")
  parser.add_argument("--data", default="", help="folder, tar or glob of tars, .npz, TFRecord glob, tfds:name, or sprites")
  parser.add_argument("--data_dir", default="", help="root of prepared TFDS data sets")
  parser.add_argument("--step", type=int, default=None, help="with eval and extract: the checkpoint to read; default the newest")
  parser.add_argument("--coordinator", default="", help="HOST:PORT of process 0, or auto on a cluster")
  parser.add_argument("--num_processes", type=int, default=1)
  parser.add_argument("--process_id", type=int, default=0)
  parser.add_argument("--start_timeout", type=int, default=120, help="seconds to wait for the other processes")
  overrides, rest, items = {}, [], iter(argv)
  for item in items:
    if item.startswith("--config."):
      key, equals, value = item[len("--config.") :].partition("=")
      if not equals:
        value = next(items, None)
        if value is None:
          parser.error(f"{item}: a value is missing")
      overrides[key] = value
    else:
      rest.append(item)
  return parser.parse_args(rest), overrides


def run_mode(args: argparse.Namespace, overrides: dict[str, str]) -> int:
  """Imports what the mode needs and runs it."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # tensorflow only decodes here; this silences its notice
  if args.devices:
    _simulate(args)
  from big_ssl.core import collectives, sharding
  from big_ssl.core import config as config_lib

  if args.data:
    overrides = {"data.source": args.data} | overrides
  if args.data_dir:
    overrides = {"data.dir": args.data_dir} | overrides
  config, tree = config_lib.load(args.config, overrides)
  if args.coordinator:
    sharding.start_processes(
      args.coordinator, num_processes=args.num_processes, process_id=args.process_id, timeout_s=args.start_timeout
    )
    sharding.check_topology(json.dumps(tree, sort_keys=True, default=str))

  from big_ssl import setup
  from big_ssl.core.checkpoint import quiet_storage

  quiet_storage()
  setup.keep_compiled()
  run = setup.make_run(config)
  if args.mode == "check":
    print(run.describe(), flush=True)
    if run.mesh.size > 1:
      print(collectives.summary(run.compiled_step().as_text()))
    else:
      run.trace_steps()
    return 0
  workdir = pathlib.Path(args.workdir or _workdir(args))
  record = functools.partial(_record, workdir, tree)
  return _train(run, workdir, record) if args.mode == "train" else _read(run, workdir, args, record)


def _record(workdir: pathlib.Path, tree: dict[str, Any]) -> None:
  """Writes config.json, from which reports, pictures and exports read what the weights in `workdir` are."""
  import jax

  from big_ssl.core.types import UserError

  file = workdir / "config.json"
  temporary = file.with_suffix(".tmp")
  if jax.process_index() == 0:
    try:
      temporary.write_text(json.dumps(tree, indent=2, default=str) + "\n")
      temporary.replace(file)
    except OSError as error:
      raise UserError(f"{file}: cannot be written: {error.strerror}.") from None


def _simulate(args: argparse.Namespace) -> None:
  """Before jax starts: as many devices on the CPU as asked for, of which a check needs only the names."""
  from big_ssl.core.types import UserError

  if args.mode != "check" or args.devices < 1:
    raise UserError(f"--devices={args.devices}: simulated devices are for --mode=check, and at least 1.")
  os.environ["JAX_PLATFORMS"] = "cpu"
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={args.devices}".strip()


def _workdir(args: argparse.Namespace) -> pathlib.Path:
  """Where a run without --workdir is: beside its config.json, or in runs/ by its config and data."""
  file, _, argument = args.config.partition(":")
  if file.endswith(".json"):
    return pathlib.Path(file).parent
  data = "".join(c if c.isalnum() else "_" for c in args.data).strip("_")
  return pathlib.Path("runs") / "-".join(part for part in (pathlib.Path(file).stem, argument, data) if part)


def _make_logger(run, workdir: pathlib.Path):
  import jax

  from big_ssl.core.logger import Logger

  return Logger(
    workdir,
    total_steps=run.total_steps,
    examples_per_epoch=run.examples,
    batch_size=run.config.batch_size,
    write=jax.process_index() == 0,
    terminal=None,
  )


def _train(run, workdir: pathlib.Path, record: Callable[[], None]) -> int:
  from big_ssl import train

  logger = _make_logger(run, workdir)
  try:
    logger.notice(run.describe())
    logger.notice(f"work directory {workdir}")
    code = train.train(run, workdir, logger, accepted=record)
    logger.notice(logger.summary())
    return code
  finally:
    logger.close()


def _read(run, workdir: pathlib.Path, args: argparse.Namespace, record: Callable[[], None]) -> int:
  from big_ssl import evaluate
  from big_ssl.report.write import write_report
  from big_ssl.start import has_checkpoint, saved_state

  trained_here = has_checkpoint(run, workdir)  # else the folder holds the evaluation of other weights, and may be new
  logger = _make_logger(run, workdir)
  try:
    state = saved_state(run, workdir, logger, step=args.step)
    if not trained_here:
      record()
    extract = evaluate.keeping_extractor(run, workdir, notice=logger.notice)
    if args.mode == "eval":
      refused = evaluate.evaluate(run, extract, state, names=list(run.evaluators), logger=logger, step=int(state.step))
      write_report(run, workdir, logger, status="evaluated", extract=extract)
      return 2 if refused else 0
    for file in evaluate.extract_to(workdir, run, extract, state):
      logger.notice(f"wrote {file}")
    return 0
  finally:
    logger.close()


def main(argv: list[str] | None = None) -> int:
  args, overrides = parse(sys.argv[1:] if argv is None else argv)
  # Ctrl-C before the loop listens, or a second time in it.
  told = "interrupted; what was saved before is intact, run the same command to continue"
  return exit_code(lambda: run_mode(args, overrides), interrupted=told)


if __name__ == "__main__":
  sys.exit(main())
