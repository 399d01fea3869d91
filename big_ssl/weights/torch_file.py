"""Reads the files of `torch.save` without torch, by unpicklers that can build tensors and plain containers only.

Two formats: a zip archive with `data.pkl` and one member per storage (torch >= 1.6), and a stream of pickles followed by
the raw storages (older). Tensors are views of a memory map: nothing is read before it is used. A class that is not known
becomes an `Opaque` that holds nothing and does nothing; a function of the standard library ends the reading.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import pathlib
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from big_ssl.core.types import UserError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {
  **{"Float": "<f4", "Double": "<f8", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1"},
  **{"Byte": "u1", "Bool": "?", "ComplexFloat": "<c8", "ComplexDouble": "<c16", "BFloat16": ml_dtypes.bfloat16},
}
_TORCH_DTYPES = {
  **{"float32": "<f4", "float64": "<f8", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16, "int64": "<i8"},
  **{"int32": "<i4", "int16": "<i2", "int8": "i1", "uint8": "u1", "bool": "?", "uint16": "<u2", "uint32": "<u4"},
  **{"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2},
}
_PLAIN = ("set", "frozenset", "list", "dict", "tuple", "int", "float", "str", "bytes", "bytearray", "complex", "bool")
# Of the standard library, what public checkpoints hold beside their tensors; they become `Opaque`.
_HARMLESS = ("pathlib", "datetime", "enum", "collections", "uuid", "decimal", "fractions", "dataclasses")


class Opaque:
  """Stands for an object of a class that is not built; `kind` is the class's name."""

  kind = ""

  def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
    return super().__new__(cls)

  def __init__(self, *args: Any, **kwargs: Any):
    pass

  def __setstate__(self, state: Any) -> None:
    pass

  def __setitem__(self, key: Any, value: Any) -> None:
    pass

  def __hash__(self) -> int:
    return id(self)

  def append(self, value: Any) -> None:
    pass

  def extend(self, values: Any) -> None:
    pass


class _Unpickler(pickle.Unpickler):
  """Builds tensors by `storage(type, key, count)`, and what is listed above."""

  def __init__(self, stream: io.BufferedIOBase, *, where: str, storage: Callable[[np.dtype, str, int], np.ndarray]):
    super().__init__(stream, encoding="latin1")  # pickles of Python 2 hold bytes where text is meant
    self._where, self._storage = where, storage

  def persistent_load(self, pid: Any) -> np.ndarray:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
      raise UserError(f"{self._where}: not a torch file; it refers to {str(pid)[:60]!r}.")
    data = self._storage(pid[1], str(pid[2]), int(pid[4]))
    view = pid[5] if len(pid) > 5 else None
    return data if view is None else data[view[1] : view[1] + view[2]]

  def find_class(self, module: str, name: str) -> Any:
    module = "builtins" if module == "__builtin__" else module  # Python 2
    full = f"{module}.{name}"
    if found := _KNOWN.get(full):
      return found
    if module == "builtins" and name in _PLAIN:
      return getattr(builtins, name)
    if module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage"):
      kind = name.removesuffix("Storage")
      if kind in _DTYPES or kind in ("Untyped", "Typed"):
        return np.dtype(_DTYPES.get(kind, "u1"))
    if module == "torch" and name in _TORCH_DTYPES:
      return np.dtype(_TORCH_DTYPES[name])
    root = module.partition(".")[0]
    if (root in sys.stdlib_module_names or root == "numpy") and root not in _HARMLESS:
      raise UserError(
        f"{self._where}: refused, its pickle would call '{full}'. Only tensors and plain containers are read."
      )
    return type(name, (Opaque,), {"kind": full})


