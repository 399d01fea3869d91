"""What a run says: rows, lines, events and time."""

import contextlib
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core import logger as logger_lib
from big_ssl.core.logger import PARTS, Logger, peak_flops
from big_ssl.core.types import UserError


class Clock:
  """A clock that moves only when told, so that times in the tests are exact."""

  def __init__(self):
    self.now = 100.0

  def __call__(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(logger_lib.time, "perf_counter", clock)
  return clock


@pytest.fixture(autouse=True)
def no_tensorboard(request, monkeypatch):
  """Importing tensorflow takes seconds; only the tests of the events pay for it."""
  if "events" not in request.node.name:
    monkeypatch.setattr(Logger, "_scalars", lambda *_: None)


def make(workdir, **options) -> Logger:
  fields = {"total_steps": 400, "examples_per_epoch": 1000, "batch_size": 30, "terminal": False} | options
  return Logger(workdir, **fields)


def spend(logger, clock, **seconds) -> None:
  for part, duration in seconds.items():
    with logger.timer(part):
      clock.now += duration


def rows(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_row_holds_step_epoch_metrics_and_speed(tmp_path, clock):
  logger = make(tmp_path)
  spend(logger, clock, data=1.0, step=3.0)
  logger.log(40, {"loss": 4.5, "lr": 3e-4, "health": "healthy"})
  assert rows(tmp_path) == [
    {
      "step": 40,
      "epoch": 1.2,
      "loss": 4.5,
      "lr": 3e-4,
      "health": "healthy",
      "images_per_sec": 300.0,
      "data_wait_fraction": 0.25,
    }
  ]


def test_each_row_is_on_disk_before_the_next_step(tmp_path):
  logger = make(tmp_path)
  for step in range(1, 4):
    logger.log(step, {"loss": 1.0})
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, step + 1))


def test_a_plain_line_has_no_escape_codes_and_reads_as_documented(tmp_path, clock, capsys):
  logger = make(tmp_path, terminal=None)
  spend(logger, clock, data=0.12, step=3.88)
  logger.log(40, {"loss": 4.9131, "lr": 3e-4, "health": "healthy"})
  out = capsys.readouterr().out
  assert "\x1b" not in out
  line = "step 40/400  epoch 1.2  loss 4.913  lr 3.0e-04  300 img/s  data 3%  health: healthy  ETA 36s\n"
  assert out == line


@pytest.mark.parametrize("seconds,text", [(5.9, "5s"), (130, "2m10s"), (7265, "2h01m"), (-1, "0s")])
def test_durations_are_short(seconds, text):
  assert logger_lib._duration(seconds) == text


def test_speed_and_mfu_leave_out_evaluation_compilation_and_checkpoints(tmp_path, clock):
  logger = make(tmp_path)
  logger.flops(50.0, 1000.0)
  spend(logger, clock, compile=100.0, data=1.0, step=3.0, eval=50.0, checkpoint=20.0)
  clock.now += 10.0
  logger.log(40, {"loss": 1.0})
  (row,) = rows(tmp_path)
  assert row["images_per_sec"] == 300.0
  assert row["mfu"] == pytest.approx(50.0 * 40 / 4.0 / 1000.0)
  assert logger.summary().splitlines()[-1] == "300 images/s over 40 steps"


def test_a_row_measures_the_time_since_the_one_before(tmp_path, clock):
  logger = make(tmp_path)
  spend(logger, clock, step=1.0)
  logger.log(10, {})
  spend(logger, clock, data=1.0, step=1.0)
  logger.log(30, {})
  assert [r["images_per_sec"] for r in rows(tmp_path)] == [300.0, 300.0]
  assert [r["data_wait_fraction"] for r in rows(tmp_path)] == [0.0, 0.5]


def test_the_eta_counts_evaluations_but_not_compilation_or_what_came_before_the_resume(tmp_path, clock, capsys):
  logger = make(tmp_path)
  spend(logger, clock, checkpoint=500.0)
  logger.resume(300)
  spend(logger, clock, compile=1000.0, step=30.0, eval=20.0)
  clock.now += 100.0
  logger.log(350, {})
  assert capsys.readouterr().out.rstrip().endswith("ETA 50s")


def test_mfu_is_left_out_where_the_peak_is_unknown(tmp_path, clock, capsys):
  logger = make(tmp_path)
  logger.flops(50.0, peak_flops("cpu"))
  spend(logger, clock, step=1.0)
  logger.log(1, {"loss": 1.0})
  assert "mfu" not in rows(tmp_path)[0] and "mfu" not in capsys.readouterr().out


@pytest.mark.parametrize(
  "kind,peak",
  [
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("cpu", None),
    ("NVIDIA Something New", None),
  ],
)
def test_peaks_of_known_devices(kind, peak):
  assert peak_flops(kind) == peak


