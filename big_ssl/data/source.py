"""Where images come from: index-addressed sources in memory, in files, in records, in a user's own objects."""

from __future__ import annotations

import abc
import hashlib
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.data import decode, listing, tfrecord
from big_ssl.data.clips import Clip
from big_ssl.data.listing import Listing


class DataSource(abc.ABC):
  """Examples by index.

  Attributes:
    labels: int32 [N], -1 where an image has none; or None.
    class_names: of the labels, or ().
    channels: of the images.
    images: uint8 or uint16 [N, H, W, C] where all of them are in memory, or None.
    extras: further arrays [N, ...] by key.
    encoded: whether `read` gives encoded bytes.
    clips: videos of the same world with masks, read when asked for; () where there are none.
  """

  labels: np.ndarray | None = None
  class_names: tuple[str, ...] = ()
  channels: int = 3
  images: np.ndarray | None = None
  encoded: bool = False
  clips: Sequence[Clip] = ()

  def __init__(self, *, name: str):
    self.extras: dict[str, np.ndarray] = {}
    self._title = name
    self._problems: dict[str, str] = {}
    self._lock = threading.Lock()

  @property
  def problems(self) -> list[tuple[str, str]]:
    """(name, reason) of every image that could not be read so far; safe to ask from any thread."""
    with self._lock:
      return sorted(self._problems.items())

  def report(self, index: int, reason: str) -> None:
    """Remembers a bad image."""
    with self._lock:
      self._problems[self.name(index)] = reason

  @abc.abstractmethod
  def __len__(self) -> int: ...

  def read(self, index: int) -> bytes:
    """The encoded bytes of an image, where `encoded`; raises `decode.BadImage`."""
    raise TypeError(f"{type(self).__name__} has no encoded images")

  def pixels(self, index: int, *, canvas: int = 0) -> np.ndarray:
    """Decoded [h, w, C]; raises `decode.BadImage`."""
    return decode.decode(self.read(index), channels=self.channels, canvas=canvas)

  def fetch(self, indices: Sequence[int]) -> list[np.ndarray]:
    """The images of some indices, decoded; raises `decode.BadImage`."""
    return [self.pixels(int(i)) for i in indices]

  @property
  def has_masks(self) -> bool:
    """Whether `mask` gives the classes of the pixels of every image."""
    return "mask" in self.extras

  def mask(self, index: int) -> np.ndarray:
    """Class of every pixel, integers [h, w], as the image is decoded; raises `decode.BadImage`."""
    if not self.has_masks:
      raise UserError(f"config.data.source: {self._title} has no masks. {listing.MASK_LAYOUT}")
    return self.extras["mask"][index]

  def name(self, index: int) -> str:
    """What an image is called in messages."""
    return str(index)

  def describe(self) -> dict[str, Any]:
    """{"name", "count", "hash"}: kept in a checkpoint and compared on resume, so it holds no path."""
    return {"name": self._title, "count": len(self), "hash": self._hash()}

  @abc.abstractmethod
  def _hash(self) -> str: ...


