"""Which images count as labeled, training on these alone, and class-balanced batches of them."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from big_ssl.core.method import ClassBalanced
from big_ssl.core.types import UserError, nearest
from big_ssl.data.plan import permute, replacements, uniforms
from big_ssl.data.source import DataSource, Subset

_SHOWN = 3  # unknown names that a message lists


class Choice(Protocol):
  """Fields that say which images count as labeled: those of `ClassBalanced`, and of the config's `data`."""

  labels_per_class: int
  labels_seed: int
  labels_file: str


def labeled_rows(
  choice: Choice,
  labels: np.ndarray | None,
  *,
  name: Callable[[int], str],
  class_names: Sequence[str] = (),
  share: float = 0.0,
  path: str = "config.method",
  user: str = "config.method.classes_per_step",
) -> np.ndarray:
  """The images whose label training may use, ascending: a function of the choice and the data, not of the run.

  Args:
    choice: says which.
    labels: [N] int32, -1 for none; None where the data has no labels.
    name: of an image, as `DataSource.name`.
    class_names: for messages, or ().
    share: of every class, rounded, at least one image, in place of `labels_per_class`; 0 is none.
    path, user: of the fields and of what needs them, for messages.

  Raises:
    UserError: no labels at all, a file that cannot be used, names that the source does not have, images without a label,
      or a class with fewer images than `labels_per_class`.
  """
  if labels is None or not np.any(labels >= 0):
    raise UserError(f"config.data.source: the data has no labels, which {user} draws from.")
  if choice.labels_file and choice.labels_per_class:
    raise UserError(f"{path}.labels_per_class={choice.labels_per_class}: not with {path}.labels_file; set it to 0.")
  if choice.labels_file:
    return _listed(f"{path}.labels_file={choice.labels_file!r}", choice.labels_file, labels, name)
  if choice.labels_per_class < 0:
    raise UserError(f"{path}.labels_per_class={choice.labels_per_class}: expected a number, or 0 for all.")
  rows = np.flatnonzero(labels >= 0)
  if not choice.labels_per_class and not share:
    return rows
  draw = uniforms(choice.labels_seed, "labeled", rows, 1)[:, 0]
  order = rows[np.lexsort((draw, labels[rows]))]  # class by class, shuffled inside
  counts = np.bincount(labels[order])
  for k in np.unique(labels[order]):
    if counts[k] < choice.labels_per_class:
      field = f"{path}.labels_per_class={choice.labels_per_class}"
      raise UserError(f"{field}: {_class(k, class_names)} has only {counts[k]} labeled images.")
  wanted = np.maximum(np.rint(share * counts), 1) if share else np.full(len(counts), choice.labels_per_class)
  rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[labels[order]]
  return np.sort(order[rank < wanted[labels[order]]])


class DataChoice(Choice, Protocol):
  """The fields of the config's `data` that choose the images to train on."""

  labels_share: float


def labeled_subset(source: DataSource, choice: DataChoice) -> DataSource:
  """The training images that `config.data` chooses by their labels; the source itself where it chooses none.

  Raises:
    UserError: as `labeled_rows`; a share outside [0, 1]; two choices at once.
  """
  names = ("labels_per_class", "labels_share", "labels_file")
  given = [f"config.data.{n}={getattr(choice, n)!r}" for n in names if getattr(choice, n)]
  if not given:
    return source
  if len(given) > 1:
    raise UserError(f"{given[0]}: not with {given[1]}; choose one.")
  if not 0 <= choice.labels_share <= 1:
    raise UserError(f"{given[0]}: expected a share in [0, 1], such as 0.01; 0 is all.")
  rows = labeled_rows(
    choice,
    source.labels,
    name=source.name,
    class_names=source.class_names,
    share=choice.labels_share,
    path="config.data",
    user=given[0],
  )
  return Subset(source, rows, name=f"{source.describe()['name']}, {len(rows)} of {len(source)} by label", hashed=True)


def _class(label: int, class_names: Sequence[str]) -> str:
  return f"class {label} ('{class_names[label]}')" if label < len(class_names) else f"class {label}"


def _listed(field: str, file: str, labels: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
  path = pathlib.Path(file).expanduser()
  if not path.is_file():
    siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"{field}: no such file.{nearest(str(path), siblings)}")
  try:
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
  except UnicodeDecodeError:
    raise UserError(f"{field}: not a text file; expected one image per line.") from None
  if not lines:
    raise UserError(f"{field}: the list is empty.")
  if all(line.isdecimal() for line in lines):
    rows = np.unique(np.array([int(line) for line in lines]))
    if rows[-1] >= len(labels):
      raise UserError(f"{field}: image {rows[-1]}; the data has 0 to {len(labels) - 1}.")
  else:
    rows = _named(field, lines, [name(i) for i in range(len(labels))])
  bare = rows[labels[rows] < 0]
  if len(bare):
    raise UserError(f"{field}: {len(bare)} of its {len(rows)} images have no label, the first is {name(int(bare[0]))}.")
  return rows


