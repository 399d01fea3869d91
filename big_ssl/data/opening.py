"""The one way to open what `--data` names."""

from __future__ import annotations

import copy
import pathlib
import zipfile

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.data import listing, sprites
from big_ssl.data.clips import SpriteClips
from big_ssl.data.listing import Listing
from big_ssl.data.plan import permute
from big_ssl.data.source import Arrays, DataSource, Files, Records, Subset

HELD_OUT = 10  # of a labeled source without an evaluation split, one example in ten is held out
_NPZ_SPLITS = {  # split -> accepted keys of the images, of the labels; the order is that of preference
  "train": (("x_train", "images", "x"), ("y_train", "labels", "y")),
  "test": (("x_test",), ("y_test",)),
  "val": (("x_val",), ("y_val",)),
}


def open_splits(
  spec: str,
  *,
  split: str = "",
  eval_split: str = "",
  data_dir: str = "",
  seed: int = 0,
  train_examples: int = 8192,
  eval_examples: int = 0,
  image_size: int = 48,
) -> dict[str, DataSource]:
  """The sources "train" and "eval" of what `--data` names.

  Without an evaluation split, a fixed tenth of a labeled source is held out (the same for every seed); without labels,
  or of fewer than 20 images, the training images are evaluated.

  Args:
    spec: "sprites", "tfds:name", a folder (with masks in a folder beside "images", see `listing.pair_masks`), a .npz, a tar or glob of tars, a TFRecord file or glob.
    split, eval_split: names of the splits, where the source has them; "" lets the source choose.
    data_dir: root of prepared TFDS data sets.
    seed: of the sprites.
    train_examples, image_size: of the sprites; image_size in pixels.
    eval_examples: of the sprites (0: 1024), and the most that any source gives (0: all).

  Raises:
    UserError: names `spec`, what is wrong and what is near.
  """
  if spec == "sprites":
    for flag, value, only in (("split", split, "train"), ("eval_split", eval_split, "eval")):
      if value not in ("", only):
        raise UserError(f"config.data.{flag}={value!r}: sprites have no such split; expected '{only}'.")
    worlds = {"train": train_examples, "eval": eval_examples or 1024}
    return {k: _sprites(n, seed=seed, split=k, size=image_size) for k, n in worlds.items()}
  opened = _open(spec, split=split, eval_split=eval_split, data_dir=data_dir)
  train, held = opened if len(opened) == 2 else _hold_out(opened[0])
  if eval_examples and len(held) > eval_examples:
    rows = np.linspace(0, len(held) - 1, eval_examples).astype(int)
    held = Subset(held, rows, name=f"{held.describe()['name']}, {eval_examples} of it")
  return {"train": train, "eval": held}


def open_folder(path: str, *, channels: int, field: str) -> DataSource:
  """All images below a folder, as one source without labels.

  Args:
    path: of the folder; its name is the source's.
    channels: of the decoded images.
    field: config path that named the folder, for errors.

  Raises:
    UserError: no such folder, or no image in it.
  """
  root = pathlib.Path(path).expanduser()
  if not root.is_dir():
    near = [str(p) for p in root.parent.iterdir()] if root.parent.is_dir() else []
    raise UserError(f"{field}={path}: no such folder.{nearest(str(root), near)}")
  try:
    found = Files(listing.folder(root), name=root.resolve().name)
  except UserError as error:
    raise UserError(str(error).replace("--data", field, 1)) from None
  found.channels = channels
  return found


