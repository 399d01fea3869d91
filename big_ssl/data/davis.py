"""The folders of DAVIS 2017 (arXiv 1704.00675) as clips.

  JPEGImages/480p/<sequence>/00000.jpg ...    frames
  Annotations/480p/<sequence>/00000.png ...   one mask per frame, palette indices 0 background, 1 ... the objects
  ImageSets/2017/val.txt                      the sequences, one in a line
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.data import decode
from big_ssl.data.clips import Clip

FRAMES, MASKS, LIST = "JPEGImages/480p", "Annotations/480p", "ImageSets/2017/val.txt"


@dataclasses.dataclass(frozen=True)
class FileClip(Clip):
  """A clip in files, which are read when a frame is asked for."""

  name: str
  frames: tuple[pathlib.Path, ...]
  masks: tuple[pathlib.Path, ...]
  channels: int = 3

  def __len__(self) -> int:
    return len(self.frames)

  def frame(self, index: int) -> np.ndarray:
    return _read(self.frames[index], lambda data: decode.decode(data, channels=self.channels))

  def mask(self, index: int) -> np.ndarray:
    return _read(self.masks[index], decode.decode_mask)


def open_clips(path: str, *, channels: int = 3, field: str = "--data") -> list[FileClip]:
  """The validation sequences below `path`, in the order of the list; nothing but names is read.

  Args:
    channels: of the decoded frames.
    field: config path that names the folder, for errors.

  Raises:
    UserError: a folder or the list is missing, a sequence has fewer than two frames, or a frame has no mask.
  """
  root, where = pathlib.Path(path).expanduser(), f"{field}={path}"
  missing = [part for part in (FRAMES, MASKS, LIST) if not (root / part).exists()]
  if missing:
    near = [str(p) for p in root.parent.iterdir()] if not root.exists() and root.parent.is_dir() else []
    raise UserError(
      f"{where}: there is no {', no '.join(missing)} in it; expected the folders of DAVIS 2017, {FRAMES}/<sequence>/*.jpg,"
      f" {MASKS}/<sequence>/*.png and {LIST}.{nearest(str(root), near)}"
    )
  names = (root / LIST).read_text().split()
  if not names:
    raise UserError(f"{where}: {LIST} is empty; expected one sequence in a line.")
  return [_sequence(root, name, channels, where) for name in names]


def _sequence(root: pathlib.Path, name: str, channels: int, where: str) -> FileClip:
  frames = tuple(sorted((root / FRAMES / name).glob("*.jpg")))
  if len(frames) < 2:
    raise UserError(f"{where}: sequence '{name}' of {LIST} has {len(frames)} frames in {FRAMES}/{name}; expected at least 2.")
  masks = tuple(root / MASKS / name / f"{frame.stem}.png" for frame in frames)
  without = [mask.name for mask in masks if not mask.is_file()]
  if without:
    raise UserError(f"{where}: {len(without)} frames of '{name}' have no mask, such as {MASKS}/{name}/{without[0]}.")
  return FileClip(name, frames, masks, channels)


def _read(file: pathlib.Path, parse) -> np.ndarray:
  try:
    return parse(file.read_bytes())
  except OSError as error:
    raise UserError(f"{file}: {error.strerror or error}.") from None
  except decode.BadImage as error:
    raise UserError(f"{file}: {error}.") from None