class Arrays(DataSource):
  """Images in memory: uint8 or uint16 [N, H, W, C] or [N, H, W]; `extras` are further arrays [N, ...] by key."""

  def __init__(
    self,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    extras: dict[str, np.ndarray] | None = None,
    name: str = "arrays",
    class_names: Sequence[str] = (),
  ):
    super().__init__(name=name)
    images = np.asarray(images)
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.dtype not in (np.uint8, np.uint16) or 0 in images.shape:
      raise UserError(
        f"{name}: images {images.shape} {images.dtype}; expected uint8 or uint16 of shape [N, H, W, C], N at least 1."
      )
    self.images, self.channels, self.class_names = images, images.shape[-1], tuple(class_names)
    self.labels = None if labels is None else _checked_labels(np.asarray(labels), len(images), name)
    self.extras = {key: np.asarray(values) for key, values in (extras or {}).items()}
    for key, values in self.extras.items():
      if len(values) != len(images):
        raise UserError(f"{name}: {len(values)} rows of '{key}' for {len(images)} images.")

  def __len__(self) -> int:
    return len(self.images)

  def pixels(self, index: int, *, canvas: int = 0) -> np.ndarray:
    return self.images[index]

  def _hash(self) -> str:
    digest = hashlib.sha256(str((self.images.shape, str(self.images.dtype))).encode())
    digest.update(np.ascontiguousarray(self.images[:: max(1, len(self) // 1024)]).tobytes())
    return digest.hexdigest()[:16]


def _checked_labels(labels: np.ndarray, count: int, name: str) -> np.ndarray:
  if labels.size != count or len(labels) != count:
    raise UserError(f"{name}: labels of shape {labels.shape} for {count} images; expected one integer each.")
  whole = labels.reshape(-1)
  numbers = np.issubdtype(labels.dtype, np.number)
  if not numbers or not np.array_equal(whole, whole.astype(np.int32)) or whole.min() < -1:
    raise UserError(f"{name}: labels {labels.dtype}, such as {whole[:3]}; expected class numbers from 0, -1 is none.")
  return whole.astype(np.int32)


class Files(DataSource):
  """Encoded images in a folder or in tars."""

  encoded = True

  def __init__(self, found: Listing, *, name: str):
    super().__init__(name=name)
    self._found, self._digest = found, found.digest()
    self.labels, self.class_names = found.labels, found.class_names

  def __len__(self) -> int:
    return len(self._found.names)

  def name(self, index: int) -> str:
    return self._found.names[index]

  @property
  def has_masks(self) -> bool:
    return self._found.masks is not None

  def mask(self, index: int) -> np.ndarray:
    if not self.has_masks:
      return super().mask(index)
    try:
      return decode.decode_mask(pathlib.Path(self._found.masks[index]).read_bytes())
    except OSError as error:
      raise decode.BadImage(error.strerror or str(error)) from None

  def read(self, index: int) -> bytes:
    found = self._found
    try:
      with open(found.files[index], "rb", buffering=0) as f:
        f.seek(found.offsets[index])
        return f.read(found.sizes[index])
    except OSError as error:
      raise decode.BadImage(error.strerror or str(error)) from None

  def _hash(self) -> str:
    return self._digest


class Records(Files):
  """tf.train.Examples: an image in "image" or "image/encoded", a label in "label" or "image/class/label"."""

  def __init__(self, found: Listing, *, name: str, channels: int = 3):
    super().__init__(found, name=name)
    self.channels = channels

  def read(self, index: int) -> bytes:
    try:
      return bytes(tfrecord.parse(super().read(index)).image)
    except tfrecord.BadRecord as error:
      raise decode.BadImage(str(error)) from None


class Python(DataSource):
  """Any sequence whose items are an image array, a Pillow image, or a dict with either as "image"."""

  def __init__(
    self, items: Sequence[Any], *, labels: np.ndarray | None = None, channels: int = 3, name: str = "python"
  ):
    super().__init__(name=name)
    if not len(items):
      raise UserError(f"{name}: the sequence is empty.")
    self._items, self.channels = items, channels
    self.labels = None if labels is None else _checked_labels(np.asarray(labels), len(items), name)

  def __len__(self) -> int:
    return len(self._items)

  def pixels(self, index: int, *, canvas: int = 0) -> np.ndarray:
    try:
      item = self._items[index]
      item = item["image"] if isinstance(item, dict) else item
    except Exception as error:  # the user's own code may raise anything; the image is skipped and listed
      raise decode.BadImage(f"{type(error).__name__}: {error}"[:120]) from None
    return decode.from_object(item, channels=self.channels)

  def _hash(self) -> str:
    return ""


class Subset(DataSource):
  """Some examples of another source; `hashed` where which ones they are does not follow from that source alone."""

  def __init__(self, source: DataSource, indices: np.ndarray, *, name: str, hashed: bool = False):
    super().__init__(name=name)
    self._source, self._indices, self._hashed = source, np.asarray(indices, np.int64), hashed
    self.channels, self.class_names, self.encoded = source.channels, source.class_names, source.encoded
    self.labels = None if source.labels is None else source.labels[self._indices]
    self.images = None if source.images is None else source.images[self._indices]
    self.extras = {key: values[self._indices] for key, values in source.extras.items()}

  def __len__(self) -> int:
    return len(self._indices)

  def name(self, index: int) -> str:
    return self._source.name(int(self._indices[index]))

  def read(self, index: int) -> bytes:
    return self._source.read(int(self._indices[index]))

  def pixels(self, index: int, *, canvas: int = 0) -> np.ndarray:
    return self._source.pixels(int(self._indices[index]), canvas=canvas)

  @property
  def has_masks(self) -> bool:
    return self._source.has_masks

  def mask(self, index: int) -> np.ndarray:
    return self._source.mask(int(self._indices[index]))

  def _hash(self) -> str:
    rows = f"-{hashlib.sha256(self._indices.tobytes()).hexdigest()[:8]}" if self._hashed else ""
    return self._source.describe()["hash"] + rows
