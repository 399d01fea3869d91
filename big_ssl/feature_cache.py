"""Features kept between evaluators and between runs of `--mode=eval`, so that they are extracted once."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
import zipfile
import zlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from big_ssl.evals.base import Features

_FORMAT = 1
_ABANDONED_S = 3600.0  # a temporary file this old is of a process that was killed


@dataclasses.dataclass(frozen=True)
class Stored:
  """What a file holds: features [N, D] float32, their index [N], and the shape of a row."""

  features: np.ndarray
  index: np.ndarray
  shape: tuple[int, ...]


class MemoryCache:
  """Features by key, the ones used longest ago dropped first above `max_bytes`; the newest always stays."""

  def __init__(self, *, max_bytes: int):
    self._max_bytes = max_bytes
    self._kept: collections.OrderedDict[Hashable, Features] = collections.OrderedDict()

  def get(self, key: Hashable) -> Features | None:
    if key in self._kept:
      self._kept.move_to_end(key)
    return self._kept.get(key)

  def put(self, key: Hashable, features: Features) -> None:
    features.features.setflags(write=False)  # other evaluators will read the same array
    self._kept[key] = features
    while len(self._kept) > 1 and sum(f.features.nbytes for f in self._kept.values()) > self._max_bytes:
      self._kept.popitem(last=False)

  def clear(self) -> None:
    self._kept.clear()


@dataclasses.dataclass(frozen=True)
class FeatureCache:
  """Files `<directory>/<owner>-<key>.npz`: the owner is what the features are of, the key how they were made.

  Attributes:
    directory: made when something is kept.
    max_bytes: of all files; those used longest ago make room, and features above it alone are not kept.
    notice: is told in one line what is read, and what is damaged or cannot be written.
    write: whether this process writes.
  """

  directory: pathlib.Path
  max_bytes: int
  notice: Callable[[str], None] = print
  write: bool = True

  def load(self, *, owner: str, key: str) -> Stored | None:
    """What was kept, or None; a damaged file is told, and None."""
    file = self._file(owner, key)
    try:
      with np.load(file, allow_pickle=False) as z:
        found = Stored(z["features"], z["index"], tuple(int(s) for s in z["shape"]))
      if found.features.ndim != 2 or len(found.features) != len(found.index):
        raise ValueError(f"features {found.features.shape} for {len(found.index)} images")
    except FileNotFoundError:
      return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
      self.notice(f"{file}: damaged ({str(error)[:80] or type(error).__name__}); the features are extracted anew")
      return None
    self.notice(f"features read from {file}")
    if self.write:
      with contextlib.suppress(OSError):  # of another user: it is dropped as if it had not been used
        os.utime(file)
    return found

  def save(self, stored: Stored, *, owner: str, key: str) -> None:
    """Keeps features in one move; those of other checkpoints are removed. A failure is told and changes nothing else."""
    if not self.write or self.max_bytes <= 0:
      return
    file, needed = self._file(owner, key), stored.features.nbytes + stored.index.nbytes
    if needed > self.max_bytes:
      limit = f"config.checkpoint.features_gib is {self.max_bytes / 2**30:g}"
      self.notice(f"features of {needed / 2**30:,.2f} GiB are not kept: {limit}")
      return
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._make_room(needed, keep=file, owner=owner)
      with temporary.open("wb") as f:
        np.savez(f, features=stored.features, index=stored.index, shape=np.array(stored.shape, np.int64))
      os.replace(temporary, file)
    except OSError as error:
      temporary.unlink(missing_ok=True)
      self.notice(f"{file}: features cannot be kept: {error.strerror or error}")

  def _file(self, owner: str, key: str) -> pathlib.Path:
    return self.directory / f"{owner}-{key}.npz"

  def _make_room(self, needed: int, *, keep: pathlib.Path, owner: str) -> None:
    for old in self.directory.glob(".*.tmp"):
      if time.time() - old.stat().st_mtime > _ABANDONED_S:
        old.unlink(missing_ok=True)
    files = [f for f in self.directory.glob("*.npz") if f != keep]
    if owner.startswith("step"):
      for file in [f for f in files if f.name.startswith("step") and not f.name.startswith(f"{owner}-")]:
        file.unlink(missing_ok=True)
        files.remove(file)
    files.sort(key=lambda f: f.stat().st_mtime)
    room = self.max_bytes - sum(f.stat().st_size for f in files)
    while files and room < needed:
      oldest = files.pop(0)
      room += oldest.stat().st_size
      oldest.unlink(missing_ok=True)


def key_of(made_by: Mapping[str, Any]) -> str:
  """16 hexadecimal digits of a description of how features are made, of plain values and of what has a stable `str`."""
  text = json.dumps({"format": _FORMAT} | dict(made_by), sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def output_name(output: Any) -> str | None:
  """A name of an output that is the same in another process; None where a function has none."""
  if isinstance(output, str):
    return output
  if dataclasses.is_dataclass(output):
    return f"{type(output).__module__}.{output!r}"
  name = getattr(output, "__qualname__", "<")
  return None if "<" in name or getattr(output, "__closure__", None) else f"{output.__module__}.{name}"
