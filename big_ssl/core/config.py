"""From a config file and command-line overrides to typed, frozen dataclasses.

An unknown key, a wrong type or an impossible combination is a `UserError` that names the config path, the value,
what is accepted and the nearest key.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import pathlib
import pkgutil
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from big_ssl.core.bounds import check_least, check_longer_than_nothing, check_pattern
from big_ssl.core.data_config import DataConfig
from big_ssl.core.health import HealthConfig
from big_ssl.core.optim_config import OptimConfig
from big_ssl.core.report_config import ReportConfig
from big_ssl.core.types import Interval, UserError, nearest

# Of attention and MLP: by heads and hidden channels on the way in, and on the way out, so that a block has one reduction
# over "tensor" per pair (arXiv 1909.08053, section 3).
TRANSFORMER_RULES = (
  (r"attention/(query|key|value)/(kernel|bias)$", -2),  # [D, heads, d] and [heads, d]
  (r"attention/out/kernel$", -3),  # [heads, d, D]
  (r"(block_\d+|map_head)/mlp/(fc1|gate|value)/(kernel|bias)$", -1),
  (r"(block_\d+|map_head)/mlp/(fc2|out)/kernel$", -2),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices per axis; -1 takes what is left. `tensor_rules` maps path patterns to the dimension split over "tensor"."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  fsdp_min_size: int = 65536
  tensor_rules: tuple[tuple[str, int], ...] = TRANSFORMER_RULES

  def __post_init__(self):
    for pattern, _ in self.tensor_rules:
      check_pattern("config.mesh.tensor_rules", pattern)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When to save and what to keep: the last `keep_last`, and for good one every `keep_every`.

  `features_gib` is the most that --mode=eval and the suite keep in <workdir>/features, of the last checkpoint that they
  read, so that its images are not seen again; 0 keeps none.
  """

  every: Interval = Interval(10, "epochs")
  keep_last: int = 2
  keep_every: Interval | None = None
  features_gib: float = 16.0

  def __post_init__(self):
    check_longer_than_nothing("config.checkpoint.every", self.every)
    check_longer_than_nothing("config.checkpoint.keep_every", self.keep_every)
    check_least("config.checkpoint", values=self, keep_last=1, features_gib=0)

  def keep_period(self, *, batch_size: int, examples: int) -> int | None:
    """Steps from one checkpoint that is kept for good to the next: whole periods of saving, at least one.

    Both lengths rounded by themselves, as epochs of 1,251.1 steps would be, would have no multiple in common.
    """
    if self.keep_every is None:
      return None
    sizes = {"batch_size": batch_size, "examples": examples}
    saves = self.keep_every.updates(**sizes) / max(self.every.updates(**sizes), 1.0)
    return max(1, round(saves)) * self.every.steps(**sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
  """An earlier run whose weights and batch statistics a fresh run starts from; a resumed run has its own.

  Attributes:
    path: its work directory.
    step: of the checkpoint; the newest where None.
    tree: which of its networks becomes the one that is trained.
    skip: regular expression on paths of the new state that stay as initialized, such as "head/fc2"; "" is none. Outside
      of the backbone, what has no counterpart of the same shape stays so in any case.
    freeze_backbone: until then only what is not the backbone learns, so that a fresh head does not spoil the weights;
      its batch statistics, as far as the method moves any, go on.
  """

  path: str
  step: int | None = None
  tree: Literal["student", "teacher"] = "student"
  skip: str = ""
  freeze_backbone: Interval | None = None

  def __post_init__(self):
    check_pattern("config.init_from.skip", self.skip)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One run. `method`, `model` and each entry of `evals` stay mappings until their classes are found by name."""

  seed: int = 0
  batch_size: int = 256
  total: Interval = Interval(100, "epochs")
  log_every: Interval = Interval(50, "steps")
  method: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  evals: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  health: HealthConfig = HealthConfig()
  report: ReportConfig = ReportConfig()
  init_from: InitFrom | None = None

  def __post_init__(self):
    check_least("config", values=self, batch_size=1)
    if not 0 <= self.seed < 2**63:
      raise UserError(f"config.seed={self.seed}: expected 0 or more, and below 2**63.")
    check_longer_than_nothing("config.log_every", self.log_every)
    for name, fields in self.evals.items():
      if isinstance(fields, Mapping) and fields.get("every") is not None:
        path = f"config.evals.{name}.every"
        check_longer_than_nothing(path, Interval.parse(fields["every"], path=path))


def load(spec: str, overrides: Mapping[str, str] | None = None) -> tuple[Config, dict]:
  """Reads "configs/msn.py" or "configs/msn.py:argument" and applies overrides such as {"optim.lr": "3e-4"}.

  Returns the typed config and the plain nested dict it was built from, which is what `config.json` records.
  """
  return _overridden(_run_file(spec), overrides)


def read(workdir: pathlib.Path, overrides: Mapping[str, str] | None = None) -> tuple[Config, dict]:
  """As `load`, from the config.json that a run left in its work directory.

  Raises:
    UserError: there is none, or it cannot be read.
  """
  file = workdir / "config.json"
  try:
    tree = _plain(json.loads(file.read_text()))
  except FileNotFoundError:
    raise UserError(f"--workdir={workdir}: no config.json in it; expected the work directory of a run.") from None
  except (OSError, ValueError) as error:
    raise UserError(f"{file}: cannot be read: {error}") from None
  return _overridden(tree, overrides)


def _overridden(tree: dict, overrides: Mapping[str, str] | None) -> tuple[Config, dict]:
  for path, text in (overrides or {}).items():
    keys = path.split(".")
    value = _literal(text)
    if _holds_text(keys) and not isinstance(value, str):
      value = text  # a folder or a file may be called 2012 or none
    _set(tree, keys, value, path)
  return build(Config, tree, path="config"), tree


def _run_file(spec: str) -> dict:
  name, _, argument = spec.partition(":")
  file = pathlib.Path(name)
  if file.suffix == ".json" and file.is_file() and not argument:
    return _of_run(file)
  if file.is_file() and file.suffix != ".py":
    raise UserError(f"--config={spec}: expected a Python file, or the config.json of a run.")
  if not file.is_file():
    near = nearest(str(file), [str(p) for p in sorted(file.parent.glob("*.py"))] if file.parent.is_dir() else [])
    raise UserError(f"--config={spec}: no such file '{name}'.{near}")
  module_spec = importlib.util.spec_from_file_location("big_ssl_config", file)
  module = importlib.util.module_from_spec(module_spec)
  beside = str(file.resolve().parent.parent)  # so that configs/x.py can say "from configs import common" from anywhere
  sys.path.insert(0, beside)
  try:
    module_spec.loader.exec_module(module)
  except (SyntaxError, ImportError, NameError) as error:
    raise UserError(f"--config={spec}: the file cannot be read: {error}") from error
  finally:
    sys.path.remove(beside)
  if not callable(getattr(module, "get_config", None)):
    raise UserError(f"--config={spec}: the file has no function get_config().")
  takes_argument = bool(inspect.signature(module.get_config).parameters)
  if argument and not takes_argument:
    raise UserError(f"--config={spec}: this config takes no argument, found ':{argument}'.")
  config = module.get_config(argument) if argument else module.get_config()
  return _plain(config)


def _of_run(file: pathlib.Path) -> dict:
  """The config.json that a run keeps, all its overrides in it."""
  try:
    config = json.loads(file.read_text())
  except ValueError as error:
    raise UserError(f"--config={file}: not readable as JSON ({error}).") from None
  if not isinstance(config, dict):
    raise UserError(f"--config={file}: expected the config.json of a run, an object of keys and values.")
  return _plain(config)


def _plain(value: Any) -> Any:
  """ConfigDicts and mappings to dicts, sequences to tuples, all the way down."""
  if hasattr(value, "to_dict"):
    value = value.to_dict()
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  return tuple(_plain(v) for v in value) if isinstance(value, (list, tuple)) else value


def _literal(text: str) -> Any:
  """A Python or JSON value; anything else is text."""
  for read in (ast.literal_eval, json.loads):
    try:
      return _plain(read(text))
    except (ValueError, SyntaxError):
      pass
  return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _holds_text(keys: list[str]) -> bool:
  """Whether a path of `Config` is annotated as `str`."""
  hint: Any = Config
  for key in keys:
    options = [h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)]
    hint = typing.get_type_hints(options[0]).get(key) if options else None
  return hint is str


def _set(tree: dict, keys: list[str], value: Any, path: str) -> None:
  for key in keys[:-1]:
    child = tree.setdefault(key, {})
    if not isinstance(child, dict):
      raise UserError(f"--config.{path}: '{key}' holds the value {child!r}, not further keys.")
    tree = child
  tree[keys[-1]] = value


def build(cls: type, tree: Mapping[str, Any], *, path: str, **fixed: Any) -> Any:
  """Makes the dataclass `cls` from a mapping, checking every key and type; `fixed` fields are not the user's to set."""
  if not isinstance(tree, Mapping):
    raise UserError(f"{path}={tree!r}: expected keys and values ({', '.join(f.name for f in dataclasses.fields(cls))}).")
  hints = typing.get_type_hints(cls)
  names = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in fixed and f.name not in ("parent", "name")]
  if cls.__module__.endswith("core.types") or "name" in _own_fields(cls):
    names.append("name")
  values = {}
  for key, value in tree.items():
    if key not in names:
      raise UserError(f"{path}.{key}={value!r}: unknown key.{nearest(key, names)} Accepted: {', '.join(sorted(set(names)))}.")
    values[key] = coerce(hints[key], value, path=f"{path}.{key}")
  try:
    return cls(**values, **fixed)
  except UserError as error:
    message = str(error)
    raise UserError(message if message.startswith(path) else f"{path}: {message}") from None


