"""What a signal, a kill or a refusal leaves of a run: no evaluation is lost, and each is stopped between two evaluators."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable

import engine
import pytest

from big_ssl import main, train
from big_ssl.core.logger import Logger
from big_ssl.core.types import Interval, UserError
from big_ssl.evals.base import Report

TOTAL = 4


@dataclasses.dataclass(frozen=True)
class Told:
  """An evaluator that notes its calls, and does something at one step."""

  name: str
  calls: list
  every: Interval = Interval(2, "steps")
  at: int = -1
  do: Callable[[], None] = lambda: None

  def __call__(self, extract, *, mesh):
    del mesh
    step = int(extract.state.step)
    self.calls.append(f"{self.name}{step}")
    if step == self.at:
      self.do()
    return Report({} if self.name == "a" else {"score": float(step)}, "as told")


class Ready:
  """A step that is compiled already."""

  def __init__(self, compiled):
    self.compile = lambda: compiled
    self.trace = self.lower = lambda *shapes: self


@pytest.fixture(autouse=True)
def _handlers():
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


def launch(workdir, calls, *, name="msn", accepted=lambda: None, at=-1, do=None, **overrides):
  """`train.train` with evaluators "a", which does as told at one step, and "b"."""
  made = engine.compiled(engine.small(name, total=f"{TOTAL}steps", **{"checkpoint.every": "9steps", "model.depth": 1} | overrides))
  told = {"a": Told("a", calls, at=at, do=do), "b": Told("b", calls)}
  run = dataclasses.replace(made.run, evaluators=told)
  run.__dict__.update(_fresh=made.run._fresh, resident=made.run.resident, jit_step=lambda patch: Ready(made.steps[patch]))
  logger = Logger(workdir, total_steps=TOTAL, examples_per_epoch=run.examples, batch_size=16, terminal=False)
  try:
    return train.train(run, workdir, logger, accepted=accepted)
  finally:
    logger.close()


def rows(workdir) -> list[str]:
  """"loss1", "a2" and so on."""
  found = []
  for row in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
    names = [k.split("/")[1] for k in row if k.endswith("/protocol")] or ["loss"]
    found.append(f"{names[0]}{row['step']}")
  return found


def losses(workdir) -> list[float]:
  return [row["loss"] for row in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


WHOLE = ["loss1", "loss2", "a2", "b2", "loss3", "loss4", "a4", "b4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir, calls = tmp_path_factory.mktemp("whole"), []
  assert launch(workdir, calls) == train.DONE
  assert rows(workdir) == WHOLE and calls == ["a2", "b2", "a4", "b4"]
  return losses(workdir)


def saved(workdir, step):
  return (workdir / "checkpoints" / str(step)).is_dir()


@pytest.mark.parametrize("number,again", [(signal.SIGTERM, ""), (signal.SIGINT, "; Ctrl-C again ends it at once")], ids=["TERM", "INT"])
def test_a_signal_in_an_evaluation_stops_before_the_next_and_the_same_command_makes_up_for_it(tmp_path, whole, capfd, number, again):
  calls = []
  assert launch(tmp_path, calls, at=2, do=lambda: os.kill(os.getpid(), number)) == train.STOPPED
  said = capfd.readouterr()
  assert said.err == f"{number.name}: the run is saved and stops after this step or evaluator{again}\n"
  assert f"stopped by {number.name} after saving step 2; run the same command to continue" in said.out
  assert calls == ["a2"] and rows(tmp_path) == ["loss1", "loss2", "a2"] and saved(tmp_path, 2)
  assert launch(tmp_path, calls) == train.DONE
  assert calls == ["a2", "b2", "a4", "b4"] and rows(tmp_path) == WHOLE and losses(tmp_path) == whole


def test_the_numbers_of_a_refresh_are_in_the_lines_after_a_resume_too(tmp_path):
  overrides = engine.few_clusters(engine.load("deepcluster_v2")) | {"data.train_examples": 80}  # 5 steps per epoch
  stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
  assert launch(tmp_path, [], name="deepcluster_v2", at=2, do=stop, **overrides) == train.STOPPED
  assert launch(tmp_path, [], name="deepcluster_v2", **overrides) == train.DONE
  lines = [row for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
  refreshed = [{k: v for k, v in row.items() if k.startswith("refresh/")} for row in lines]
  assert len(lines) == TOTAL and refreshed[0] and refreshed == refreshed[:1] * TOTAL, refreshed


def test_a_signal_in_the_final_evaluation_is_no_finished_run(tmp_path, whole):
  calls = []
  assert launch(tmp_path, calls, at=TOTAL, do=lambda: os.kill(os.getpid(), signal.SIGTERM)) == train.STOPPED
  assert rows(tmp_path) == WHOLE[:-1] and saved(tmp_path, TOTAL)
  assert launch(tmp_path, calls) == train.DONE
  assert rows(tmp_path) == WHOLE and losses(tmp_path) == whole


def test_an_evaluation_that_was_killed_is_made_up_for(tmp_path, whole):
  def killed():
    until = time.monotonic() + 20
    while not saved(tmp_path, 2) and time.monotonic() < until:
      time.sleep(0.01)
    raise RuntimeError("killed")

  calls = []
  with pytest.raises(RuntimeError, match="killed"):
    launch(tmp_path, calls, at=2, do=killed)
  assert rows(tmp_path) == ["loss1", "loss2"] and calls == ["a2"]
  calls.clear()
  assert launch(tmp_path, calls) == train.DONE
  assert calls == ["a2", "b2", "a4", "b4"] and rows(tmp_path) == WHOLE and losses(tmp_path) == whole


def test_a_run_is_accepted_when_it_can_start_and_before_its_first_line(tmp_path):
  found, calls = [], []
  accepted = lambda: found.append((saved(tmp_path, 0), (tmp_path / "metrics.jsonl").exists()))
  assert launch(tmp_path, calls, accepted=accepted) == train.DONE and found == [(True, False)]
  with pytest.raises(UserError, match="made with seed=0, this run has seed=1"):
    launch(tmp_path, calls, accepted=accepted, seed=1)
  assert len(found) == 1


def test_a_command_that_is_refused_leaves_the_config_of_the_run(tmp_path, capsys):
  engine.saved("msn", tmp_path)
  before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  flags = [f"--config.{k}={v}" for k, v in (engine.SMALL | engine.TINY["vit"] | {"method.num_prototypes": 32}).items()]
  for mode in ("train", "eval"):
    assert main.main(["--config=configs/msn.py", f"--workdir={tmp_path}", f"--mode={mode}", *flags]) == 2
    assert "does not fit this config. different" in capsys.readouterr().err
  after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
  assert after == {p: t for p, t in before.items() if p.is_file()}


def test_a_mistyped_folder_is_not_made(tmp_path, capsys):
  flags = [f"--config.{k}={v}" for k, v in (engine.SMALL | engine.TINY["vit"]).items()]
  assert main.main(["--config=configs/msn.py", f"--workdir={tmp_path / 'rum'}", "--mode=eval", *flags]) == 2
  assert "no checkpoint in it" in capsys.readouterr().err and not (tmp_path / "rum").exists()


def test_an_evaluator_that_refuses_the_data_ends_neither_the_training_nor_the_others(tmp_path, whole, capsys):
  def refuse():
    raise UserError("config.evals.a.k=20: more neighbors than the 18 images of the bank.")

  calls = []
  assert launch(tmp_path, calls, at=2, do=refuse) == train.DONE
  assert calls == ["a2", "b2", "a4", "b4"] and rows(tmp_path) == WHOLE and losses(tmp_path) == whole
  logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert logged[2]["eval/a/protocol"] == "not computed: config.evals.a.k=20: more neighbors than the 18 images of the bank."
  assert "warning: config.evals.a.k=20" in "".join(capsys.readouterr())