def _open(spec: str, *, split: str, eval_split: str, data_dir: str) -> list[DataSource]:
  """[train, eval], or [train] where there is no evaluation split."""
  if spec.startswith("tfds:"):
    from big_ssl.data import tfds

    return tfds.open_pair(spec[5:], split=split or "train", eval_split=eval_split, data_dir=data_dir)
  path = pathlib.Path(spec).expanduser()
  if path.is_dir():
    found = listing.pair_masks(listing.folder(path), where=spec)
    return _files(found, path.resolve().name, where=spec, split=split, eval_split=eval_split)
  if path.suffix == ".npz":
    return _npz(str(path), split=split, eval_split=eval_split)
  if ".tar" in path.name:
    return _files(listing.tar(str(path)), path.name, where=spec, split=split, eval_split=eval_split)
  if "tfrecord" in path.name:
    for flag, value in (("split", split), ("eval_split", eval_split)):
      if value:
        raise UserError(f"config.data.{flag}={value!r}: TFRecords have no splits; name the files of one in --data.")
    return [Records(listing.tfrecords(listing.matches(str(path))), name=path.name)]
  accepted = "Accepted: a folder, a tar or glob of tars, an .npz, a TFRecord glob, tfds:name, sprites."
  if path.is_file():
    raise UserError(f"--data={spec}: a file of no known kind. {accepted}")
  near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
  raise UserError(f"--data={spec}: no such folder.{nearest(str(path), [*near, 'sprites'])} {accepted}")


def _sprites(count: int, *, seed: int, split: str, size: int) -> Arrays:
  world = sprites.render(np.arange(count), seed=seed, split=split, size=size)
  extras = {"mask": world.mask, "box": world.box}
  source = Arrays(world.image, world.label, extras=extras, name=f"sprites/{split}", class_names=sprites.CLASSES)
  source.clips = SpriteClips(seed=seed, split=split, size=2 * size)  # an object in a clip is half as large
  return source


def _files(found: Listing, name: str, *, where: str, split: str, eval_split: str) -> list[DataSource]:
  parts = listing.split_by_folder(found, where=where, split=split, eval_split=eval_split)
  return [Files(part, name=f"{name}/{k}" if k else name) for k, part in parts.items()]


def _hold_out(source: DataSource) -> tuple[DataSource, DataSource]:
  """(rest, tenth): of every class a tenth, drawn at random, and never its only image; or all images twice."""
  name, every = source.describe()["name"], np.arange(len(source))
  if source.labels is None or len(source) < 2 * HELD_OUT:
    itself = copy.copy(source)  # what is found to be unreadable is known to both
    itself._title = f"{name}, the training images themselves"
    return source, itself
  order = np.lexsort((permute(every, size=len(source), seed=0), source.labels))  # class by class, shuffled inside
  first = np.append(True, np.diff(source.labels[order]) != 0)
  held = np.zeros(len(source), bool)
  held[order] = (every % HELD_OUT == HELD_OUT - 1) & ~first
  return (
    Subset(source, every[~held], name=f"{name} without the held-out tenth"),
    Subset(source, every[held], name=f"{name}, held-out tenth"),
  )


def _npz(file: str, *, split: str, eval_split: str) -> list[DataSource]:
  """Images and labels under x_train, y_train or images, labels or x, y; tests under x_test, y_test or x_val, y_val."""
  listing.matches(file)
  try:
    with np.load(file, allow_pickle=False) as z:
      arrays = dict(z)
  except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
    why = str(error).partition(" If you trust")[0].rstrip(".")  # NumPy's advice is to load it unsafely
    raise UserError(f"--data={file}: not a readable .npz of plain arrays: {why}.") from None
  name, splits = pathlib.Path(file).name, {}
  pick = lambda keys: next((arrays[k] for k in keys if k in arrays), None)
  for part, (image_keys, label_keys) in _NPZ_SPLITS.items():
    if pick(image_keys) is not None:
      splits[part] = Arrays(pick(image_keys), pick(label_keys), name=f"{name}/{part}")
  if not splits:
    found = ", ".join(arrays) or "none"
    raise UserError(f"--data={file}: no images; expected a key x_train, images or x, found {found}.")
  for flag, wanted in (("split", split or "train"), ("eval_split", eval_split)):
    if wanted and wanted not in splits:
      raise UserError(f"config.data.{flag}={wanted!r}: {file} has no such split. There are: {', '.join(splits)}.")
  held = eval_split or next((s for s in ("test", "val") if s in splits and s != split), "")
  return [splits[s] for s in (split or "train", held) if s]
