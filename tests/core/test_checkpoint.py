"""Checkpoints on a disk that is full, damaged ones, and those that a machine cannot read."""

import errno
import shutil
import types

import jax
import jax.numpy as jnp
import pytest

from big_ssl.core import checkpoint
from big_ssl.core.checkpoint import Checkpointer, equal
from big_ssl.core.types import TrainState, UserError


def state(step: int) -> TrainState:
  return TrainState(step=jnp.int32(step), params={"w": jnp.full((256, 256), float(step))}, opt_state={}, extra={})


def test_a_full_disk_is_told_before_anything_is_written_and_the_checkpoint_before_is_whole(tmp_path, monkeypatch):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(state(1), meta={})
  checkpointer.wait()
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100_000))
  with pytest.raises(UserError, match=r"step 2 needs up to 0\.3 MiB, the disk has 0\.1 MiB left; the checkpoint of step 1 is intact"):
    checkpointer.save(state(2), meta={})
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
  restored, _ = checkpointer.restore(state(0))
  assert equal(restored, state(1))
  monkeypatch.undo()
  checkpointer.save(state(2), meta={})
  checkpointer.wait()
  assert checkpointer.steps() == [1, 2]


@pytest.fixture
def two(tmp_path):
  """Checkpoints of steps 1 and 2."""
  checkpointer = Checkpointer(tmp_path)
  for step in (1, 2):
    checkpointer.save(state(step), meta={})
  checkpointer.wait()
  yield checkpointer
  checkpointer.close()


def files(checkpointer, step):
  return [p for p in (checkpointer.directory / str(step)).rglob("*") if p.is_file()]


def damage(checkpointer, step):
  for file in files(checkpointer, step):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])


def step_of(restored):
  return int(restored[0].step)


def test_a_damaged_newest_one_is_moved_only_where_its_step_will_be_saved_again(two, tmp_path):
  said = []
  damage(two, 2)
  assert step_of(two.restore(state(0), warn=said.append, set_aside=False)) == 1
  assert "left where it is" in said[-1] and two.steps() == [1, 2] and not (tmp_path / "damaged").exists()
  assert step_of(two.restore(state(0), warn=said.append)) == 1
  assert "checkpoint 2 is damaged" in said[-1] and two.steps() == [1] and (tmp_path / "damaged" / "2").is_dir()
  two.save(state(2), meta={})
  two.wait()
  assert step_of(two.restore(state(0))) == 2


def test_where_all_are_damaged_nothing_is_moved_and_no_run_starts_anew(two, tmp_path):
  damage(two, 1)
  damage(two, 2)
  with pytest.raises(UserError, match="no readable checkpoint .2: .*; 1: .*nothing was changed") as error:
    two.restore(state(0))
  assert "\n" not in str(error.value) and two.steps() == [1, 2] and not (tmp_path / "damaged").exists()


def test_weights_of_another_run_that_cannot_be_read_are_one_line_and_stay(two):
  assert set(two.read()) == {"step", "params/w"} and float(two.read(1)["params/w"][0, 0]) == 1
  damage(two, 2)
  with pytest.raises(UserError, match="checkpoints/2: could not be read") as error:
    two.read()
  assert "\n" not in str(error.value) and two.steps() == [1, 2]


@pytest.mark.parametrize(
  "error",
  [
    MemoryError("no memory"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes."),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
  ],
  ids=str,
)
def test_a_machine_that_cannot_read_says_nothing_about_the_checkpoints(two, tmp_path, monkeypatch, error):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(two._manager, "restore", fail)
  with pytest.raises(UserError, match=f"checkpoints/2: could not be read .*{str(error)[-12:-1]}.*nothing was changed, try again"):
    two.restore(state(0))
  assert two.steps() == [1, 2] and not (tmp_path / "damaged").exists()


def test_what_the_storage_layer_cannot_open_is_not_damaged(two, tmp_path):
  arrays = [f for f in files(two, 2) if f.parent.parent.name == "state" and f.parent.name == "d"]
  for file in arrays:
    file.unlink()
    file.symlink_to(file)  # to itself: the system refuses to follow it
  with pytest.raises(UserError, match="could not be read .Too many levels of symbolic links.; nothing was changed"):
    two.restore(state(0))
  assert arrays and two.steps() == [1, 2] and not (tmp_path / "damaged").exists()


def test_all_processes_go_on_with_the_checkpoint_that_each_of_them_could_read(two, monkeypatch):
  others, said = [checkpoint._DAMAGED, checkpoint._READ], []
  mine = checkpoint._outcome
  monkeypatch.setattr(checkpoint, "_outcome", lambda error: max(mine(error), others.pop(0)))
  assert step_of(two.restore(state(0), warn=said.append)) == 1 and others == []
  assert "checkpoint 2 is damaged (another process could not read it)" in said[0]


def test_a_path_that_orbax_takes_for_a_pattern_is_refused_before_anything_is_made(tmp_path):
  with pytest.raises(UserError, match=r"a path with '\[' could not be read back"):
    Checkpointer(tmp_path / "run[1]")
  assert not list(tmp_path.iterdir())
