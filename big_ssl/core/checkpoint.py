"""Checkpoints: the TrainState pytree and a small record, written asynchronously and atomically by Orbax.

Before anything is loaded, names, shapes and dtypes are compared with the record, since the storage layer would cast a
dtype silently. A damaged newest checkpoint is set aside, never deleted, and the one before it is used; only files that
are damaged count, not a machine without memory or a file system that does not answer.
"""

from __future__ import annotations

import errno
import logging
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from big_ssl.core.types import PyTree, TrainState, UserError

_READ, _DAMAGED, _REFUSED = range(3)  # what became of a checkpoint, the worst last
# Of the storage layer, at the start of its messages; its others (not found, out of range, data loss) are of the files.
_SYSTEM = ("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "UNKNOWN")
_FILE_ERRORS = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def signature(state: PyTree) -> dict[str, list]:
  """{path: [shape, dtype]} of every leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): [list(x.shape), str(x.dtype)] for p, x in leaves}


def compare(saved: dict[str, list], wanted: dict[str, list], *, where: str) -> None:
  """Raises `UserError` naming what is missing, extra and different between a checkpoint and the configured state."""
  missing = sorted(set(wanted) - set(saved))
  extra = sorted(set(saved) - set(wanted))
  different = [f"{k} {saved[k]} in the checkpoint, {wanted[k]} wanted" for k in sorted(set(saved) & set(wanted)) if saved[k] != wanted[k]]
  parts = [
    f"{label}: {', '.join(items[:5])}{f' and {len(items) - 5} more' if len(items) > 5 else ''}"
    for label, items in (("missing", missing), ("extra", extra), ("different", different))
    if items
  ]
  if parts:
    raise UserError(f"{where}: the checkpoint does not fit this config. {'; '.join(parts)}. Use another --workdir or the config it was made with.")


def quiet_storage() -> None:
  """Silences what the storage layers log when a write fails, hundreds of lines; `Checkpointer` says it in one."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def _cause(error: Exception) -> str:
  """The system's own words where the long message of the storage layer ends in them."""
  text = str(error).strip() or type(error).__name__
  for end in ("os_error_code", "tensorstore_spec"):
    if system := re.findall(rf": ([^:]+?) \[{end}", text):
      return system[-1]
  return text.splitlines()[0][:160]


def _system_failed(error: BaseException | None) -> bool:
  """Whether memory or the file system failed, which says nothing about what the files hold."""
  while error is not None:
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or text.startswith(_SYSTEM):
      return True
    if isinstance(error, OSError) and error.errno not in _FILE_ERRORS:
      return True
    error = error.__cause__ or error.__context__
  return False


def _outcome(error: Exception | None) -> int:
  """Of all processes the worst, so that they go on alike."""
  refused = isinstance(error, UserError) or _system_failed(error)
  mine = _READ if error is None else _REFUSED if refused else _DAMAGED
  return int(np.max(multihost_utils.process_allgather(np.int32(mine)))) if jax.process_count() > 1 else mine


class Checkpointer:
  """Saves and restores under `workdir/checkpoints/<step>`."""

  def __init__(self, workdir: str | pathlib.Path, *, keep_last: int = 2, keep_every: int | None = None):
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
    if "[" in str(self.directory):  # Orbax takes it for a pattern, and leaves the parts of a checkpoint unmerged
      raise UserError(f"--workdir={workdir}: checkpoints under a path with '[' could not be read back; choose another.")
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every, enable_async_checkpointing=True)
      self._manager = ocp.CheckpointManager(self.directory, options=options)
    except OSError as error:
      raise UserError(f"--workdir={workdir}: checkpoints cannot be written here: {error.strerror or error}.") from None

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, *, meta: dict[str, Any]) -> None:
    """Starts writing; returns as soon as the arrays are copied. A failure surfaces here or in `wait`."""
    self.wait()  # the save before, whose failure is told first
    step = int(state.step)
    needed, free = _local_bytes(state), shutil.disk_usage(self.directory).free
    if free < needed:
      needs, has = f"needs up to {needed / 2**20:,.1f} MiB", f"the disk has {free / 2**20:,.1f} MiB left"
      raise UserError(f"{self.directory}: the checkpoint of step {step} {needs}, {has}; {self._kept()}.")
    record = meta | {"tree": signature(state)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(record))
    self._guard(lambda: self._manager.save(step, args=args, force=True))

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._guard(self._manager.wait_until_finished)

  def close(self) -> None:
    self._guard(self._manager.close)

  def _guard(self, action: Callable[[], Any]) -> None:
    try:
      action()
    except Exception as error:  # the storage layers raise OSError, ValueError and their own kinds for a full disk
      raise UserError(f"{self.directory}: the checkpoint could not be written ({_cause(error)}); {self._kept()}.") from error

  def _kept(self) -> str:
    older = [int(p.name) for p in self.directory.iterdir() if p.name.isdigit()]  # the manager also lists what it is writing
    return f"the checkpoint of step {max(older)} is intact" if older else "no earlier checkpoint exists"

  def restore(
    self,
    abstract: TrainState,
    *,
    step: int | None = None,
    warn: Callable[[str], None] = print,
    check: Callable[[dict[str, Any], str], None] = lambda record, where: None,
    set_aside: bool = True,
  ) -> tuple[TrainState, dict] | None:
    """The newest readable state, placed as the shardings of `abstract` say, and its record; None when there is none.

    Args:
      check: is given the record and the directory before the arrays are read, and may raise `UserError`.
      set_aside: move newer ones that are damaged out of the way, so that their steps can be saved again. Nothing is
        moved before an older one has been read.

    Raises:
      UserError: the checkpoint is of another tree, the asked `step` does not exist, memory or the file system failed, or
        there are checkpoints and all are damaged.
    """
    steps = self.steps()
    if step is not None and step not in steps:
      raise UserError(f"{self.directory}: no checkpoint of step {step}. There are: {', '.join(map(str, steps)) or 'none'}.")
    damaged: dict[int, str] = {}
    for candidate in [step] if step is not None else reversed(steps):
      found = error = None
      try:
        found = self._state(candidate, abstract, check)
      except Exception as e:  # damaged files surface as many kinds of exception
        error = e
      outcome = _outcome(error)
      cause = _cause(error) if error else "another process could not read it"
      if outcome == _READ:
        for number, why in damaged.items():
          where = f"moved to {self._set_aside(number)}" if set_aside else "left where it is"
          warn(f"checkpoint {number} is damaged ({why}); {where}, that of step {candidate} is used.")
        return found
      if outcome == _REFUSED:
        if isinstance(error, UserError):
          raise error
        raise UserError(f"{self.directory / str(candidate)}: could not be read ({cause}); nothing was changed, try again.") from error
      damaged[candidate] = cause
    if damaged:
      listed = "; ".join(f"{number}: {why}" for number, why in list(damaged.items())[:3])
      raise UserError(f"{self.directory}: no readable checkpoint ({listed}); nothing was changed. Restore one, or use another --workdir.")
    return None

  def _state(
    self, step: int, abstract: TrainState, check: Callable[[dict[str, Any], str], None]
  ) -> tuple[TrainState, dict]:
    where = str(self.directory / str(step))
    record = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    check(record, where)
    compare(record["tree"], signature(abstract), where=where)
    state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    if int(state.step) != step:
      raise ValueError(f"holds step {int(state.step)}")
    return state, record

  def read(self, step: int | None = None) -> dict[str, np.ndarray]:
    """{path: array} of a checkpoint whatever run it is of, the newest where `step` is None; every process reads all of it.

    Raises:
      UserError: there is no checkpoint, or not of `step`, or it cannot be read.
    """
    steps = self.steps()
    if not steps or (step is not None and step not in steps):
      wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
      raise UserError(f"{self.directory}: {wanted}. There are: {', '.join(map(str, steps)) or 'none'}.")
    chosen = steps[-1] if step is None else step
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
      saved = self._manager.item_metadata(chosen)["state"]
      abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
      tree = self._manager.restore(chosen, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]
    except Exception as error:  # as in `restore`; nothing is moved, the run may be another's
      raise UserError(f"{self.directory / str(chosen)}: could not be read ({_cause(error)}).") from error
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}

  def _set_aside(self, step: int) -> pathlib.Path:
    target = self.directory.parent / "damaged" / str(step)
    if jax.process_index() == 0:
      target.parent.mkdir(exist_ok=True)
      number = 0
      while target.exists():
        number += 1
        target = target.with_name(f"{step}.{number}")
      (self.directory / str(step)).rename(target)
    if jax.process_count() > 1:  # the others list the steps once it is moved
      multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
    self._manager.reload()
    return target


def _local_bytes(state: PyTree) -> int:
  """Bytes that this process writes, before compression: each shard once."""
  shards = [s for x in jax.tree.leaves(state) for s in getattr(x, "addressable_shards", ()) if s.replica_id == 0]
  return sum(s.data.nbytes for s in shards)


def equal(a: PyTree, b: PyTree) -> bool:
  """Whether two states are bit-equal; used to exercise the first save and restore before step 1."""
  same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True), a, b)
  return all(jax.tree.leaves(same))
