"""What a run says: a line per log step, metrics.jsonl, TensorBoard events, and where the time went."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from big_ssl.core.types import UserError

PARTS = ("data", "step", "refresh", "checkpoint", "eval", "compile", "other")
_PEAK_FLOPS = {  # dense bfloat16 FLOP/s of one device, from the vendors' data sheets
  "H200": 989e12,
  "H100": 989e12,
  "H100 PCIe": 756e12,
  "H100 NVL": 835e12,
  "A100": 312e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,  # the v5p's own name
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Peak dense bfloat16 FLOP/s of one device, or None where it is not known (CPU)."""
  known = [kind for kind in _PEAK_FLOPS if kind in device_kind]
  return _PEAK_FLOPS[max(known, key=len)] if known else None


class Logger:
  """Writes a run's numbers; only the process with `write` does.

  Args:
    workdir: of the run; metrics.jsonl and TensorBoard events go here.
    total_steps, examples_per_epoch, batch_size: for epoch, speed and ETA.
    write: whether this process writes and prints.
    terminal: show a live progress bar; None decides by whether stdout is a terminal.

  Raises:
    UserError: `workdir` or metrics.jsonl cannot be written (here and from every method that logs).
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    total_steps: int,
    examples_per_epoch: int,
    batch_size: int,
    write: bool = True,
    terminal: bool | None = None,
  ):
    self._total, self._examples, self._batch_size, self._write = total_steps, examples_per_epoch, batch_size, write
    self._directory = pathlib.Path(workdir)
    self._file = self._directory / "metrics.jsonl"
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._stack = ["other"]
    self._mark = self._start = time.perf_counter()
    self.started = time.time()
    self._last: dict[str, float] = dict(self._seconds)
    self._resumed: dict[str, float] = dict(self._seconds)
    self._first_step = self._last_step = 0
    self._flops: float | None = None
    self._peak: float | None = None
    self._whole_lines = False  # whether the end of metrics.jsonl has been looked at
    self._writer: Any = None  # False after it failed or was closed
    if write:
      with _one_line_error(self._directory):
        self._directory.mkdir(parents=True, exist_ok=True)
    terminal = sys.stdout.isatty() if terminal is None else terminal
    self._progress = _bar(total_steps) if write and terminal else None

  # Time

  @contextlib.contextmanager
  def timer(self, part: str) -> Iterator[None]:
    """Counts the time inside to `part`; an inner timer pauses the outer one, so that parts add up to the wall time."""
    assert part in PARTS, part
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

  def seconds(self) -> dict[str, float]:
    """Seconds of every part of `PARTS` until now; their sum is the wall time."""
    self._switch()
    return dict(self._seconds)

  def summary(self) -> str:
    """Seconds and share of every part, and images per second of training (data and step alone)."""
    seconds = self.seconds()
    wall = sum(seconds.values())
    rows = [(part, f"{s:.1f}", f"{s / max(wall, 1e-9):.1%}") for part, s in seconds.items() if part != "refresh" or s]
    text = _columns(("time", "seconds", "share"), [*rows, ("wall", f"{wall:.1f}", "")])
    # Until the last line: a run that is stopped between lines has worked on steps that none has counted.
    steps, training = self._last_step - self._first_step, self._last["data"] + self._last["step"]
    if steps > 0:
      text += f"\n{steps * self._batch_size / max(training, 1e-9):,.0f} images/s over {steps} steps"
    return text

  def flops(self, per_step: float | None, peak: float | None) -> None:
    """FLOPs of a step on one device and the device's peak, for `mfu`; None where not known."""
    self._flops, self._peak = per_step, peak

  # Numbers

  def resume(self, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, torn ones too, as if the run had never been cut off."""
    self._first_step = self._last_step = step
    self._resumed = self._last = self.seconds()
    if self._progress:
      self._progress.update(0, completed=step)
    self._keep(lambda row: row["step"] <= step)

  def log(self, step: int, metrics: dict[str, Any]) -> None:
    """One line: the metrics, the epoch, speed, share of the time spent waiting for data, and the ETA.

    Speed and utilization (`mfu`) are over the time of data and step since the last line; compilation, checkpoints
    and evaluations do not count.

    Args:
      step: finished updates.
      metrics: scalars by name, "loss" and "lr" among them; a word such as "health" is kept as it is.
    """
    seconds = self.seconds()
    data, update = (seconds[part] - self._last[part] for part in ("data", "step"))
    training, steps = data + update, step - self._last_step
    self._last, self._last_step = seconds, step
    rate = steps * self._batch_size / training if training > 0 else 0.0
    row = {"step": step, "epoch": step * self._batch_size / max(self._examples, 1)}
    row |= {name: _plain(value) for name, value in metrics.items()}
    row |= {"images_per_sec": rate, "data_wait_fraction": data / training if training > 0 else 0.0}
    if self._flops and self._peak and training > 0:
      row["mfu"] = self._flops * steps / training / self._peak
    self._append(row)
    self._scalars(step, row)
    self._say(self._line(row))
    if self._progress:
      self._progress.update(0, completed=step)

  def _line(self, row: dict[str, Any]) -> str:
    parts = [f"step {row['step']}/{self._total}", f"epoch {row['epoch']:.1f}"]
    parts += [f"loss {row['loss']:.3f}"] if "loss" in row else []
    parts += [f"lr {row['lr']:.1e}"] if "lr" in row else []
    parts += [f"{row['images_per_sec']:,.0f} img/s", f"data {row['data_wait_fraction']:.0%}"]
    parts += [f"mfu {row['mfu']:.1%}"] if "mfu" in row else []
    parts += [f"health: {row['health']}"] if "health" in row else []
    # With evaluations and checkpoints, which come again; compilation and slow imports ("other") do not.
    pace = sum(self._seconds[part] - self._resumed[part] for part in ("data", "step", "checkpoint", "eval"))
    steps = row["step"] - self._first_step
    parts += [f"ETA {_duration(pace / steps * (self._total - row['step']))}"] if steps > 0 else []
    return "  ".join(parts)

  def log_eval(self, step: int, name: str, metrics: dict[str, float], protocol: str) -> None:
    """An evaluation: its numbers, and its protocol beside them.

    Done again at the same step, it replaces the line that is there.
    """
    key = f"eval/{name}/protocol"
    self._keep(lambda row: row["step"] != step or key not in row)
    scores = {k: _plain(v) for k, v in metrics.items()}
    row = {"step": step} | {f"eval/{name}/{k}": v for k, v in scores.items()} | {key: protocol}
    self._append(row)
    self._scalars(step, row)
    width = max((len(k) for k in scores), default=0)
    lines = [f"  {k:<{width}}  {v:6.2f}" for k, v in scores.items()]
    self._say("\n".join([f"eval {name} at step {step}: {protocol}", *lines]))

  def _append(self, row: dict[str, Any]) -> None:
    if not self._write:
      return
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with _one_line_error(self._file):
      if not self._whole_lines:
        _cut_torn_line(self._file)
        self._whole_lines = True
      with self._file.open("a") as f:
        f.write(json.dumps(clean, allow_nan=False) + "\n")

  def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites metrics.jsonl with the wanted rows alone, in one move; a line that is not a row is dropped."""
    if not self._write:
      return
    with _one_line_error(self._file):
      if not self._file.is_file():
        return
      lines, kept = self._file.read_text(errors="replace").splitlines(), []
      for line in lines:
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
          if wanted(json.loads(line)):
            kept.append(line)
      temporary = self._file.with_suffix(".tmp")
      with temporary.open("w") as f:
        f.write("".join(k + "\n" for k in kept))
        f.flush()
        os.fsync(f.fileno())
      os.replace(temporary, self._file)

  def _scalars(self, step: int, row: dict[str, Any]) -> None:
    """TensorBoard through clu; a missing or failing writer is said once and never stops a run."""
    if not self._write or self._writer is False:
      return
    try:
      if self._writer is None:
        from clu import metric_writers

        with contextlib.suppress(KeyError, RuntimeError):  # tensorflow would take the memory of the GPUs
          sys.modules["tensorflow"].config.set_visible_devices([], "GPU")
        self._writer = metric_writers.SummaryWriter(str(self._directory))
      scalars = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
      self._writer.write_scalars(step, scalars)
      self._writer.flush()
    except Exception as error:  # tensorflow and its file systems raise many kinds
      self._writer = False
      self.notice(f"no TensorBoard events: {next(iter(str(error).splitlines()), type(error).__name__)[:160]}")

  # Words

  def notice(self, text: str) -> None:
    self._say(text)

  def warning(self, text: str) -> None:
    self._say(f"warning: {text}")

  def table(self, title: str, rows: Sequence[Sequence[Any]]) -> None:
    """Prints `rows` under `title` in aligned columns; the first row is the head."""
    head, *body = [[str(cell) for cell in row] for row in rows] or [[]]
    self._say(f"{title}\n{_columns(head, body)}")

  def _say(self, text: str) -> None:
    if not self._write:
      return
    if self._progress:
      self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
      print(text, flush=True)

  def close(self) -> None:
    """Ends the bar and the event file; a second call does nothing."""
    if self._progress:
      self._progress.stop()
      self._progress = None
    if self._writer:
      with contextlib.suppress(Exception):  # the numbers are in metrics.jsonl
        self._writer.close()
    self._writer = False


@contextlib.contextmanager
def _one_line_error(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f"{path}: cannot be written: {error.strerror or error}.") from None


def _cut_torn_line(file: pathlib.Path) -> None:
  """Cuts what a killed process left after the last whole line: the next row would be glued to it."""
  if not file.is_file():
    return
  with file.open("rb+") as f:
    size = f.seek(0, os.SEEK_END)
    start = max(0, size - 2**20)  # far more than a row
    f.seek(start)
    tail = f.read(size - start)
    f.truncate(start + tail.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
  """Numbers of numpy and jax as Python's own, which JSON takes."""
  return value.item() if hasattr(value, "item") else value


def _columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Left column flush left, the others flush right."""
  lines = [head, *rows]
  widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(max(map(len, lines)))]
  aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=False)] for line in lines]
  for line, cells in zip(lines, aligned, strict=True):
    cells[:1] = [line[0].ljust(widths[0])] if line else []
  return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def _bar(total: int) -> Any:
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

  columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
  progress = Progress(*columns, console=Console(force_terminal=True), transient=True, refresh_per_second=2)
  progress.add_task("training", total=total)
  progress.start()
  return progress


def _duration(seconds: float) -> str:
  seconds = int(max(seconds, 0))
  hours, minutes = seconds // 3600, seconds % 3600 // 60
  return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"
