"""Which training classes are right for the images of another data set, from files of their users."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.evals.base import Extract, Features


def relabeled(extract: Extract, accepted: np.ndarray) -> Any:
  """`extract` whose held-out images have the first of their accepted classes [N, S] as label, -1 without one."""

  def of(split: str, **kwargs: Any) -> Features:
    found = extract(split, **kwargs)
    return found if split == "train" else dataclasses.replace(found, labels=accepted[found.index, 0].astype(np.int32))

  return of


def by_folder(file: str, *, held_out: Any, train: Any, path: str) -> np.ndarray:
  """Accepted classes [N, S] of each held-out image, padded with -1, by the first folder of its name that the file has.

  Args:
    file: lines "FOLDER CLASS CLASS ..."; "#" starts a comment.
    held_out, train: images with names; `train.class_names` are the classes.
    path: config path of the file, for messages.

  Raises:
    UserError: the file cannot be read, names a class that is none, or no folder of the images.
  """
  known = list(train.class_names)
  if not known:
    raise UserError(f"{path}={file}: the training images have no class folders; expected folders of classes.")
  number, accepted = {name: i for i, name in enumerate(known)}, {}
  for i, line in enumerate(_read(file, path=path).splitlines(), 1):
    folder, *classes = line.partition("#")[0].split() or [""]
    for name in classes:
      if name not in number:
        raise UserError(f"{path}={file}: line {i}: '{name}' is no training class.{nearest(name, known)} There are {len(known)}.")
    if folder:
      accepted[folder] = [number[name] for name in classes]
  found = [next((accepted[part] for part in held_out.name(i).split("/")[:-1] if part in accepted), []) for i in range(len(held_out))]
  if not any(found):
    raise UserError(f"{path}={file}: none of its {len(accepted)} folders holds a held-out image, such as {held_out.name(0)}.")
  return _padded(found)


def by_image(file: str, *, count: int, path: str) -> np.ndarray:
  """Accepted classes [N, S], padded with -1, from a JSON list with a list of class numbers for each image.

  Raises:
    UserError: the file cannot be read, is something else, or has fewer than `count` lists.
  """
  try:
    found = json.loads(_read(file, path=path))
  except ValueError as error:
    raise UserError(f"{path}={file}: not JSON: {error}.") from None
  numbers = lambda entry: isinstance(entry, list) and all(isinstance(c, int) and c >= 0 for c in entry)
  if not isinstance(found, list) or not all(map(numbers, found)):
    raise UserError(f"{path}={file}: expected a list of lists of class numbers, one for each held-out image.")
  if len(found) < count:
    raise UserError(f"{path}={file}: {len(found)} lists, but there is a held-out image {count - 1}.")
  return _padded(found)


def lines(file: str, *, index: np.ndarray, path: str) -> list[str]:
  """The lines of a text file at `index`; raises `UserError` where it cannot be read or is too short."""
  found = [line.strip() for line in _read(file, path=path).splitlines()]
  if index.max() >= len(found):
    raise UserError(
      f"{path}={file}: {len(found)} lines, but there is a held-out image {index.max()};"
      " expected one line for each image, empty for none."
    )
  return [found[i] for i in index]


def numbers(file: str, *, index: np.ndarray, classes: int, path: str) -> np.ndarray:
  """As `lines`, class numbers below `classes`; an empty line is -1."""
  found = lines(file, index=index, path=path)
  bad = next((line for line in found if line and not (line.isdecimal() and int(line) < classes)), None)
  if bad is not None:
    raise UserError(f"{path}={file}: '{bad}' is no class; expected a number from 0 to {classes - 1}, or an empty line.")
  return np.array([int(line) if line else -1 for line in found])


def _read(file: str, *, path: str) -> str:
  try:
    return pathlib.Path(file).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{path}={file}: cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
  out = np.full((len(rows), max(map(len, rows), default=0) or 1), -1, np.int32)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out