def _rebuild(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
  """The view of a storage that a tensor is."""
  size, stride = tuple(map(int, size)), tuple(map(int, stride))
  if len(size) != len(stride) or min((*size, *stride, offset), default=0) < 0:
    raise ValueError(f"a tensor of sizes {size} and strides {stride}")
  last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
  if 0 in size:
    return np.zeros(size, storage.dtype)
  if last >= storage.size:
    raise ValueError(f"a tensor of sizes {size} and strides {stride} reaches beyond its storage of {storage.size}")
  steps = tuple(step * storage.itemsize for step in stride)
  return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _rebuild_typed(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *rest: Any) -> np.ndarray:
  """As `_rebuild`, for an untyped storage: arguments are requires_grad, hooks, dtype, metadata."""
  return _rebuild(storage.view(rest[2]), offset, size, stride)


def _encode(text: str, encoding: str = "utf-8") -> bytes:
  """`_codecs.encode` for what pickles of protocol 2 use it for: bytes."""
  return text.encode("latin1" if encoding in ("latin1", "latin-1") else "utf-8")


def _default_dict(*_: Any) -> dict:
  return {}


_KNOWN: dict[str, Any] = {
  "collections.OrderedDict": collections.OrderedDict,
  "collections.defaultdict": _default_dict,
  "argparse.Namespace": argparse.Namespace,
  "types.SimpleNamespace": argparse.Namespace,
  "torch._utils._rebuild_tensor": _rebuild,
  "torch._utils._rebuild_tensor_v2": _rebuild,
  "torch._utils._rebuild_tensor_v3": _rebuild_typed,
  "torch._utils._rebuild_parameter": lambda data, *_: data,
  "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
  "torch.Size": lambda sizes=(): tuple(sizes),
  "torch.device": lambda *name: ":".join(map(str, name)),
  "_codecs.encode": _encode,
  "numpy.dtype": np.dtype,
  "numpy.ndarray": np.ndarray,
  **{f"numpy.{core}.multiarray._reconstruct": np._core.multiarray._reconstruct for core in ("core", "_core")},
  **{f"numpy.{core}.multiarray.scalar": np._core.multiarray.scalar for core in ("core", "_core")},
}


def read_torch(path: str | pathlib.Path) -> Any:
  """The object of a `.pth`, `.pt`, `.torch` or `.pth.tar` file, with numpy arrays for tensors; a bare pickle is read too.

  bfloat16 and float8 are those of ml_dtypes. Arrays are read-only views of the file.

  Raises:
    UserError: another or a damaged format, or a pickle that would call a function.
  """
  path = pathlib.Path(path)
  try:
    raw = np.memmap(path, np.uint8, "r")
    if zipfile.is_zipfile(path):
      return _read_zip(path, raw)
    if bytes(raw[:4]) == b"PK\x03\x04":
      raise ValueError("it begins as a zip archive and is cut off")
    if bytes(raw[257:262]) == b"ustar":
      raise UserError(
        f"{path}: a tar container of torch before 0.2, which is not read; with torch, write it again by"
        " torch.save(torch.load(FILE), NEW)."
      )
    return _read_stream(path, raw)
  except (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    struct.error,
    zipfile.BadZipFile,
  ) as e:
    if isinstance(e, UserError):
      raise
    raise UserError(f"{path}: damaged, or not a torch file ({str(e) or type(e).__name__}).") from None


def _read_zip(path: pathlib.Path, raw: np.ndarray) -> Any:
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: info for info in archive.infolist()}
    root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if root is None or f"{root}constants.pkl" in members:
      kind = "a TorchScript program" if root is not None else "a zip archive without data.pkl"
      raise UserError(f"{path}: {kind}, not a file of torch.save; save its state_dict() instead.")
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
    if order.strip() != b"little":
      raise UserError(f"{path}: written on a machine with the byte order {order.decode()!r}, which is not read.")

    def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
      info = members[f"{root}data/{key}"]
      if info.compress_type != zipfile.ZIP_STORED:
        return np.frombuffer(archive.read(info), dtype)
      at = info.header_offset
      names = struct.unpack("<HH", raw[at + 26 : at + 30].tobytes())  # lengths of the name and of the extra field
      start = at + 30 + sum(names)
      return raw[start : start + info.file_size].view(dtype)[: count if dtype.itemsize > 1 else None]

    return _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), where=str(path), storage=storage).load()


def _read_stream(path: pathlib.Path, raw: np.ndarray) -> Any:
  """Twice: for the types of the storages, whose list follows the object, and for the object."""
  types: dict[str, np.dtype] = {}

  def note(dtype: np.dtype, key: str, count: int) -> np.ndarray:
    types[key] = dtype
    return np.broadcast_to(np.zeros((), dtype), (count,))

  with open(path, "rb") as stream:
    load = lambda storage: _Unpickler(stream, where=str(path), storage=storage).load()
    first = load(note)
    if first != _MAGIC:
      return first  # a bare pickle
    if (protocol := load(note)) != _PROTOCOL:
      raise UserError(f"{path}: torch's stream protocol {protocol}, expected {_PROTOCOL}.")
    load(note)  # about the machine
    start = stream.tell()
    load(note)
    keys = load(note)
    data, at = {}, stream.tell()
    for key in map(str, keys):
      count = int(raw[at : at + 8].view("<i8")[0])
      length = count * types[key].itemsize
      if at + 8 + length > raw.size:
        raise ValueError("it ends within a tensor")
      data[key] = np.frombuffer(raw, types[key], count, at + 8) if count else np.zeros(0, types[key])
      at += 8 + length
    stream.seek(start)
    return load(lambda dtype, key, count: data[key])