def test_an_inner_timer_pauses_the_outer_one(tmp_path, clock):
  logger = make(tmp_path)
  clock.now += 1.0
  with logger.timer("eval"):
    clock.now += 2.0
    with logger.timer("compile"):
      clock.now += 4.0
      with logger.timer("eval"):
        clock.now += 8.0
    clock.now += 16.0
  with contextlib.suppress(KeyError), logger.timer("data"):
    clock.now += 32.0
    raise KeyError
  clock.now += 64.0
  expected = {"eval": 26.0, "compile": 4.0, "data": 32.0, "other": 65.0}
  assert logger.seconds() == dict.fromkeys(PARTS, 0.0) | expected


def test_parts_add_up_to_the_wall_time_within_two_percent(tmp_path):
  start = time.perf_counter()
  logger = make(tmp_path)
  for _ in range(5):
    with logger.timer("data"):
      time.sleep(0.01)
    with logger.timer("step"), logger.timer("compile"):
      time.sleep(0.02)
    time.sleep(0.01)
  parts = sum(logger.seconds().values())
  wall = time.perf_counter() - start
  assert abs(parts - wall) <= 0.02 * wall, f"parts {parts:.4f} s, wall {wall:.4f} s"


def test_the_summary_has_seconds_and_share_of_every_part(tmp_path, clock):
  logger = make(tmp_path)
  spend(logger, clock, data=10.0, step=30.0, checkpoint=0.0, eval=40.0, compile=15.0)
  clock.now += 5.0
  lines = [line.split() for line in logger.summary().splitlines()]
  assert lines[0] == ["time", "seconds", "share"]
  assert [line[0] for line in lines[1:-1]] == [part for part in PARTS if part != "refresh"]  # few methods have one
  assert ["data", "10.0", "10.0%"] in lines and ["eval", "40.0", "40.0%"] in lines and ["other", "5.0", "5.0%"] in lines
  assert lines[-1] == ["wall", "100.0"]


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), np.float64("-inf"), jnp.float32(jnp.nan)])
def test_what_is_not_finite_is_null(tmp_path, value):
  logger = make(tmp_path)
  logger.log(1, {"loss": value, "grad_norm": 2.0})
  (row,) = rows(tmp_path)
  assert row["loss"] is None and row["grad_norm"] == 2.0
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_numbers_of_numpy_and_jax_are_written_as_numbers(tmp_path):
  logger = make(tmp_path)
  logger.log(1, {"a": np.float32(0.5), "b": np.int64(3), "c": jnp.float32(0.25), "d": np.bool_(True)})
  logger.log_eval(1, "knn", {"top1": np.float32(12.5)}, "k=10")
  first, second = rows(tmp_path)
  assert (first["a"], first["b"], first["c"], first["d"]) == (0.5, 3, 0.25, True)
  assert second == {"step": 1, "eval/knn/top1": 12.5, "eval/knn/protocol": "k=10"}


def test_an_evaluation_prints_its_protocol_next_to_its_numbers(tmp_path, capsys):
  make(tmp_path).log_eval(20, "knn", {"top1": 51.25, "top5": 80.0}, "pooled, k=10, temperature 0.07")
  out = capsys.readouterr().out
  assert "eval knn at step 20: pooled, k=10, temperature 0.07" in out and "top1   51.25" in out


def test_a_table_is_aligned(tmp_path, capsys):
  make(tmp_path).table("devices", [("name", "memory"), ("gpu", 141), ("long name", 7)])
  assert capsys.readouterr().out.splitlines() == [
    "devices",
    "name       memory",
    "gpu           141",
    "long name       7",
  ]


