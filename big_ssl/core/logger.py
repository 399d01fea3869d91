"""What a run says: a line per log step, metrics.jsonl, TensorBoard events, and where the time went."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from big_ssl.core.types import UserError

PARTS = ("data", "step", "checkpoint", "eval", "compile", "other")
_PEAK_FLOPS = {  # dense bfloat16, from the vendors' data sheets
  "H200": 989e12,
  "H100": 989e12,
  "A100": 312e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Peak dense bfloat16 FLOP/s of one device, or None where it is not known (CPU)."""
  return next((v for k, v in _PEAK_FLOPS.items() if k in device_kind), None)


class Logger:
  """Writes a run's numbers; only the process with `write` does.

  Args:
    workdir: of the run; metrics.jsonl and TensorBoard events go here.
    total_steps, examples_per_epoch, batch_size: for epoch, speed and ETA.
    write: whether this process writes and prints.
    terminal: show a live progress bar; None decides by whether stdout is a terminal.
  """

  def __init__(self, workdir: pathlib.Path, *, total_steps: int, examples_per_epoch: int, batch_size: int, write: bool = True, terminal: bool | None = None):
    self._total, self._examples, self._batch_size, self._write = total_steps, examples_per_epoch, batch_size, write
    self._directory = pathlib.Path(workdir)
    self._file = self._directory / "metrics.jsonl"
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._stack = ["other"]
    self._mark = self._start = time.perf_counter()
    self._last: dict[str, float] = dict(self._seconds)
    self._first_step = self._last_step = 0
    self._flops = self._peak = None
    self._writer: Any = None
    if write:
      self._directory.mkdir(parents=True, exist_ok=True)
    self._progress = _bar(total_steps) if write and (sys.stdout.isatty() if terminal is None else terminal) else None

  # Time

  @contextlib.contextmanager
  def timer(self, part: str) -> Iterator[None]:
    """Counts the time inside to `part`; an inner timer pauses the outer one, so that parts add up to the wall time."""
    self._switch()
    self._stack.append(part)
    try:
      yield
    finally:
      self._switch()
      self._stack.pop()

  def _switch(self) -> None:
    now = time.perf_counter()
    self._seconds[self._stack[-1]] += now - self._mark
    self._mark = now

  def summary(self) -> str:
    """Seconds and share of every part, and images per second of training."""
    self._switch()
    wall = time.perf_counter() - self._start
    lines = ["time        seconds   share"]
    lines += [f"{part:<10} {self._seconds[part]:>8.1f} {self._seconds[part] / max(wall, 1e-9):>7.1%}" for part in PARTS]
    lines.append(f"{'wall':<10} {wall:>8.1f}")
    steps, training = self._last_step - self._first_step, self._seconds["data"] + self._seconds["step"]
    if steps > 0:
      lines.append(f"{steps * self._batch_size / max(training, 1e-9):,.0f} images/s over {steps} steps")
    return "\n".join(lines)

  def flops(self, per_step: float | None, peak: float | None) -> None:
    """FLOPs of a step on one device and the device's peak, for `mfu`."""
    self._flops, self._peak = per_step, peak

  # Numbers

  def resume(self, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, torn ones too, as if the run had never been cut off."""
    self._first_step = self._last_step = step
    if self._progress:
      self._progress.update(0, completed=step)
    if not self._write or not self._file.exists():
      return
    kept = []
    for line in self._file.read_text(errors="replace").splitlines():
      with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
        if json.loads(line)["step"] <= step:
          kept.append(line)
    temporary = self._file.with_suffix(".tmp")
    self._guard(lambda: (temporary.write_text("".join(k + "\n" for k in kept)), os.replace(temporary, self._file)))

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    """One line: the metrics, the epoch, speed, share of the time spent waiting for data, and the ETA."""
    self._switch()
    spent = {k: v - self._last[k] for k, v in self._seconds.items()}
    self._last = dict(self._seconds)
    training = spent["data"] + spent["step"]
    steps = step - self._last_step
    self._last_step = step
    rate = steps * self._batch_size / training if training > 0 else 0.0
    row = {"step": step, "epoch": step * self._batch_size / max(self._examples, 1)} | metrics
    row |= {"images_per_sec": rate, "data_wait_fraction": spent["data"] / training if training > 0 else 0.0}
    if self._flops and self._peak and spent["step"] > 0:
      row["mfu"] = self._flops * steps / spent["step"] / self._peak
    self._append(row)
    self._scalars(step, row)
    remaining = (self._total - step) * training / max(steps, 1)
    line = f"step {step}/{self._total}  epoch {row['epoch']:.2f}  loss {metrics.get('loss', math.nan):.4f}  lr {metrics.get('lr', 0.0):.2e}"
    line += f"  {rate:,.0f} img/s  data {row['data_wait_fraction']:.0%}"
    line += f"  health: {metrics['health']}" if "health" in metrics else ""
    self._say(f"{line}  ETA {_duration(remaining)}")
    if self._progress:
      self._progress.update(0, completed=step)

  def log_eval(self, step: int, name: str, metrics: dict[str, float], protocol: str) -> None:
    """An evaluation: its numbers, and its protocol beside them."""
    row = {"step": step} | {f"eval/{name}/{k}": v for k, v in metrics.items()} | {f"eval/{name}/protocol": protocol}
    self._append(row)
    self._scalars(step, {k: v for k, v in row.items() if k not in ("step", f"eval/{name}/protocol")})
    width = max((len(k) for k in metrics), default=0)
    self._say("\n".join([f"eval {name} at step {step}: {protocol}", *(f"  {k:<{width}}  {v:6.2f}" for k, v in metrics.items())]))

  def _append(self, row: dict[str, Any]) -> None:
    if not self._write:
      return
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}

    def write() -> None:
      with self._file.open("a") as f:
        f.write(json.dumps(clean) + "\n")

    self._guard(write)

  def _guard(self, write: Any) -> None:
    try:
      write()
    except OSError as error:
      raise UserError(f"{self._file}: cannot be written: {error.strerror or error}.") from None

  def _scalars(self, step: int, row: dict[str, Any]) -> None:
    """TensorBoard through clu; a missing or failing writer is said once and never stops a run."""
    if not self._write or self._writer is False:
      return
    try:
      if self._writer is None:
        from clu import metric_writers

        self._writer = metric_writers.SummaryWriter(str(self._directory))
      values = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
      self._writer.write_scalars(step, values)
      self._writer.flush()
    except Exception as error:  # tensorflow and its file systems raise many kinds
      self._writer = False
      self.notice(f"no TensorBoard events: {str(error).splitlines()[0][:160] if str(error) else type(error).__name__}")

  # Words

  def notice(self, text: str) -> None:
    self._say(text)

  def warning(self, text: str) -> None:
    self._say(f"warning: {text}")

  def _say(self, text: str) -> None:
    if not self._write:
      return
    if self._progress:
      self._progress.console.print(text, markup=False, highlight=False)
    else:
      print(text, flush=True)

  def close(self) -> None:
    if self._progress:
      self._progress.stop()
    if self._writer:
      with contextlib.suppress(Exception):  # the numbers are in metrics.jsonl
        self._writer.close()
    self._writer = False


def _bar(total: int) -> Any:
  try:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
  except ImportError:
    return None
  progress = Progress(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
  progress.add_task("training", total=total)
  progress.start()
  return progress


def _duration(seconds: float) -> str:
  seconds = int(max(seconds, 0))
  hours, minutes = seconds // 3600, seconds % 3600 // 60
  return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"
