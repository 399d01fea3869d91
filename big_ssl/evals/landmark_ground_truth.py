"""The ground truth of revisited Oxford and Paris (arXiv 1803.11285): gnd_<name>.pkl, or .json with the same keys."""

from __future__ import annotations

import codecs
import dataclasses
import json
import pathlib
import pickle
from typing import Any

import numpy as np

from big_ssl.core.types import UserError

KINDS = ("easy", "hard", "junk")


@dataclasses.dataclass(frozen=True)
class GroundTruth:
  """Q queries against N images.

  Attributes:
    name: such as "roxford5k".
    images, queries: names without an extension, [N] and [Q].
    boxes: [Q, 4] x0, y0, x1, y1 in pixels of the query image; NaN without one.
    easy, hard, junk: [Q, N] bool.
  """

  name: str
  images: tuple[str, ...]
  queries: tuple[str, ...]
  boxes: np.ndarray
  easy: np.ndarray
  hard: np.ndarray
  junk: np.ndarray


def read(folder: str, *, field: str) -> GroundTruth:
  """Reads the one gnd_*.pkl or gnd_*.json of a folder; of both of a name, the .json.

  A pickle can hold any program: only lists, dicts, text, numbers and numeric numpy arrays are built from it, and anything
  else in it is refused before it runs.

  Args:
    folder: that holds the file, and jpg/.
    field: config path that names the folder, for errors.

  Raises:
    UserError: no such file or several, or what in it is not as expected.
  """
  found: dict[str, pathlib.Path] = {}
  for pattern in ("gnd_*.pkl", "gnd_*.json"):
    found |= {p.stem: p for p in sorted(pathlib.Path(folder).expanduser().glob(pattern))}
  if len(found) != 1:
    names = ", ".join(p.name for p in found.values()) or "none"
    raise UserError(f"{field}={folder}: expected one gnd_<name>.pkl or gnd_<name>.json, found {names}.")
  (file,) = found.values()
  try:
    if file.suffix == ".json":
      tree = json.loads(file.read_text())
    else:
      with open(file, "rb") as f:
        tree = _Plain(f, encoding="latin1").load()
  except Exception as error:  # of a damaged pickle nearly any
    raise UserError(f"{file}: not readable as a ground truth: {error}") from None
  return _checked(tree, name=file.stem[len("gnd_") :], file=file)


class _Plain(pickle.Unpickler):
  """Builds plain values and numeric arrays; Python 2 and all protocols write arrays by these few names."""

  def find_class(self, module: str, name: str) -> Any:
    module = module.replace("numpy._core", "numpy.core")
    allowed = {
      ("numpy", "ndarray"): _ARRAY,
      ("numpy", "dtype"): _dtype,
      ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
      ("numpy.core.multiarray", "scalar"): _scalar,
      ("numpy.core.numeric", "_frombuffer"): _from_buffer,
      ("_codecs", "encode"): _encode,
    }
    if (module, name) not in allowed:
      raise pickle.UnpicklingError(f"it would load {module}.{name}; only plain values and numeric arrays are accepted")
    return allowed[module, name]


_ARRAY = "numpy.ndarray"  # stands for the class, which is only ever named as what to reconstruct


class _Array:
  """Takes the state of an array as numpy writes it: version, shape, dtype, whether in Fortran order, bytes."""

  def __setstate__(self, state: tuple) -> None:
    _, shape, dtype, fortran, data = state
    data = data.encode("latin1") if isinstance(data, str) else data
    self.value = np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if fortran else "C")


class _DType:
  """A numeric dtype, whose state is its byte order."""

  def __init__(self, kind: str):
    self.kind, self.order = kind, "="

  def __setstate__(self, state: tuple) -> None:
    self.order = state[1]

  def numpy(self) -> np.dtype:
    return np.dtype(self.kind).newbyteorder(self.order if self.order in ("<", ">") else "=")


