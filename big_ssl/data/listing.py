"""Finds the images of folders, tars and TFRecord files, and the labels that their names give."""

from __future__ import annotations

import collections
import dataclasses
import glob
import hashlib
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.data import tfrecord

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
MASK_FOLDERS = ("labels", "masks", "annotations")
MASK_LAYOUT = f"Masks are .png files of the same name in a folder {', '.join(MASK_FOLDERS)} where the images are in one called images."
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "validation", "test", "eval")


@dataclasses.dataclass(frozen=True)
class Listing:
  """Encoded images inside files.

  Attributes:
    names: [N], relative, for messages and for the hash.
    files: [N], where to read.
    offsets, sizes: [N] int64 bytes.
    labels: [N] int32, -1 for a class that is not in `class_names`; or None.
    class_names: of the labels, or ().
    masks: [N], files of the classes of the pixels; or None.
  """

  names: Sequence[str]
  files: Sequence[str]
  offsets: np.ndarray
  sizes: np.ndarray
  labels: np.ndarray | None = None
  class_names: tuple[str, ...] = ()
  masks: Sequence[str] | None = None

  def digest(self) -> str:
    """Hash of the names and sizes: cheap, and the same wherever the data is moved to."""
    lines = "\n".join(f"{n} {s}" for n, s in zip(self.names, self.sizes, strict=True))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]

  def take(self, rows: Sequence[int], *, names: Sequence[str]) -> Listing:
    """The images `rows` under new names, without labels."""
    rows = np.asarray(rows, np.int64)
    masks = None if self.masks is None else [self.masks[i] for i in rows]
    return Listing(names, [self.files[i] for i in rows], self.offsets[rows], self.sizes[rows], masks=masks)

  def labeled_by_folder(self, class_names: Sequence[str] | None = None) -> Listing:
    """The class is the first folder below those that all images share; no labels for one folder, or a stray image.

    Args:
      class_names: of the training images, where these are others: the class is the first folder of such a name,
        -1 without one.
    """
    folders = [n.split("/")[:-1] for n in self.names]
    if class_names is None:
      shared = len(os.path.commonprefix(folders))
      if any(len(f) == shared for f in folders):
        return self
      class_names = sorted({f[shared] for f in folders})
      found = [f[shared] for f in folders]
    else:
      found = [next((part for part in f if part in class_names), "") for f in folders]
    number = {name: k for k, name in enumerate(class_names)}
    labels = np.array([number.get(f, -1) for f in found], np.int32)
    return dataclasses.replace(self, labels=labels, class_names=tuple(class_names))


def split_by_folder(listing: Listing, *, where: str, split: str, eval_split: str) -> dict[str, Listing]:
  """{split name: its images}: the training images, then those held out where there are some; labels from class folders.

  "train" and "val" (or "validation", "test", "eval") at the top are splits; "" is the name of the undivided whole.

  Raises:
    UserError: `split` or `eval_split` is not a folder at the top.
  """
  rows: dict[str, list[int]] = collections.defaultdict(list)
  for i, name in enumerate(listing.names):
    rows[name.split("/")[0] if "/" in name else ""].append(i)
  tops = sorted(t for t in rows if t)
  for flag, name in (("split", split), ("eval_split", eval_split)):
    if name and name not in tops:
      raise UserError(
        f"config.data.{flag}={name!r}: {where} has no such folder of images.{nearest(name, tops)}"
        f" There are: {', '.join(tops[:20]) or 'none'}."
      )
  train = split or next((n for n in TRAIN_NAMES if n in tops), "")
  held = eval_split or (next((n for n in EVAL_NAMES if n in tops and n != train), "") if train else "")
  if not train and held:
    train_rows = [i for name, found in rows.items() if name != held for i in found]
    parts = {"": sorted(train_rows), held: rows[held]}
  else:
    parts = {train: rows[train] if train else range(len(listing.names))} | ({held: rows[held]} if held else {})
  out: dict[str, Listing] = {}
  for name, chosen in parts.items():
    prefix = len(name) + 1 if name else 0
    part = listing.take(chosen, names=[listing.names[i][prefix:] for i in chosen])
    if listing.labels is not None:
      out[name] = dataclasses.replace(part, labels=listing.labels[np.asarray(chosen)])
    else:
      known = next(iter(out.values())).class_names if out else None  # those of the training images
      out[name] = part if known == () else part.labeled_by_folder(known)
  return out


