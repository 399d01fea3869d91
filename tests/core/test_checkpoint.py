"""Checkpoints on a disk that is full."""

import shutil
import types

import jax.numpy as jnp
import pytest

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