def _dtype(kind: str, *flags: Any) -> _DType:
  del flags  # align and copy
  if np.dtype(kind).kind not in "iufb":
    raise pickle.UnpicklingError(f"an array of {kind!r}; only numbers are accepted")
  return _DType(kind)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
  del shape, code
  if kind is not _ARRAY:
    raise pickle.UnpicklingError(f"an array of the class {kind!r}")
  return _Array()


def _scalar(dtype: _DType, data: Any) -> Any:
  return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.numpy())[0]


def _from_buffer(data: Any, dtype: _DType, shape: tuple, order: str) -> np.ndarray:
  return np.frombuffer(data, dtype.numpy()).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
  if codecs.lookup(encoding).name != "iso8859-1":
    raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
  return text.encode("latin1")


# Checks


def _checked(tree: Any, *, name: str, file: pathlib.Path) -> GroundTruth:
  """Raises `UserError` naming the file, and the query."""
  if not isinstance(tree, dict) or not {"imlist", "qimlist", "gnd"} <= set(tree):
    keys = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
    raise UserError(f"{file}: expected the keys imlist, qimlist and gnd, found {keys}.")
  images, queries = (_names(tree[key], file=file, key=key) for key in ("imlist", "qimlist"))
  if not isinstance(tree["gnd"], (list, tuple)) or len(tree["gnd"]) != len(queries):
    raise UserError(f"{file}: gnd must have an entry for each of the {len(queries)} queries.")
  boxes, sets = [], {kind: np.zeros((len(queries), len(images)), bool) for kind in KINDS}
  for q, entry in enumerate(tree["gnd"]):
    where = f"{file}: gnd of query {queries[q]}"
    if not isinstance(entry, dict):
      raise UserError(f"{where}: expected the keys easy, hard, junk and bbx, found {type(entry).__name__}.")
    for kind in KINDS:
      if kind not in entry:
        raise UserError(f"{where}: has no '{kind}'; it has {', '.join(map(str, entry))}.")
      sets[kind][q, _indices(entry[kind], count=len(images), where=f"{where}: {kind}")] = True
    boxes.append(_box(entry.get("bbx"), where=where))
  if not (sets["easy"] | sets["hard"]).any():
    raise UserError(f"{file}: no query has an easy or hard image to find.")
  return GroundTruth(name, images, queries, np.array(boxes), **sets)


def _names(value: Any, *, file: pathlib.Path, key: str) -> tuple[str, ...]:
  if not isinstance(value, (list, tuple)) or not value or not all(isinstance(x, str) for x in value):
    raise UserError(f"{file}: {key} must be a list of names of images.")
  names = tuple(x.removesuffix(".jpg") for x in value)
  if key == "imlist" and len(set(names)) < len(names):
    raise UserError(f"{file}: imlist names an image twice: {next(n for n in names if names.count(n) > 1)}.")
  return names


def _plain(value: Any) -> np.ndarray:
  return value.value if isinstance(value, _Array) else np.asarray(value)


def _indices(value: Any, *, count: int, where: str) -> np.ndarray:
  try:
    found = _plain(value)
    indices = found.astype(np.int64).reshape(-1)
    ok = bool(np.all(indices == found.reshape(-1))) and (not len(indices) or (indices.min() >= 0 and indices.max() < count))
  except (ValueError, TypeError, AttributeError):
    ok = False
  if not ok:
    raise UserError(f"{where}: expected numbers of images, from 0 to {count - 1}.")
  return indices


def _box(value: Any, *, where: str) -> np.ndarray:
  if value is None:
    return np.full(4, np.nan)
  try:
    box = np.array([float(_plain(v)) for v in (value.value if isinstance(value, _Array) else value)])
  except (ValueError, TypeError, AttributeError):
    box = np.zeros(0)
  if box.shape != (4,) or not np.all(np.isfinite(box)) or box[2] <= box[0] or box[3] <= box[1]:
    raise UserError(f"{where}: bbx must be x0, y0, x1, y1 in pixels.")
  return box
