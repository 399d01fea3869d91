"""Where the state of a run comes from: its newest checkpoint, the weights of another run, or the initialization."""

from __future__ import annotations

import functools
import pathlib

import jax

from big_ssl.core import checkpoint as checkpoint_lib
from big_ssl.core.checkpoint import Checkpointer
from big_ssl.core.config import InitFrom
from big_ssl.core.logger import Logger
from big_ssl.core.types import TrainState, UserError
from big_ssl.core.warm_start import warm_start
from big_ssl.models.adapt import adapt
from big_ssl.models.layers import Backbone
from big_ssl.setup import Run
from big_ssl.weights.transfer import NO_NORMALIZATION, card_of


def start_from(config: InitFrom, state: TrainState, logger: Logger, *, model: Backbone) -> TrainState:
  """A fresh state with the weights of an earlier run, adapted to the channels, patches and sizes of `model`."""
  if not (pathlib.Path(config.path) / "checkpoints").is_dir():
    public = " First: python -m big_ssl.weights import FILE --to=DIR." if pathlib.Path(config.path).is_file() else ""
    raise UserError(
      f"config.init_from.path={config.path!r}: not the work directory of a run; it has no checkpoints/.{public}"
    )
  with logger.timer("checkpoint"):
    earlier = Checkpointer(config.path)
    saved = earlier.read(config.step)
    earlier.close()
  found = warm_start(state, saved, config=config, adapt=functools.partial(adapt, model=model))
  fresh = ", ".join(found.fresh) or "none"
  beside = f"; with its {', '.join(found.beside)}" if found.beside else ""
  logger.notice(f"starts from {config.path}, step {int(saved['step'])}: {found.taken} tensors taken; as initialized: {fresh}{beside}")
  if found.adapted:
    logger.notice(f"adapted to config.model and the data: {', '.join(found.adapted)}")
  return found.state


def start_state(run: Run, checkpointer: Checkpointer, logger: Logger) -> tuple[TrainState, dict[str, float]]:
  """The newest checkpoint, or a fresh state whose first save and restore are exercised before step 1.

  Returns:
    The state, and the numbers of the refresh that it comes from, which the log goes on to show.
  """
  with logger.timer("checkpoint"):
    restored = checkpointer.restore(run.abstract_state, warn=logger.warning)
  if restored is not None:
    state, meta = restored
    run.check_meta(meta, where=str(checkpointer.directory / str(int(state.step))))
    logger.notice(f"resumed from step {int(state.step)} of {run.total_steps}")
    return state, meta.get("refreshed", {})
  state = run.initial_state()
  if run.config.init_from is not None:
    state = start_from(run.config.init_from, state, logger, model=run.method.model)
  elif run.config.optim.layer_decay < 1:  # of use on weights that have learned something
    logger.notice("starts from scratch: no config.init_from.path")
  with logger.timer("checkpoint"):
    checkpointer.save(state, meta=run.meta())
    checkpointer.wait()
    again = checkpointer.restore(run.abstract_state, warn=logger.warning)
    if again is None or (jax.process_count() == 1 and not checkpoint_lib.equal(again[0], state)):
      raise UserError(f"{checkpointer.directory}: the first checkpoint does not read back as it was written.")
  return state, {}


def has_checkpoint(run: Run, workdir: pathlib.Path) -> bool:
  """Whether `workdir` has a checkpoint; nothing is made where it has none.

  Raises:
    UserError: neither a checkpoint nor `config.init_from`.
  """
  folder = workdir / "checkpoints"
  found = folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())
  if not found and run.config.init_from is None:
    raise _no_checkpoint(workdir)
  return found


def _no_checkpoint(workdir: pathlib.Path) -> UserError:
  hint = "--config.init_from.path=DIR reads the weights of another run, or of an imported file"
  return UserError(f"--workdir={workdir}: no checkpoint in it; {hint}.")


def saved_state(run: Run, workdir: pathlib.Path, logger: Logger, *, step: int | None = None) -> TrainState:
  """What is evaluated: a checkpoint of `workdir`, or the weights of `config.init_from` where it has none.

  Nothing in `workdir` is changed: a run may be writing there.

  Args:
    step: of the checkpoint; the newest where None.

  Raises:
    UserError: neither a checkpoint nor `config.init_from`, no readable one, or weights for pixels of another normalization.
  """
  if has_checkpoint(run, workdir):
    checkpointer = Checkpointer(workdir)
    restored = checkpointer.restore(
      run.abstract_state, step=step, warn=logger.warning, check=run.check_protocol, set_aside=False
    )
    checkpointer.close()
    if restored is not None:
      return restored[0]
    if run.config.init_from is None:  # a folder of that name that is no checkpoint
      raise _no_checkpoint(workdir)
  if step is not None:
    raise UserError(f"--step={step}: no checkpoint in --workdir={workdir}; config.init_from.step is that of config.init_from.path.")
  _check_normalization(run, pathlib.Path(run.config.init_from.path))
  return start_from(run.config.init_from, run.initial_state(), logger, model=run.method.model)


def _check_normalization(run: Run, directory: pathlib.Path) -> None:
  """Raises `UserError` where the weights in `directory` are for pixels of another mean or deviation than this run gives."""
  try:
    card = card_of(directory)
  except UserError:  # a run without a record, or of a method that is not at hand
    return
  mine = run.protocol()
  differ = []
  for name in ("mean", "std"):
    theirs = () if card.get(name) == NO_NORMALIZATION else tuple(card.get(name) or mine[name])
    if theirs != tuple(mine[name]):
      differ.append(f"{name} {theirs or 'none'}, where config.method.{name} is {mine[name] or 'none'}")
  if differ:
    where = f"config.init_from.path={str(directory)!r}: the weights are for pixels of {' and '.join(differ)}"
    raise UserError(f"{where}; features of another normalization say nothing. Set config.method.mean and .std as the weights have them.")