def _named(field: str, lines: list[str], names: list[str]) -> np.ndarray:
  """Rows of the lines that are whole names, else last parts of names that only one image has."""
  whole = {n: i for i, n in enumerate(names)}
  parts: dict[str, list[int]] = collections.defaultdict(list)
  for i, n in enumerate(names):
    parts[n.split("/")[-1]].append(i)
  found, unknown = [], []
  for line in lines:
    hits = [whole[line]] if line in whole else parts.get(line, [])
    if len(hits) > 1:
      raise UserError(f"{field}: '{line}' is the name of {len(hits)} images, {names[hits[0]]} and {names[hits[1]]}; write its folder too.")
    found.extend(hits)
    if not hits:
      unknown.append(line)
  if unknown:
    shown = ", ".join(unknown[:_SHOWN])
    near = nearest(unknown[0], whole) or f" The data has names such as '{names[0]}'."
    raise UserError(f"{field}: {len(unknown)} of {len(lines)} names are not in the data, such as {shown}.{near}")
  return np.unique(np.array(found))


class BalancedPlan:
  """Which labeled images the rows of a step are: a pure function of (seed, position), O(1) at any step.

  Attributes:
    rows: the labeled images, ascending.
  """

  def __init__(self, sampler: ClassBalanced, labels: np.ndarray, *, rows: np.ndarray, seed: int, class_names: Sequence[str] = ()):
    """Args: labels: [N] of the whole source; rows: from `labeled_rows`; seed: of the stream.

    Raises:
      UserError: fewer classes than a step takes, one class only, or a class with fewer images than a step takes of it.
    """
    self.rows, self._sampler, self._seed = rows, sampler, seed
    self._members = rows[np.argsort(labels[rows], kind="stable")]
    classes, self._start, self._count = np.unique(labels[self._members], return_index=True, return_counts=True)
    self._first_of = {int(c): i for i, c in enumerate(classes)}
    self._labels = labels
    many, each = sampler.classes_per_step, sampler.images_per_class
    if many < 1 or each < 1:
      raise UserError(f"config.method.classes_per_step={many}, images_per_class={each}: expected at least 1.")
    if len(classes) < 2:
      only = _class(classes[0], class_names)
      raise UserError(
        f"config.method.classes_per_step={many}: all {len(rows)} labeled images are of one class, {only}; at least 2 are needed."
      )
    if many > len(classes):
      raise UserError(f"config.method.classes_per_step={many}: the labeled images have {len(classes)} classes.")
    short = int(np.argmin(self._count))
    if self._count[short] < each:
      having = f"{_class(classes[short], class_names)} has {self._count[short]} labeled images"
      raise UserError(f"config.method.images_per_class={each}: {having}; a step takes different ones.")

  def indices(self, positions: np.ndarray) -> np.ndarray:
    """positions [B] int64 -> images [B] int64."""
    many, each = self._sampler.classes_per_step, self._sampler.images_per_class
    step, row = np.divmod(np.asarray(positions, np.int64), many * each)
    copy, slot = np.divmod(row, many)
    # A pass over the classes is so many whole steps; a class is drawn at most once in it.
    total = len(self._count)
    number, step = np.divmod(step, total // many)
    drawn = permute(step * many + slot, size=total, seed=self._keys("classes", number, np.zeros_like(number)))
    # The images of a class go by in a new order whenever there are not enough left for a step.
    result = np.empty_like(drawn)
    for count in np.unique(self._count[drawn]):
      here = self._count[drawn] == count
      again, chunk = np.divmod(number[here], count // each)
      keys = self._keys("images", again, drawn[here])
      picked = permute(chunk * each + copy[here], size=int(count), seed=keys)
      result[here] = self._members[self._start[drawn[here]] + picked]
    return result

  def substitutes(self, index: int) -> np.ndarray:
    """The images to try for `index`, itself first, then others of its class: a bad image leaves the balance."""
    k = self._first_of[int(self._labels[index])]
    members = self._members[self._start[k] : self._start[k] + self._count[k]]
    place = int(np.flatnonzero(members == index)[0])
    return members[(place + replacements(len(members))) % len(members)]

  def _keys(self, name: str, number: np.ndarray, which: np.ndarray) -> np.ndarray:
    """uint64 keys of permutations, one per (pass, class)."""
    draws = uniforms(self._seed, f"balanced/{name}", number * np.int64(len(self._count)) + which, 1)[:, 0]
    return (draws * 2.0**53).astype(np.uint64)
