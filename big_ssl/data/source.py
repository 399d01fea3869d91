"""Where images come from: index-addressed sources, and the one way to open what `--data` names."""

from __future__ import annotations

import abc
import dataclasses
import glob
import hashlib
import pathlib
import struct
import tarfile
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.data import decode, sprites

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
HELD_OUT = 10  # of a labelled source without an evaluation split, every tenth example is held out


class DataSource(abc.ABC):
  """Examples by index.

  Attributes:
    labels: int32 [N], or None.
    class_names: of the labels, or ().
    channels: of the images.
    images: uint8 or uint16 [N, H, W, C] where all of them are in memory, or None.
    problems: (name, reason) of every image that could not be read so far.
  """

  labels: np.ndarray | None = None
  class_names: tuple[str, ...] = ()
  channels: int = 3
  images: np.ndarray | None = None

  def __init__(self):
    self._problems: dict[str, str] = {}
    self._lock = threading.Lock()

  @property
  def problems(self) -> list[tuple[str, str]]:
    return sorted(self._problems.items())

  def report(self, index: int, reason: str) -> None:
    """Remembers a bad image."""
    with self._lock:
      self._problems[self.name(index)] = reason

  @abc.abstractmethod
  def __len__(self) -> int: ...

  def read(self, index: int) -> bytes:
    """The encoded bytes of an image; in-memory and Python sources have `pixels` instead."""
    raise TypeError(f"{type(self).__name__} has no encoded images")

  def pixels(self, index: int, *, canvas: int = 0) -> np.ndarray:
    """Decoded [h, w, C]; raises `decode.BadImage`."""
    try:
      data = self.read(index)
    except OSError as error:
      raise decode.BadImage(error.strerror or str(error)) from None
    return decode.decode(data, channels=self.channels, canvas=canvas)

  def fetch(self, indices: Sequence[int]) -> list[np.ndarray]:
    """The images of some indices, decoded; raises `decode.BadImage`."""
    return [self.pixels(int(i)) for i in indices]

  def name(self, index: int) -> str:
    return str(index)

  @abc.abstractmethod
  def describe(self) -> dict[str, Any]:
    """{"name", "count", "hash"}: kept in a checkpoint and compared on resume."""