def _own_fields(cls: type) -> set[str]:
  """Fields written in the class itself; linen adds `parent` and `name`, which are not the user's."""
  return set(cls.__annotations__) & {f.name for f in dataclasses.fields(cls)}


def coerce(hint: Any, value: Any, *, path: str) -> Any:
  """Returns `value` as the annotated type, or raises `UserError` naming path, value and what is accepted."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any or (dataclasses.is_dataclass(hint) and isinstance(value, hint)):
    return value
  if hint is Interval:
    return Interval.parse(value, path=path)
  if dataclasses.is_dataclass(hint):
    return build(hint, value, path=path)
  if origin in (typing.Union, types.UnionType):
    return _coerce_union(args, value, path)
  if origin is Literal:
    if value not in args:
      raise UserError(f"{path}={value!r}: expected one of {', '.join(map(repr, args))}.{nearest(value, map(str, args))}")
    return value
  if origin is tuple and isinstance(value, (list, tuple)):
    inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
    if len(inner) != len(value):
      raise UserError(f"{path}={value!r}: expected {len(inner)} values.")
    return tuple(coerce(h, v, path=f"{path}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
  if (origin or hint) in (Mapping, dict) or origin is not None and issubclass(origin, Mapping):
    if isinstance(value, Mapping):
      return dict(value)
  elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value)
  elif hint is int and isinstance(value, float) and value.is_integer():
    return int(value)
  elif hint in (int, str, bool) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
    return value
  expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
  raise UserError(f"{path}={value!r}: expected {expected}, found {type(value).__name__}.")


def _coerce_union(options: tuple, value: Any, path: str) -> Any:
  if value is None and type(None) in options:
    return None
  errors = []
  for option in options:
    if option is not type(None):
      try:
        return coerce(option, value, path=path)
      except UserError as error:
        errors.append(str(error))
  raise UserError(errors[0])


def find(kind: str, name: str, base: type, *, path: str) -> type:
  """The one public subclass of `base` in `big_ssl/<kind>/<name>.py`, or in the module of a dotted path.

  Raises:
    UserError: no such file (names the nearest), or not exactly one subclass in it.
  """
  if not isinstance(name, str) or not name:
    raise UserError(f"{path}={name!r}: expected a name. Accepted: {', '.join(available(kind, base))}.")
  module_name = name if "." in name else f"big_ssl.{kind}.{name}"
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    if error.name and not module_name.startswith(error.name):
      raise
    names = available(kind, base)
    raise UserError(f"{path}={name!r}: not found.{nearest(name, names)} Accepted: {', '.join(names)}, or a dotted path to your own module.") from None
  found = _subclasses(module, base)
  if len(found) != 1:
    raise UserError(f"{path}={name!r}: the module holds {len(found)} {base.__name__} classes, expected exactly one.")
  return found[0]


def _subclasses(module: types.ModuleType, base: type) -> list[type]:
  members = (m for n, m in inspect.getmembers(module, inspect.isclass) if not n.startswith("_"))
  return [m for m in members if issubclass(m, base) and m is not base and m.__module__ == module.__name__]


def available(kind: str, base: type) -> list[str]:
  """Names of the files in `big_ssl/<kind>` that define a `base`."""
  package = importlib.import_module(f"big_ssl.{kind}")
  names = [m.name for m in pkgutil.iter_modules(package.__path__)]
  return sorted(n for n in names if len(_subclasses(importlib.import_module(f"big_ssl.{kind}.{n}"), base)) == 1)


def build_named(kind: str, tree: Mapping[str, Any], base: type, *, path: str, **fixed: Any) -> Any:
  """Finds the class that `tree["name"]` names and builds it from the other keys."""
  fields = dict(tree)
  cls = find(kind, fields.pop("name", ""), base, path=f"{path}.name")
  return build(cls, fields, path=path, **fixed)
