"""The command line: exit codes, one clear line per mistake, kill and resume."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import engine
import jax
import numpy as np
import pytest
from PIL import Image

from big_ssl import main, setup
from big_ssl.core.checkpoint import Checkpointer

pytestmark = pytest.mark.xdist_group("cli")  # one uninterrupted run for all
STEPS = 24  # of the runs that are killed
TOTAL = f"--config.total={STEPS}steps"
TINY = [f"--config.{k}={v}" for k, v in (engine.SMALL | engine.TINY["vit"]).items()]


def command(workdir, *extra):
  return [sys.executable, "-m", "big_ssl.main", "--config=configs/msn.py", f"--workdir={workdir}", *TINY, *extra]


def environment():
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"  # the last one counts
  return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def run(workdir, *extra):
  return subprocess.run(command(workdir, *extra), cwd=engine.ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def losses(workdir) -> dict[int, float]:
  lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row["loss"] for row in lines if "loss" in row}


def final_state(workdir):
  overrides = engine.SMALL | engine.TINY["vit"] | {"total": f"{STEPS}steps"}
  whole = setup.make_run(engine.load("msn", **overrides), devices=jax.devices()[:1])
  state, _ = Checkpointer(workdir).restore(whole.abstract_state)
  return state


@dataclasses.dataclass(frozen=True)
class Uninterrupted:
  losses: dict[int, float]
  state: object
  workdir: pathlib.Path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  done = run(workdir, TOTAL)
  assert done.returncode == 0, done.stdout + done.stderr
  return Uninterrupted(losses(workdir), final_state(workdir), workdir)


def test_a_finished_run_leaves_its_report(uninterrupted):
  text = (uninterrupted.workdir / "report.html").read_text()
  facts = json.loads((uninterrupted.workdir / "run.json").read_text())
  assert f"<h1>MSN, {STEPS} steps on sprites (40 images): k-NN " in text
  assert facts["status"] == "finished" and facts["command"].startswith("python -m big_ssl.main --config=configs/msn.py")
  assert facts["data"]["train"]["count"] == 40 and len(facts["sessions"]) == 1 and sum(facts["sessions"][0]["seconds"].values()) > 0


def assert_continues_as_if_never_stopped(workdir, uninterrupted):
  done = run(workdir, TOTAL)
  assert done.returncode == 0, done.stdout + done.stderr
  assert losses(workdir) == uninterrupted.losses
  state = final_state(workdir)
  assert int(state.step) == STEPS and engine.leaves_equal(state, uninterrupted.state)


@pytest.mark.parametrize(
  "flags,parts",
  [
    (["--config.method.sinkhron=false"], ["config.method.sinkhron", "sinkhorn"]),
    (["--config.method.name=msm"], ["config.method.name='msm'", "Did you mean 'msn'"]),
    (["--config.model.patch=7"], ["config.method.rand_size=32", "config.model.patch=7"]),
    (["--config.batch_size=0"], ["config.batch_size"]),
    (["--config.method.num_prototypes=1"], ["num_prototypes=1", "at least 2"]),
    (["--config.method.patch_drop=1.5"], ["patch_drop=1.5"]),
    (["--data=/no/such/folder"], ["/no/such/folder"]),
    (["--config.model.width=12.5"], ["config.model.width=12.5", "int"]),
    (["--config.mesh.data=3"], ["config.mesh", "8 devices"]),
    (["--config.optim.accumulate=2"], ["config.optim.accumulate=2"]),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, flags, parts):
  assert main.main(command(tmp_path, *flags)[3:]) == 2
  said = capsys.readouterr()
  assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1, said
  assert all(p in said.err for p in parts), said.err


def test_a_mistake_ends_the_process_without_a_traceback(tmp_path):
  done = run(tmp_path, "--config.method.sinkhron=false")
  assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_help_is_quick_to_import_and_needs_no_tensorflow():
  code = "import sys; from big_ssl import main\ntry: main.main(['--help'])\nexcept SystemExit: pass\nassert not {'tensorflow', 'jax'} & set(sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=engine.ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and "--config" in done.stdout, done.stderr


def test_killed_at_random_points_and_restarted_the_losses_are_bit_equal(tmp_path, uninterrupted):
  rng = random.Random(0)
  seen: dict[int, float] = {}
  for _ in range(3):
    process = subprocess.Popen(command(tmp_path, TOTAL), cwd=engine.ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    target = rng.randint(3, 7) + max(seen, default=0)
    log = tmp_path / "metrics.jsonl"
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
      rows = log.read_text().count('"loss"') if log.exists() else 0
      if rows >= min(target, STEPS - 2):
        break
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = log.read_text() if log.exists() else ""
    for line in text.splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue
      if "loss" in row:
        assert row["loss"] == uninterrupted.losses[row["step"]], f"step {row['step']}"
        seen[row["step"]] = row["loss"]
  assert_continues_as_if_never_stopped(tmp_path, uninterrupted)


def test_killed_in_the_middle_of_a_save_the_half_written_checkpoint_is_ignored(tmp_path, uninterrupted):
  folder = tmp_path / "checkpoints"
  half_written = []
  for _ in range(8):  # the kill may come after the last file is in place: try again from there
    process = subprocess.Popen(command(tmp_path, TOTAL), cwd=engine.ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (half_written := list(folder.glob("[1-9]*tmp*"))):
      time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half_written = list(folder.glob("[1-9]*tmp*"))
    if half_written:
      break
  assert half_written, "no kill hit a save"
  assert_continues_as_if_never_stopped(tmp_path, uninterrupted)


def test_sigterm_saves_and_the_same_command_continues(tmp_path, uninterrupted):
  process = subprocess.Popen(command(tmp_path, TOTAL), cwd=engine.ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
  log = tmp_path / "metrics.jsonl"
  while process.poll() is None and (not log.exists() or '"loss"' not in log.read_text()):
    time.sleep(0.005)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 3, out
  assert "run the same command to continue" in out
  assert any((tmp_path / "checkpoints").iterdir())
  assert_continues_as_if_never_stopped(tmp_path, uninterrupted)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path):
  assert run(tmp_path).returncode == 0
  steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  for file in (tmp_path / "checkpoints" / str(steps[-1])).rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: max(1, file.stat().st_size // 3)])
  done = run(tmp_path)
  assert done.returncode == 0, done.stdout + done.stderr
  assert f"checkpoint {steps[-1]} is damaged" in done.stdout + done.stderr
  assert (tmp_path / "damaged" / str(steps[-1])).is_dir()
  assert f"resumed from step {steps[-2]}" in done.stdout


def test_a_changed_data_folder_is_refused_and_nothing_is_lost(tmp_path):
  images = tmp_path / "images"
  images.mkdir()
  for i in range(20):
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)).save(images / f"{i}.png")
  (images / "broken.jpg").write_text("not a picture")
  workdir = tmp_path / "work"
  done = run(workdir, f"--data={images}")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "skipped image broken.jpg" in done.stdout and "1 of 21 images could not be read" in done.stdout
  (images / "0.png").unlink()
  again = run(workdir, f"--data={images}", "--config.total=8steps")
  assert again.returncode == 2 and "data=" in again.stderr and "Traceback" not in again.stderr, again.stderr
  assert (workdir / "checkpoints" / "6").is_dir()


def test_another_network_is_refused_with_what_differs(tmp_path):
  assert run(tmp_path).returncode == 0
  done = run(tmp_path, "--config.method.num_prototypes=32", "--config.total=8steps")
  assert done.returncode == 2 and "prototypes" in done.stderr and "different" in done.stderr, done.stderr


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
  blocked = tmp_path / "file"
  blocked.write_text("")
  done = run(blocked / "work")
  assert done.returncode == 2 and str(blocked) in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_eval_extract_and_check_read_the_checkpoint(tmp_path):
  assert run(tmp_path).returncode == 0
  before = (tmp_path / "metrics.jsonl").read_text()
  done = run(tmp_path, "--mode=eval")
  assert done.returncode == 0 and "knn" in done.stdout, done.stdout + done.stderr
  assert sorted((tmp_path / "metrics.jsonl").read_text().splitlines()) == sorted(before.splitlines())
  other = run(tmp_path / "other", "--mode=eval", f"--config.init_from.path={tmp_path}")  # as an imported file is evaluated
  assert other.returncode == 0, other.stderr
  of = lambda directory: {k: v for row in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()) for k, v in row.items()}
  assert {k: v for k, v in of(tmp_path).items() if k.startswith("knn/")}.items() <= of(tmp_path / "other").items()
  nothing = run(tmp_path / "nothing", "--mode=eval")
  assert nothing.returncode == 2 and "no checkpoint in it; --config.init_from.path=DIR reads" in nothing.stderr
  assert not (tmp_path / "nothing").exists() and (tmp_path / "other" / "config.json").exists()
  trained = (tmp_path / "config.json").read_text()
  assert run(tmp_path, "--mode=extract", "--config.log_every=3steps").returncode == 0
  assert (tmp_path / "config.json").read_text() == trained
  with np.load(tmp_path / "features_eval.npz") as z:
    assert z["features"].shape == (40, 24) and z["labels"].shape == (40,)
  done = run(tmp_path, "--mode=check")
  assert done.returncode == 0 and "per device" in done.stdout and "prototypes" in done.stdout
