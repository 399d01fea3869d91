"""TFRecord files without tensorflow: the framing of records, and image and label of a tf.train.Example.

A record is length (uint64), its checksum (4 bytes), the message, its checksum (4 bytes). The message is protocol buffer
wire format: Example{1: Features{1: repeated entry{1: key, 2: Feature{1: BytesList | 3: Int64List}}}}, lists in field 1.
"""

from __future__ import annotations

import dataclasses
import mmap
import pathlib
import struct
from collections.abc import Iterator

import numpy as np

from big_ssl.core.types import UserError

IMAGE_KEYS = (b"image", b"image/encoded")
LABEL_KEYS = (b"label", b"image/class/label")
_HEADER, _FOOTER = 12, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class BadRecord(ValueError):
  """A message that is not a tf.train.Example with an image."""


@dataclasses.dataclass(frozen=True)
class Index:
  """Where the messages of a file lie.

  Attributes:
    offsets: [N] int64, first byte of each message.
    sizes: [N] int64, bytes.
    labels: [N] int32, or None where a record has none.
  """

  offsets: np.ndarray
  sizes: np.ndarray
  labels: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Example:
  """image: the encoded bytes, a view of the message; label: None where there is none."""

  image: memoryview
  label: int | None


def scan(file: str) -> Index:
  """Indexes a file in one pass over a memory map, so that no byte of an image is read.

  Raises:
    UserError: truncated, not a TFRecord file, or a record without an image.
  """
  offsets, sizes, labels = [], [], []
  end = pathlib.Path(file).stat().st_size
  if not end:
    return Index(np.zeros(0, np.int64), np.zeros(0, np.int64), None)
  with open(file, "rb") as f:
    data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
  position = 0
  while position < end:
    size = struct.unpack_from("<Q", data, position)[0] if position + _HEADER <= end else end
    if position + _HEADER + size + _FOOTER > end:
      raise UserError(f"--data={file}: truncated at byte {position}, or not an uncompressed TFRecord file.")
    start = position + _HEADER
    try:
      labels.append(parse(data[start : start + size]).label)
    except BadRecord as error:
      raise UserError(f"--data={file}: record {len(offsets)}: {error}.") from None
    offsets.append(start)
    sizes.append(size)
    position = start + size + _FOOTER
  complete = None not in labels
  return Index(np.array(offsets), np.array(sizes), np.array(labels, np.int32) if complete else None)


def parse(message: bytes | memoryview) -> Example:
  """Reads image and label of a serialized tf.train.Example; raises `BadRecord`."""
  image = label = None
  keys = []
  try:
    for features in _messages(message, 1):
      for entry in _messages(features, 1):
        key, feature = b"", None
        for number, value in _fields(entry):
          key, feature = (bytes(value), feature) if number == 1 else (key, value)
        keys.append(key)
        if key in IMAGE_KEYS:
          image = next((v for values in _messages(feature, 1) for v in _messages(values, 1)), image)
        elif key in LABEL_KEYS:
          label = next((_first_int(values) for values in _messages(feature, 3)), label)
  except (IndexError, TypeError):
    raise BadRecord("not a tf.train.Example") from None
  if image is None:
    found = b", ".join(sorted(keys)).decode(errors="replace") or "none"
    raise BadRecord(f"no feature 'image' or 'image/encoded' with encoded bytes; found {found}")
  return Example(image, label)


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
  """(field number, value): varints as int, all else as bytes; IndexError where the message is malformed."""
  data, i = memoryview(data), 0
  while i < len(data):
    key, i = _varint(data, i)
    kind = key & 7
    if kind == _VARINT:
      value, i = _varint(data, i)
      yield key >> 3, value
      continue
    if kind == _BYTES:
      size, i = _varint(data, i)
    elif kind in (_FIXED64, _FIXED32):
      size = 8 if kind == _FIXED64 else 4
    else:
      raise IndexError(f"wire type {kind}")
    if i + size > len(data):
      raise IndexError("field runs past the end")
    yield key >> 3, data[i : i + size]
    i += size


def _messages(data: bytes | memoryview, number: int) -> Iterator[memoryview]:
  """The values of the fields `number`, which have to be length-delimited."""
  for found, value in _fields(data):
    if found == number:
      if isinstance(value, int):
        raise IndexError("a number where bytes were expected")
      yield value


def _varint(data: memoryview, i: int) -> tuple[int, int]:
  """(value, next position) of a base-128 number, lowest seven bits first."""
  value = shift = 0
  while True:
    byte = data[i]
    i += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, i
    shift += 7


def _first_int(values: memoryview) -> int | None:
  """First number of an Int64List, packed (as every writer does) or not; negative numbers are two's complement."""
  for number, value in _fields(values):
    if number == 1 and (isinstance(value, int) or len(value)):
      unsigned = value if isinstance(value, int) else _varint(value, 0)[0]
      return unsigned - (1 << 64) if unsigned >> 63 else unsigned
  return None