def pair_masks(listing: Listing, *, where: str) -> Listing:
  """The images of a folder with their masks; the listing as it is where it has no masks.

  Where a folder "images" (at any depth) has a sibling out of `MASK_FOLDERS`, its pictures are masks: images/a/1.jpg has
  labels/a/1.png, and so do val/images/1.jpg and val/labels/1.png. "images" is then left out of the names, so that
  images/train/1.jpg is of the split "train".

  Raises:
    UserError: an image without a mask, or masks without images.
  """
  number = {name: i for i, name in enumerate(listing.names)}
  parts = [name.split("/") for name in listing.names]
  beside = {(tuple(p[:i]), folder) for p in parts for i, folder in enumerate(p[:-1])}
  of_mask = lambda p: next((i for i, f in enumerate(p[:-1]) if f in MASK_FOLDERS and (tuple(p[:i]), "images") in beside), None)
  rows, names, masks = [], [], []
  for row, p in enumerate(parts):
    if of_mask(p) is not None:
      continue
    at = next((i for i, f in enumerate(p[:-1]) if f == "images"), None)
    kinds = [f for f in MASK_FOLDERS if at is not None and (tuple(p[:at]), f) in beside]
    if not kinds:
      return listing  # an image of another kind: these are folders of classes
    mask = "/".join([*p[:at], kinds[0], *p[at + 1 : -1], posixpath.splitext(p[-1])[0] + ".png"])
    if mask not in number:
      raise UserError(f"--data={where}: {listing.names[row]} has no mask {mask}. {MASK_LAYOUT}")
    rows.append(row)
    names.append("/".join(p[:at] + p[at + 1 :]))
    masks.append(listing.files[number[mask]])
  if not rows:
    return listing
  return dataclasses.replace(listing.take(rows, names=names), masks=masks)


def folder(root: pathlib.Path) -> Listing:
  """Every image below `root`, in the order of their relative paths; hidden files and folders are left out."""
  found = sorted(_walk(str(root), "", frozenset()), key=lambda item: item[0].split("/"))
  if not found:
    raise UserError(f"--data={root}: no images in it; looked for {', '.join(EXTENSIONS)} at any depth.{_other(root)}")
  names = [name for name, _ in found]
  sizes = np.array([size for _, size in found], np.int64)
  return Listing(names, [os.path.join(root, n) for n in names], np.zeros(len(names), np.int64), sizes)


def _walk(directory: str, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, int]]:
  """(relative path, bytes) of the images; links to folders are followed, but not back into a folder above."""
  real = os.path.realpath(directory)
  if real in above:
    return
  try:
    entries = list(os.scandir(directory))
  except OSError as error:
    raise UserError(f"--data={directory}: cannot be listed: {error.strerror}.") from None
  for entry in entries:
    if entry.name.startswith("."):
      continue
    if entry.is_dir():
      yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {real})
    elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
      yield f"{prefix}{entry.name}", entry.stat().st_size


def _other(root: pathlib.Path) -> str:
  """A hint where the folder holds archives instead."""
  for pattern in ("*.tar", "*.npz", "*tfrecord*"):
    if next(root.glob(pattern), None) is not None:
      return f" It holds {pattern} files: give --data='{root / pattern}'."
  return ""


def matches(pattern: str) -> list[str]:
  """The files of a path or glob, sorted; raises `UserError` where there are none."""
  files = sorted(f for f in glob.glob(pattern) if os.path.isfile(f))
  if not files:
    path = pathlib.Path(pattern)
    siblings = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"--data={pattern}: no such file.{nearest(pattern, siblings)}")
  return files


def tar(pattern: str) -> Listing:
  """The images of uncompressed tars in archive order; a `.cls` file beside each image is its label (WebDataset)."""
  names, files, offsets, sizes, stems, classes = [], [], [], [], [], {}
  for file in matches(pattern):
    try:
      with tarfile.open(file, "r:") as archive:
        for member in archive:
          path = posixpath.normpath(member.name).lstrip("/")
          stem, extension = posixpath.splitext(path)
          if not member.isfile() or member.issparse() or any(part.startswith(".") for part in path.split("/")):
            continue
          if extension.lower() in EXTENSIONS:
            names.append(path)
            files.append(file)
            offsets.append(member.offset_data)
            sizes.append(member.size)
            stems.append((file, stem))
          elif extension == ".cls":
            classes[file, stem] = _class(archive.extractfile(member).read(), where=f"{file}:{path}")
    except (tarfile.TarError, EOFError) as error:
      raise UserError(f"--data={file}: not a readable, uncompressed tar: {error}.") from None
  if not names:
    raise UserError(f"--data={pattern}: no images in it; looked for {', '.join(EXTENSIONS)}.")
  labels = None
  if classes:
    missing = [f"{file}:{stem}" for file, stem in stems if (file, stem) not in classes]
    if missing:
      count = f"{len(missing)} of {len(names)} images"
      raise UserError(f"--data={pattern}: {count} have no .cls file, the first is {missing[0]}.")
    labels = np.array([classes[s] for s in stems], np.int32)
  return Listing(names, files, np.array(offsets, np.int64), np.array(sizes, np.int64), labels)


def _class(data: bytes, *, where: str) -> int:
  try:
    return int(data)
  except ValueError:
    raise UserError(f"--data={where}: {data[:20]!r}; expected the number of the class.") from None


def tfrecords(files: Sequence[str]) -> Listing:
  """The examples of TFRecord files, in order; labels where every example has one."""
  parts = [tfrecord.scan(f) for f in files]
  names = [f"{os.path.basename(f)}:{i}" for f, part in zip(files, parts, strict=True) for i in range(len(part.sizes))]
  if not names:
    raise UserError(f"--data={files[0]}: no records in it.")
  labels = [part.labels for part in parts if len(part.sizes)]
  return Listing(
    names,
    [f for f, part in zip(files, parts, strict=True) for _ in part.sizes],
    np.concatenate([p.offsets for p in parts]),
    np.concatenate([p.sizes for p in parts]),
    None if any(x is None for x in labels) else np.concatenate(labels),
  )
