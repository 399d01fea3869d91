"""THE training loop."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from big_ssl.core import health
from big_ssl.core.checkpoint import Checkpointer
from big_ssl.core.logger import Logger, peak_flops
from big_ssl.core.types import TrainState
from big_ssl.evaluate import Extractor, evaluate, refresh
from big_ssl.report.write import write_report
from big_ssl.setup import Run
from big_ssl.start import start_state

DONE, STOPPED, FAILED = 0, 3, 4
_MAX_SKIPPED_LOGS = 3  # so many log lines in a row with a skipped step end the run


class StopRequest:
  """Remembers SIGTERM and Ctrl-C until the step or the evaluator is finished; a second Ctrl-C ends at once."""

  def __init__(self):
    self.signal: str | None = None
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, self._remember)

  def _remember(self, number: int, frame: Any) -> None:
    del frame
    if self.signal == "SIGINT" and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = signal.Signals(number).name
    again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
    with contextlib.suppress(OSError):  # not by print, which refuses to be called while it is at work
      os.write(2, f"{self.signal}: the run is saved and stops after this step or evaluator{again}\n".encode())

  def reached(self, step: int) -> bool:
    """Whether to stop after `step`; all processes agree on the step."""
    return (jax.process_count() == 1 or step % 8 == 0) and self.agreed()

  def agreed(self) -> bool:
    """Whether any process was told to stop; all must ask at the same point."""
    mine = self.signal is not None
    return bool(np.max(multihost_utils.process_allgather(np.int32(mine)))) if jax.process_count() > 1 else mine


def judge(run: Run, logger: Logger, metrics: dict[str, float], previous: str) -> health.Verdict:
  """The health verdict on one line of metrics; a change of state is a warning in the log."""
  if metrics["skipped"]:
    index = int(metrics["nonfinite"])
    tensor = run.optimizer.tensors[index].path if index >= 0 else "the loss"
    logger.warning(f"step skipped: not finite, first in {tensor}")
  verdict = health.judge(metrics, thresholds=run.config.health)
  if verdict.state != previous and verdict.state != "healthy":
    state = f", {verdict.state}" if verdict.state == "collapsed" else ""
    logger.warning(f"health{state}: {verdict.message} {verdict.hint}")
  return verdict


def evaluate_until_told(
  run: Run, extract: Extractor, state: TrainState, names: Sequence[str], *, logger: Logger, stop: StopRequest
) -> bool:
  """Runs the named evaluators one by one, as long as no signal has come; returns whether all were run."""
  with logger.timer("eval"):
    for name in names:
      if stop.agreed():
        return False
      evaluate(run, extract, state, names=[name], logger=logger, step=int(state.step))
  return True


def not_evaluated(workdir: pathlib.Path, names: Sequence[str], *, step: int) -> list[str]:
  """Those of the evaluators without a line of `step` in metrics.jsonl: a run that was cut off in an evaluation has saved before."""
  missing = np.ones(len(names), np.int32)
  if jax.process_index() == 0 and (file := workdir / "metrics.jsonl").is_file():
    rows = [row for row in map(json.loads, file.read_text().splitlines()) if row["step"] == step]
    missing = np.array([not any(f"eval/{name}/protocol" in row for row in rows) for name in names], np.int32)
  if jax.process_count() > 1:
    missing = multihost_utils.broadcast_one_to_all(missing)
  return [name for name, lacks in zip(names, missing, strict=True) if lacks]


def _stopped(run: Run, workdir: pathlib.Path, logger: Logger, checkpointer: Checkpointer, *, step: int, stop: StopRequest) -> int:
  with logger.timer("checkpoint"):
    checkpointer.close()
  logger.notice(f"stopped by {stop.signal or 'another process'} after saving step {step}; run the same command to continue")
  write_report(run, workdir, logger, status="stopped")
  return STOPPED


def train(run: Run, workdir: pathlib.Path, logger: Logger, *, accepted: Callable[[], None] = lambda: None) -> int:
  """Trains to the end, to a signal or to a failure; returns the exit code.

  Args:
    accepted: called once it is known that what is in `workdir` is of this run, before anything is trained.
  """
  config, total = run.config, run.total_steps
  log_every, save_every = run.steps(config.log_every), run.steps(config.checkpoint.every)
  keep_every = config.checkpoint.keep_period(batch_size=config.batch_size, examples=run.examples)
  eval_every = {name: run.steps(e.every) if e.every else total for name, e in run.evaluators.items()}
  stop, extract = StopRequest(), Extractor(run)
  checkpointer = Checkpointer(workdir, keep_last=config.checkpoint.keep_last, keep_every=keep_every)
  state, refreshed = start_state(run, checkpointer, logger)
  start = int(state.step)
  accepted()
  logger.resume(start)

  if start < total:
    with logger.timer("data"):
      resident = run.resident
    with logger.timer("compile"), jax.set_mesh(run.mesh):
      traced, peak = run.trace_steps(), peak_flops(jax.devices()[0].device_kind)
      step_fns = {patch: t.lower().compile() for patch, t in zip(run.methods, traced, strict=True)}
      if peak is not None:
        logger.flops(run.step_flops(traced), peak)

  metrics, verdict_state, skipped_logs, saved = None, "", 0, start
  refreshes = run.method.refresh_steps()
  due = [name for name, every in eval_every.items() if start % every == 0] if 0 < start < total else []
  if due and (due := not_evaluated(workdir, due, step=start)):
    if not evaluate_until_told(run, extract, state, due, logger=logger, stop=stop) or stop.agreed():
      return _stopped(run, workdir, logger, checkpointer, step=start, stop=stop)
    extract.forget()
  for step in range(start, total):
    if step in refreshes:  # a checkpoint of this step holds the state before
      with logger.timer("refresh"):
        state, refreshed = refresh(run, extract, state)
    if step in refreshes or step == start:
      batches = run.batches(step, run.boundary_after(step), state.extra)
    with logger.timer("data"):
      raw = next(batches)
    with logger.timer("step"), jax.transfer_guard("disallow"):
      jax.block_until_ready(metrics)  # one step in flight, no more
      state, metrics = step_fns[run.patch_at(step)](state, raw, resident)
    done = step + 1

    if done % log_every == 0 or done == total:
      with logger.timer("step"):
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
      verdict = judge(run, logger, values, verdict_state)
      verdict_state = verdict.state
      patch = {"patch": run.patch_at(step)} if len(step_fns) > 1 else {}
      logger.log(done, values | refreshed | patch | {"health": verdict.state})
      skipped_logs = skipped_logs + 1 if values["skipped"] else 0
      collapsed = verdict.state == "collapsed" and config.health.stop_on_collapse
      if skipped_logs >= _MAX_SKIPPED_LOGS or collapsed:
        with logger.timer("checkpoint"):
          checkpointer.close()
        failure = f"training failed at step {done}: {verdict.message} {verdict.hint} Last good checkpoint: step {saved}."
        logger.warning(failure)
        write_report(run, workdir, logger, status="failed", message=failure)
        return FAILED

    stopping = stop.reached(done)
    due = [name for name, every in eval_every.items() if done % every == 0 or done == total]
    if done % save_every == 0 or done == total or stopping or due:  # an evaluation may take long, and be cut off
      with logger.timer("checkpoint"):
        checkpointer.save(state, meta=run.meta() | {"refreshed": refreshed})
        saved = done
    if stopping and done < total:
      return _stopped(run, workdir, logger, checkpointer, step=done, stop=stop)

    if due:
      if not evaluate_until_told(run, extract, state, due, logger=logger, stop=stop) or (done < total and stop.agreed()):
        return _stopped(run, workdir, logger, checkpointer, step=done, stop=stop)
      with logger.timer("eval"):
        write_report(run, workdir, logger, status="training")
      if done < total:
        extract.forget()  # its memory is training's again

  if start >= total:
    logger.notice(f"already trained for {total} steps; evaluating")
    if not evaluate_until_told(run, extract, state, list(run.evaluators), logger=logger, stop=stop):
      return _stopped(run, workdir, logger, checkpointer, step=total, stop=stop)
  with logger.timer("checkpoint"):
    checkpointer.close()
  if problems := run.sources["train"].problems:
    listed = [f"skipped image {name}: {reason}" for name, reason in problems]
    logger.notice("\n".join([*listed, f"{len(problems)} of {run.examples:,} images could not be read and were skipped"]))
  with logger.timer("eval"):
    extract.state = state
    write_report(run, workdir, logger, status="finished", extract=extract)
  return DONE
