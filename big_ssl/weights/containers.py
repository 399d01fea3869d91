"""Files of weights as flat names and lazily read arrays: torch, safetensors, npz, flax msgpack.

A name is the path of dict keys joined by "/", and at its end the name that the file's own library uses: "teacher/
backbone.cls_token" of a torch file, "params/Transformer/encoder_norm/scale" of a flax one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.weights.torch_file import Opaque, read_torch

_SUFFIXES = {
  ".safetensors": "safetensors",
  ".npz": "npz",
  ".msgpack": "msgpack",
  **dict.fromkeys((".pth", ".pt", ".torch", ".tar", ".bin", ".pkl", ".ckpt"), "torch"),
}


@dataclasses.dataclass(frozen=True)
class Lazy:
  """A tensor that is in the file still."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class Tensors(Mapping):
  """{name: array}; arrays are read when asked for, shapes and dtypes are known before."""

  def __init__(self, entries: Mapping[str, Lazy | np.ndarray]):
    self._entries = dict(entries)

  def __getitem__(self, name: str) -> np.ndarray:
    entry = self._entries[name]
    return entry.read() if isinstance(entry, Lazy) else entry

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._entries[name].shape)

  def dtype(self, name: str) -> np.dtype:
    return np.dtype(self._entries[name].dtype)

  def renamed(self, names: Mapping[str, str]) -> Tensors:
    """Those of {old: new}, under their new names and in that order."""
    return Tensors({new: self._entries[old] for old, new in names.items()})


@dataclasses.dataclass(frozen=True)
class File:
  """What a file holds.

  Attributes:
    path: of the file.
    kind: "torch", "safetensors", "npz" or "msgpack".
    tensors: all of them, by "/"-joined paths.
    others: {path: what it is} of everything that is no tensor: numbers, text, objects of unknown classes.
    metadata: text that the container has beside the tensors.
  """

  path: pathlib.Path
  kind: str
  tensors: Tensors
  others: dict[str, Any]
  metadata: dict[str, str]

  def sha256(self) -> str:
    """Of the file's bytes."""
    with open(self.path, "rb") as stream:
      return hashlib.file_digest(stream, "sha256").hexdigest()


def read_file(path: str | pathlib.Path) -> File:
  """Opens a file of weights; the kind is that of the suffix.

  Raises:
    UserError: no such file, an unknown suffix, or a damaged file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise UserError(f"{path}: no such file.")
  kind = _SUFFIXES.get(path.suffix)
  if kind is None:
    raise UserError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES)}.{nearest(path.suffix, _SUFFIXES)}")
  read = {"torch": _torch, "safetensors": _safetensors, "npz": _npz, "msgpack": _msgpack}[kind]
  return read(path)


def _torch(path: pathlib.Path) -> File:
  return _file(path, "torch", read_torch(path))


def _file(path: pathlib.Path, kind: str, tree: Any) -> File:
  tensors: dict[str, np.ndarray] = {}
  others: dict[str, Any] = {}
  _walk(tree, "", tensors, others)
  return File(path, kind, Tensors(tensors), others, {})


def _walk(node: Any, path: str, tensors: dict[str, np.ndarray], others: dict[str, Any]) -> None:
  """Splits nested containers into arrays and the rest."""
  if isinstance(node, np.ndarray) and node.dtype != object:
    tensors[path.removesuffix("/")] = node
  elif isinstance(node, Mapping) and node:
    for key, value in node.items():
      _walk(value, f"{path}{key}/", tensors, others)
  elif isinstance(node, list | tuple) and any(isinstance(x, np.ndarray | Mapping) for x in node):
    for i, value in enumerate(node):
      _walk(value, f"{path}{i}/", tensors, others)
  else:
    others[path.removesuffix("/")] = node


def describe(value: Any) -> str:
  """One word or two for an entry of `File.others`."""
  if isinstance(value, Opaque):
    return f"object of {value.kind}"
  text = repr(value)
  return text if len(text) <= 40 else type(value).__name__


def _safetensors(path: pathlib.Path) -> File:
  import safetensors

  try:
    with safetensors.safe_open(path, "numpy") as stream:
      metadata = stream.metadata() or {}
      entries = {name: _slice(path, stream, name) for name in stream.keys()}
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"{path}: damaged, or not a safetensors file ({error}).") from None
  return File(path, "safetensors", Tensors(entries), {}, metadata)


_SAFE_DTYPES = {
  **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4", "I16": "<i2"},
  **{"I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "?", "C64": "<c8"},
  **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
}


def _slice(path: pathlib.Path, stream: Any, name: str) -> Lazy:
  import safetensors

  def read() -> np.ndarray:
    with safetensors.safe_open(path, "numpy") as again:
      return again.get_tensor(name)

  part = stream.get_slice(name)
  return Lazy(tuple(part.get_shape()), np.dtype(_SAFE_DTYPES[part.get_dtype()]), read)


def _npz(path: pathlib.Path) -> File:
  try:
    archive = np.load(path, allow_pickle=False)
    entries = {name: _member(archive, name) for name in archive.files}
  except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
    raise UserError(f"{path}: damaged, or not an .npz of plain arrays ({error}).") from None
  return File(path, "npz", Tensors(entries), {}, {})


def _member(archive: Any, name: str) -> Lazy:
  """The header of an array; numpy writes bfloat16 as 2-byte voids."""
  with archive.zip.open(name + ".npy") as stream:
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
  if dtype.hasobject:
    raise ValueError(f"'{name}' holds Python objects")

  def read() -> np.ndarray:
    try:
      return archive[name]
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
      raise UserError(f"{archive.zip.filename}: '{name}' is damaged ({error}).") from None

  if dtype == np.dtype("V2"):
    return Lazy(shape, np.dtype(ml_dtypes.bfloat16), lambda: read().view(ml_dtypes.bfloat16))
  return Lazy(shape, dtype, read)


def _msgpack(path: pathlib.Path) -> File:
  import flax.serialization
  import msgpack

  try:
    tree = flax.serialization.msgpack_restore(path.read_bytes())
  except (ValueError, TypeError, msgpack.UnpackException) as error:
    raise UserError(f"{path}: damaged, or not a flax msgpack file ({error}).") from None
  return _file(path, "msgpack", tree)


def write_safetensors(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray], *, metadata: dict[str, str]) -> None:
  """Writes contiguous arrays, and {"format": "pt"} as torch's and JAX's readers of it expect."""
  from safetensors.numpy import save_file

  arrays = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()}
  save_file(arrays, path, metadata={"format": "pt"} | metadata)
  pathlib.Path(path).chmod(0o644)  # the library leaves it to the owner alone


def write_npz(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes an uncompressed `.npz`, as big_vision and scenic read it."""
  with open(path, "wb") as stream:
    np.savez(stream, **{name: np.asarray(value) for name, value in tensors.items()})