class Arrays(DataSource):
  """Images in memory: uint8 or uint16 [N, H, W, C], C of 1, 3 or more; `extras` are further arrays by key."""

  def __init__(self, images: np.ndarray, labels: np.ndarray | None = None, *, extras: dict[str, np.ndarray] | None = None, name: str = "arrays", class_names: Sequence[str] = ()):
    super().__init__()
    images = np.asarray(images)
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype not in (np.uint8, np.uint16) or not len(images):
      raise UserError(f"{name}: images {images.shape} {images.dtype}; expected uint8 or uint16 of shape [N, H, W, C], N at least 1.")
    if labels is not None and len(labels) != len(images):
      raise UserError(f"{name}: {len(labels)} labels for {len(images)} images.")
    self.images, self.channels, self.class_names = images, images.shape[-1], tuple(class_names)
    self.labels = None if labels is None else np.asarray(labels, np.int32).reshape(-1)
    self.extras = extras or {}
    self._name = name

  def __len__(self) -> int:
    return len(self.images)

  def pixels(self, index: int, *, canvas: int = 0) -> np.ndarray:
    return self.images[index]

  def describe(self) -> dict[str, Any]:
    digest = hashlib.sha256(str((self.images.shape, str(self.images.dtype))).encode())
    digest.update(np.ascontiguousarray(self.images[:: max(1, len(self) // 1024)]).tobytes())
    return {"name": self._name, "count": len(self), "hash": digest.hexdigest()[:16]}


class Files(DataSource):
  """Encoded images somewhere in files: (name, file, offset, size) each; a size of -1 is the whole file."""

  def __init__(self, entries: Sequence[tuple[str, str, int, int]], labels: np.ndarray | None, *, name: str, class_names: Sequence[str] = (), digest: str = ""):
    super().__init__()
    self.entries, self.class_names = entries, tuple(class_names)
    self.labels = None if labels is None else np.asarray(labels, np.int32)
    self._name, self._digest = name, digest

  def __len__(self) -> int:
    return len(self.entries)

  def name(self, index: int) -> str:
    return self.entries[index][0]

  def read(self, index: int) -> bytes:
    _, file, offset, size = self.entries[index]
    with open(file, "rb") as f:
      f.seek(offset)
      return f.read(size)

  def describe(self) -> dict[str, Any]:
    digest = self._digest or hashlib.sha256("\n".join(f"{n} {s}" for n, _, _, s in self.entries).encode()).hexdigest()[:16]
    return {"name": self._name, "count": len(self), "hash": digest}


class Records(Files):
  """TFRecord examples: an image in "image" or "image/encoded", a label in "label" or "image/class/label"."""

  def read(self, index: int) -> bytes:
    return _example(super().read(index))["image"]


class Python(DataSource):
  """Any sequence whose items are an image array, a Pillow image, or a dict with "image" and perhaps "label"."""

  def __init__(self, items: Sequence[Any], *, labels: np.ndarray | None = None, channels: int = 3, name: str = "python"):
    super().__init__()
    if not len(items):
      raise UserError(f"{name}: the sequence is empty.")
    self._items, self.labels, self.channels, self._name = items, labels, channels, name

  def __len__(self) -> int:
    return len(self._items)

  def pixels(self, index: int, *, canvas: int = 0) -> np.ndarray:
    try:
      item = self._items[index]
    except Exception as error:  # the user's own code may raise anything; the image is skipped and listed
      raise decode.BadImage(f"{type(error).__name__}: {error}"[:120]) from None
    pixels = np.asarray(item["image"] if isinstance(item, dict) else item)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.dtype not in (np.uint8, np.uint16) or 0 in pixels.shape:
      raise decode.BadImage(f"{pixels.shape} {pixels.dtype} is not an image")
    return decode.fit_channels(pixels, self.channels)

  def describe(self) -> dict[str, Any]:
    return {"name": self._name, "count": len(self), "hash": ""}


class Subset(DataSource):
  """Some examples of another source."""

  def __init__(self, source: DataSource, indices: np.ndarray, *, name: str):
    super().__init__()
    self._source, self._indices, self._name = source, np.asarray(indices, np.int64), name
    self.channels, self.class_names = source.channels, source.class_names
    self.labels = None if source.labels is None else source.labels[self._indices]
    self.images = None if source.images is None else source.images[self._indices]

  def __len__(self) -> int:
    return len(self._indices)

  def name(self, index: int) -> str:
    return self._source.name(int(self._indices[index]))

  def read(self, index: int) -> bytes:
    return self._source.read(int(self._indices[index]))

  def pixels(self, index: int, *, canvas: int = 0) -> np.ndarray:
    return self._source.pixels(int(self._indices[index]), canvas=canvas)

  def describe(self) -> dict[str, Any]:
    return self._source.describe() | {"name": self._name, "count": len(self)}


# Opening


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

  Without an evaluation split, every tenth labelled example is held out; without labels, training images are evaluated.

  Raises:
    UserError: names `spec`, what is wrong and what is near.
  """
  if spec == "sprites":
    worlds = {"train": train_examples, "eval": eval_examples or 1024}
    return {k: _sprites(n, seed=seed, split=k, size=image_size) for k, n in worlds.items()}
  if spec.startswith("tfds:"):
    from big_ssl.data import tfds

    pair = tfds.open_pair(spec[5:], split=split or "train", eval_split=eval_split, data_dir=data_dir)
  elif spec.endswith(".npz"):
    pair = _npz(spec)
  elif spec.endswith(".tar") or ".tar" in pathlib.Path(spec).name and "*" in spec or "{" in spec:
    pair = [_tar(spec)]
  elif "tfrecord" in pathlib.Path(spec).name:
    pair = [_tfrecord(spec)]
  else:
    pair = _folder(pathlib.Path(spec), split, eval_split)
  train, held = (pair[0], pair[1]) if len(pair) == 2 else _hold_out(pair[0])
  if eval_examples and len(held) > eval_examples:
    held = Subset(held, np.linspace(0, len(held) - 1, eval_examples).astype(int), name=f"{held.describe()['name']}, {eval_examples} of it")
  return {"train": train, "eval": held}


def _sprites(count: int, *, seed: int, split: str, size: int) -> Arrays:
  world = sprites.render(np.arange(count), seed=seed, split=split, size=size)
  extras = {"mask": world.mask, "box": world.box}
  return Arrays(world.image, world.label, extras=extras, name=f"sprites/{split}", class_names=sprites.CLASSES)


def _hold_out(source: DataSource) -> tuple[DataSource, DataSource]:
  name = source.describe()["name"]
  if source.labels is None or len(source) < 2 * HELD_OUT:
    return source, source
  every = np.arange(len(source))
  held = every % HELD_OUT == HELD_OUT - 1
  return Subset(source, every[~held], name=f"{name} without the held-out tenth"), Subset(source, every[held], name=f"{name}, held-out tenth")


def _folder(root: pathlib.Path, split: str, eval_split: str) -> list[DataSource]:
  if not root.is_dir():
    siblings = [str(p) for p in root.parent.iterdir()] if root.parent.is_dir() else []
    raise UserError(
      f"--data={root}: no such folder.{nearest(str(root), siblings)} Accepted: a folder, a tar or glob of tars, an .npz, a TFRecord glob, tfds:name, sprites."
    )
  subfolders = sorted(p.name for p in root.iterdir() if p.is_dir())
  train = split or next((n for n in ("train", "training") if n in subfolders), "")
  held = eval_split or (next((n for n in ("val", "validation", "test", "eval") if n in subfolders), "") if train else "")
  for flag, name in (("split", split), ("eval_split", eval_split)):
    if name and name not in subfolders:
      raise UserError(f"config.data.{flag}={name!r}: {root} has no such folder.{nearest(name, subfolders)} There are: {', '.join(subfolders) or 'none'}.")
  return [_one_folder(root / name) for name in (train, held) if name] or [_one_folder(root)]


def _one_folder(root: pathlib.Path) -> Files:
  files = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file() and not any(part.startswith(".") for part in p.relative_to(root).parts))
  if not files:
    raise UserError(f"--data={root}: no images in it; looked for {', '.join(EXTENSIONS)} at any depth.")
  names = [str(p.relative_to(root)) for p in files]
  parents = [n.split("/")[0] if "/" in n else "" for n in names]
  classes = sorted(set(parents))
  labelled = len(classes) > 1 and "" not in classes
  labels = np.searchsorted(classes, parents).astype(np.int32) if labelled else None
  entries = [(n, str(p), 0, -1) for n, p in zip(names, files, strict=True)]
  digest = hashlib.sha256("\n".join(f"{n} {p.stat().st_size}" for n, p in zip(names, files, strict=True)).encode()).hexdigest()[:16]
  return Files(entries, labels, name=str(root), class_names=classes if labelled else (), digest=digest)


def _npz(file: str) -> list[Arrays]:
  try:
    with np.load(file, allow_pickle=False) as z:
      arrays = dict(z)
  except (OSError, ValueError) as error:
    raise UserError(f"--data={file}: cannot be read: {error}.") from None
  pick = lambda *names: next((arrays[n] for n in names if n in arrays), None)  # noqa: E731
  train, held = pick("x_train", "images", "x"), pick("x_test", "x_val")
  if train is None:
    raise UserError(f"--data={file}: no images; expected a key x_train, images or x, found {', '.join(arrays) or 'none'}.")
  out = [Arrays(train, pick("y_train", "labels", "y"), name=file)]
  return out + ([Arrays(held, pick("y_test", "y_val"), name=f"{file}, test")] if held is not None else [])


def _matches(pattern: str) -> list[str]:
  files = sorted(glob.glob(pattern))
  if not files:
    raise UserError(f"--data={pattern}: no such file.")
  return files


def _tar(pattern: str) -> Files:
  """An index of the images in tars; a class is the folder in the tar, or a .cls file beside the image (WebDataset)."""
  entries, folders, classes = [], [], {}
  for file in _matches(pattern):
    try:
      with tarfile.open(file, "r:") as tar:
        for member in tar:
          path = pathlib.PurePosixPath(member.name)
          if member.isfile() and path.suffix.lower() in EXTENSIONS:
            entries.append((f"{file}:{member.name}", file, member.offset_data, member.size))
            folders.append((str(path.parent), f"{file}:{path.with_suffix('')}"))
          elif member.isfile() and path.suffix == ".cls":
            classes[f"{file}:{path.with_suffix('')}"] = int(tar.extractfile(member).read())
    except (tarfile.TarError, ValueError) as error:
      raise UserError(f"--data={file}: not a readable, uncompressed tar: {error}.") from None
  if not entries:
    raise UserError(f"--data={pattern}: no images in it; looked for {', '.join(EXTENSIONS)}.")
  names = sorted({f for f, _ in folders})
  if len(classes) == len(entries):
    return Files(entries, np.array([classes[stem] for _, stem in folders]), name=pattern)
  if len(names) > 1:
    return Files(entries, np.searchsorted(names, [f for f, _ in folders]), name=pattern, class_names=names)
  return Files(entries, None, name=pattern)


def _tfrecord(pattern: str) -> Records:
  entries = []
  for file in _matches(pattern):
    entries += [(f"{file}:{i}", file, offset, size) for i, (offset, size) in enumerate(record_offsets(file))]
  if not entries:
    raise UserError(f"--data={pattern}: no records in it.")
  labels = [_example(Files.read(Records(entries, None, name=""), i)).get("label") for i in range(len(entries))]
  return Records(entries, None if None in labels else np.array(labels, np.int32), name=pattern)


def record_offsets(file: str) -> list[tuple[int, int]]:
  """(offset, size) of every record of a TFRecord file, from the length words alone."""
  found, position = [], 0
  end = pathlib.Path(file).stat().st_size
  with open(file, "rb") as f:
    while position < end:
      header = f.read(12)
      size = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else end
      if position + 16 + size > end:
        raise UserError(f"--data={file}: truncated at byte {position}, or not a TFRecord file.")
      found.append((position + 12, size))
      position += 16 + size
      f.seek(position)
  return found


@dataclasses.dataclass(frozen=True)
class _Field:
  number: int
  value: Any


def _fields(data: bytes) -> list[_Field]:
  """The fields of a protocol buffer message: varints as int, the rest as bytes."""
  out, i = [], 0

  def varint() -> int:
    nonlocal i
    value = shift = 0
    while True:
      byte = data[i]
      i += 1
      value |= (byte & 127) << shift
      if byte < 128:
        return value
      shift += 7

  while i < len(data):
    key = varint()
    if key & 7 == 0:
      out.append(_Field(key >> 3, varint()))
      continue
    size = {1: 8, 5: 4}.get(key & 7) or varint()
    out.append(_Field(key >> 3, data[i : i + size]))
    i += size
  return out


def _example(data: bytes) -> dict[str, Any]:
  """image bytes and label of a tf.train.Example."""
  out = {}
  try:
    for entry in _fields(_fields(data)[0].value):
      parts = {f.number: f.value for f in _fields(entry.value)}
      key, kind = parts[1].decode(), _fields(parts[2])[0]
      values = [f.value for f in _fields(kind.value)]
      if key in ("image", "image/encoded") and kind.number == 1:
        out["image"] = values[0]
      elif key in ("label", "image/class/label") and kind.number == 3:
        out["label"] = values[0] if isinstance(values[0], int) else values[0][0]
  except (IndexError, KeyError, UnicodeDecodeError):
    raise decode.BadImage("not a tf.train.Example") from None
  if "image" not in out:
    raise decode.BadImage("the example has no feature image or image/encoded")
  return out