def test_resume_leaves_the_file_as_if_never_interrupted(tmp_path):
  whole, cut = tmp_path / "whole", tmp_path / "cut"

  def go(workdir, start, stop):
    logger = make(workdir)
    logger.resume(start)
    for step in range(start + 1, stop + 1):
      logger.log(step, {"loss": 1 / step})
      if step % 4 == 0:
        logger.log_eval(step, "knn", {"top1": float(step)}, "k=10")

  go(whole, 0, 10)
  go(cut, 0, 7)
  with (cut / "metrics.jsonl").open("a") as f:
    f.write('{"step": 8, "lo')
  go(cut, 4, 10)
  speed = ("images_per_sec", "data_wait_fraction")
  strip = lambda workdir: [{k: v for k, v in row.items() if k not in speed} for row in rows(workdir)]
  assert strip(cut) == strip(whole)
  assert [p.name for p in cut.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 3, "loss": 0.', "{", "12", '["step"]', '{"loss": 1.0}', "\x00\x00\xff"])
def test_a_torn_last_line_is_tolerated(tmp_path, torn):
  good = '{"step": 1, "loss": 1.0}\n'
  (tmp_path / "metrics.jsonl").write_text(good + torn)
  make(tmp_path).resume(2)
  assert (tmp_path / "metrics.jsonl").read_text() == good


def test_a_row_is_never_glued_to_a_torn_line(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
  make(tmp_path).log_eval(1, "knn", {"top1": 1.0}, "k=10")
  assert [sorted(row) for row in rows(tmp_path)] == [["loss", "step"], ["eval/knn/protocol", "eval/knn/top1", "step"]]


def test_resume_from_the_start_empties_the_file(tmp_path):
  make(tmp_path).log(2, {"loss": 1.0})
  make(tmp_path).resume(0)
  assert rows(tmp_path) == []


def test_a_finished_run_evaluated_again_has_one_row_of_it(tmp_path):
  for score in (1.0, 2.0):
    logger = make(tmp_path)
    logger.resume(10)
    logger.log_eval(10, "knn", {"top1": score}, "k=10")
    logger.log_eval(10, "lowshot", {"top1": score}, "C=0.1")
  assert [row.get("eval/knn/top1", row.get("eval/lowshot/top1")) for row in rows(tmp_path)] == [2.0, 2.0]


def test_a_failed_rewrite_leaves_the_file_untouched(tmp_path, monkeypatch):
  logger = make(tmp_path)
  logger.log(1, {"loss": 1.0})
  logger.log(2, {"loss": 2.0})
  before = (tmp_path / "metrics.jsonl").read_text()

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(logger_lib.os, "fsync", full)
  with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
    make(tmp_path).resume(1)
  assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_message_naming_the_file(tmp_path):
  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
    make(tmp_path).log(1, {"loss": 1.0})


def test_a_work_directory_below_a_file_is_one_message_naming_it(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file/work: cannot be written"):
    make(tmp_path / "file" / "work")


def test_a_directory_that_cannot_be_written_is_one_message_naming_the_file(tmp_path):
  (tmp_path / "metrics.jsonl").mkdir()
  with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
    make(tmp_path).log(1, {"loss": 1.0})


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
  logger = make(tmp_path / "work", write=False, terminal=True)
  with logger.timer("step"):
    pass
  logger.resume(0)
  logger.log(1, {"loss": 1.0})
  logger.log_eval(1, "knn", {"top1": 1.0}, "k=10")
  logger.notice("x")
  logger.warning("x")
  logger.table("x", [("a", "b")])
  logger.close()
  assert not (tmp_path / "work").exists() and capsys.readouterr().out == ""


def test_a_terminal_gets_a_live_bar_and_the_same_lines(tmp_path, monkeypatch):
  out = io.StringIO()
  monkeypatch.setattr(sys, "stdout", out)
  monkeypatch.setenv("TERM", "xterm-256color")
  logger = make(tmp_path, terminal=True)
  logger.log(40, {"loss": 4.9131, "a": "[red]x[/red]"})
  logger.notice("w" * 300)
  logger.close()
  logger.close()
  text = out.getvalue()
  assert "\x1b" in text and "step 40/400" in text and "w" * 300 in text


def test_events_are_written_for_tensorboard(tmp_path):
  logger = make(tmp_path)
  logger.log(1, {"loss": 1.5, "health": "healthy", "nan": math.nan})
  logger.log_eval(1, "knn", {"top1": 3.0}, "k=10")
  logger.close()
  (file,) = tmp_path.glob("events.out.tfevents.*")
  content = file.read_bytes()
  assert all(tag in content for tag in (b"loss", b"images_per_sec", b"eval/knn/top1")) and b"protocol" not in content


def test_failing_events_are_said_once_and_never_stop_a_run(tmp_path, capsys, monkeypatch):
  metric_writers = pytest.importorskip("clu.metric_writers")

  class Broken:
    def __init__(self, *_):
      pass

    def write_scalars(self, *_):
      raise RuntimeError("event file is gone")

  monkeypatch.setattr(metric_writers, "SummaryWriter", Broken)
  logger = make(tmp_path)
  for step in (1, 2, 3):
    logger.log(step, {"loss": 1.0})
  logger.close()
  assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
  assert capsys.readouterr().out.count("no TensorBoard events: event file is gone") == 1


def test_without_clu_events_are_left_out_and_the_rows_are_written(tmp_path):
  code = """
import sys
class Block:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("clu", "tensorflow", "tensorboard"):
      raise ImportError(f"no module {name}")
sys.meta_path.insert(0, Block())
from big_ssl.core.logger import Logger
logger = Logger(sys.argv[1], total_steps=2, examples_per_epoch=10, batch_size=5)
logger.log(1, {"loss": 1.0})
logger.log(2, {"loss": 0.5})
logger.close()
"""
  root = pathlib.Path(logger_lib.__file__).parents[2]
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("no TensorBoard events") == 1 and "step 2/2" in done.stdout and "\x1b" not in done.stdout
  assert [row["step"] for row in rows(tmp_path)] == [1, 2]
