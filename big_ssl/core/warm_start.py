"""Weights of an earlier run as the start of a new one: fine-tuning, or pretraining that goes on with another method."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np

from big_ssl.core.config import InitFrom
from big_ssl.core.types import PyTree, TrainState, UserError

# Where methods keep the same modules; the rest of a path, "backbone/...", names the tensor in all of them.
_PLACES = (
  ("params/encoder/", "weights", "student"),
  ("params/", "weights", "student"),
  ("extra/teacher/encoder/", "weights", "teacher"),
  ("extra/teacher/", "weights", "teacher"),
  ("extra/batch_stats/encoder/", "statistics", "student"),
  ("extra/batch_stats/", "statistics", "student"),
  ("extra/teacher_batch_stats/", "statistics", "teacher"),
)
# State that goes with the heads and not with the data; a queue is of no use without its pointer, where it has one.
_STATE = (("center",), ("queue", "queue_pointer"))


@dataclasses.dataclass(frozen=True)
class WarmStart:
  """The new state, how many of its tensors were taken, which of them were adapted, and what stays as initialized.

  `beside`: names of the method's state that was taken beside the weights.
  """

  state: TrainState
  taken: int
  adapted: tuple[str, ...]
  fresh: tuple[str, ...]
  beside: tuple[str, ...] = ()


def warm_start(
  state: TrainState, saved: Mapping[str, np.ndarray], *, config: InitFrom, adapt: Callable[..., np.ndarray | None]
) -> WarmStart:
  """Weights and batch statistics by name and shape; step, optimizer, assignments and banks stay new.

  A teacher that the earlier run did not have starts as its student does. DINO's center and the queues of MoCo and SwAV
  come along where they have the same shape and all weights were taken: of other heads they mean nothing.

  Args:
    state: freshly initialized, placed.
    saved: {path: array} of the earlier run's checkpoint.
    config: which tree, and what stays as initialized.
    adapt: called as adapt(path, value, shape=shape) for a tensor of the backbone that has another shape here; returns it
      in this shape, or None where that has no meaning.

  Raises:
    UserError: the earlier run has no such tree, or its backbone is another one.
  """
  there = {place: value for path, value in saved.items() if (place := _place(path)) is not None}
  where = f"config.init_from.path={config.path!r}"
  if config.tree == "teacher" and not any(owner == "teacher" for _, owner, _ in there):
    raise UserError(f"config.init_from.tree='teacher': the run in {config.path} has no teacher; use 'student'.")
  fresh, adapted, missing, different, count = [], [], [], [], 0

  def take(key_path: tuple, value: jax.Array) -> jax.Array:
    nonlocal count
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    place = _place(path)
    if place is None:
      return value
    kind, owner, name = place
    order = ("teacher", "student") if owner == "teacher" or config.tree == "teacher" else ("student", "teacher")
    found = next((there[kind, o, name] for o in order if (kind, o, name) in there), None)
    skipped = bool(config.skip) and re.search(config.skip, path) is not None
    if found is not None and not skipped and found.shape != value.shape and name.startswith("backbone/"):
      there_shape, as_here = found.shape, adapt(path, found, shape=value.shape)
      if as_here is not None:
        found = as_here
        adapted.append(f"{path} {list(there_shape)} to {list(value.shape)}")
    if skipped or found is None or found.shape != value.shape:
      fresh.append(path)
      if name.startswith("backbone/") and not skipped:
        if found is None:
          missing.append(path)
        else:
          different.append(f"{path} {list(found.shape)} there, {list(value.shape)} here")
      return value
    count += 1
    return _placed(found, value)

  new = jax.tree_util.tree_map_with_path(take, {"params": state.params, "extra": state.extra})
  if missing or different:
    parts = [
      f"{label}: {', '.join(items[:3])}{f' and {len(items) - 3} more' if len(items) > 3 else ''}"
      for label, items in (("missing", missing), ("different", different))
      if items
    ]
    raise UserError(f"{where}: its backbone is another one. {'; '.join(parts)}. Use the config.model of that run.")
  beside = {} if fresh else _beside(new["extra"], saved, skip=config.skip)
  extra = new["extra"] | beside if beside else new["extra"]
  return WarmStart(state.replace(params=new["params"], extra=extra), count, tuple(adapted), tuple(fresh), tuple(beside))


def _beside(extra: PyTree, saved: Mapping[str, np.ndarray], *, skip: str) -> dict[str, jax.Array]:
  """Those of `_STATE` that the earlier run has in the shapes of this one."""
  out = {}
  for names in _STATE:
    here = {name: extra[name] for name in names if isinstance(extra, Mapping) and name in extra}
    there = {name: saved.get(f"extra/{name}") for name in here}
    skipped = skip and any(re.search(skip, f"extra/{name}") for name in here)
    if not skipped and all(there[n] is not None and there[n].shape == here[n].shape for n in here):
      out |= {name: _placed(there[name], here[name]) for name in here}
  return out


def _placed(found: np.ndarray, like: jax.Array) -> jax.Array:
  found = found.astype(like.dtype)
  return jax.make_array_from_callback(like.shape, like.sharding, lambda index: found[index])


def _place(path: str) -> tuple[str, str, str] | None:
  """(kind, owner, name) of a tensor; None for state that belongs to the earlier run's data or optimizer."""
  for prefix, kind, owner in _PLACES:
    if path.startswith(prefix):
      return kind, owner, path[len(prefix) :]
  return None
