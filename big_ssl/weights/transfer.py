"""Between files, directories and runs: which part of a file is read, and checkpoints as weights and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl import __version__
from big_ssl.core import config as config_lib
from big_ssl.core.checkpoint import Checkpointer
from big_ssl.core.method import Method
from big_ssl.core.types import TrainState, UserError
from big_ssl.models.layers import Backbone
from big_ssl.weights.containers import File, Tensors, read_file, write_safetensors
from big_ssl.weights.describe import Fields
from big_ssl.weights.keymap import Weights
from big_ssl.weights.names import flatten

# Parts of a file that hold a network, the one that is evaluated before the one that is trained.
PLACES = (
  *("classy_state_dict/base_model/model", "teacher", "target_encoder", "encoder", "student", "state_dict"),
  *("model_state_dict", "ema_params", "opt/target", "params", "model"),
)
_BESIDE = {"center": "dino_loss/center"}  # state of a method <-> its place in a file, [1, K] there
CARD, KEPT = "model.json", "kept.safetensors"
NO_NORMALIZATION = "none"  # in a card, for networks that read pixels in [0, 1]
_EVALUATED = {"dino": "teacher", "msn": "teacher", "loca": "teacher"}  # what their `features` read
_STATE = {  # where the trees of a run lie, by owner
  "student": (("params/encoder/", "params/"), ("params/", "params/")),
  "teacher": (("extra/teacher/encoder/", "params/"), ("extra/teacher/", "params/")),
}
_STATISTICS = {
  "student": (("extra/batch_stats/encoder/", "batch_stats/"), ("extra/batch_stats/", "batch_stats/")),
  "teacher": (("extra/teacher_batch_stats/encoder/", "batch_stats/"), ("extra/teacher_batch_stats/", "batch_stats/")),
}


def backbone(fields: Fields) -> Backbone:
  """The backbone of `config.model`."""
  return config_lib.build_named("models", dict(fields), Backbone, path="config.model")


def expected(fields: Fields) -> dict[str, tuple[int, ...]]:
  """{our name: shape} of the backbone of `config.model`, without computing anything."""
  model = backbone(fields)
  size = getattr(model, "image_size", 64)
  height, width = (size, size) if isinstance(size, int) else size
  images = jax.ShapeDtypeStruct((1, height, width, model.channels), jnp.float32)
  trees = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  return {f"{kind}/backbone/{path}": leaf.shape for kind, tree in trees.items() for path, leaf in flatten(tree).items()}


@dataclasses.dataclass(frozen=True)
class Part:
  """One network of a file.

  Attributes:
    subtree: its place, "" for the whole file.
    tensors: without that place in front of their names.
    others: {place: number of tensors} of the rest of the file, which is not read.
    state: {name: array} of the method's state that lies beside the networks: DINO's "center" [K].
  """

  subtree: str
  tensors: Tensors
  others: dict[str, int]
  state: dict[str, np.ndarray]

  @property
  def hints(self) -> tuple[str, ...]:
    return (self.subtree, self.subtree.split("/")[0])


def choose(file: File, subtree: str | None) -> Part:
  """The part of a file that is asked for, or the first of `PLACES` that it has; a file without places is one part.

  Raises:
    UserError: a shard, or no tensor lies there; lists the places that have some.
  """
  names = list(file.tensors)
  if file.others.get("type") in ("shard", "shard_list"):
    raise UserError(
      f"{file.path}: one shard of a VISSL checkpoint; join all of them with VISSL's"
      " extra_scripts/convert_sharded_checkpoint.py -i FILE -o NEW -t consolidated."
    )
  if not names:
    raise UserError(f"{file.path}: holds no tensors; of a model that was pickled whole, save the state_dict().")
  tops = {name.split("/")[0] for name in names if "/" in name}
  if subtree is None:
    subtree = next((place for place in PLACES if any(name.startswith(f"{place}/") for name in names)), "")
  joint = "" if not subtree else "/" if any(name.startswith(f"{subtree}/") for name in names) else "."
  front = f"{subtree}{joint}"
  renames = {name: name.removeprefix(front) for name in names if name.startswith(front)}
  if not renames:
    raise UserError(
      f"--subtree={subtree}: {file.path} has no tensors there; it has {', '.join(sorted(tops)) or 'no parts'}."
    )
  if subtree in ("target_encoder", "encoder") and "prototypes" in names:
    renames["prototypes"] = "prototypes"  # MSN's lie beside its encoders
  beside = {ours: name for ours, name in _BESIDE.items() if subtree in ("teacher", "student") and name in names}
  others: dict[str, int] = {}
  for name in names:
    if name not in renames and name not in beside.values():
      top = name.split("/")[0]
      others[top] = others.get(top, 0) + 1
  state = {ours: np.asarray(file.tensors[name]).reshape(-1) for ours, name in beside.items()}
  return Part(subtree, file.tensors.renamed(renames), others, state)


def write_directory(
  directory: str | pathlib.Path,
  weights: Weights,
  *,
  card: Mapping[str, Any],
  teacher: Weights | None = None,
  state: Mapping[str, np.ndarray] | None = None,
) -> None:
  """A directory that `config.init_from.path` accepts: a checkpoint of step 0, what is kept, and the model card.

  Args:
    teacher: a second network, of the averaged weights.
    state: of the method, beside the weights, by its name in `TrainState.extra`.

  Raises:
    UserError: it holds checkpoints already.
  """
  directory = pathlib.Path(directory)
  if (directory / "checkpoints").exists():
    raise UserError(f"--to={directory}: holds checkpoints already; give another directory.")
  extra: dict[str, Any] = {"batch_stats": _float32(weights.batch_stats)} | _float32(dict(state or {}))
  if teacher is not None:
    extra |= {"teacher": _float32(teacher.params), "teacher_batch_stats": _float32(teacher.batch_stats)}
  saved = TrainState(step=np.int32(0), params=_float32(weights.params), opt_state={}, extra=extra)
  checkpointer = Checkpointer(directory)
  checkpointer.save(saved, meta={"version": __version__, "imported": True})
  checkpointer.wait()
  checkpointer.close()
  if weights.kept:
    write_safetensors(directory / KEPT, weights.kept, metadata={})
  (directory / CARD).write_text(json.dumps(card, indent=2) + "\n")


def dtypes(weights: Weights) -> dict[str, str]:
  """{our name: dtype} of the leaves that a file has in another format than float32."""
  return {path: str(value.dtype) for path, value in weights.flat().items() if value.dtype != np.float32}


@dataclasses.dataclass(frozen=True)
class Saved:
  """Weights of a run or of an imported directory.

  Attributes:
    weights: in the formats of the file that they came from, float32 of a run.
    card: of the imported directory; of a run, what its config says.
    tree: "student" or "teacher".
  """

  weights: Weights
  card: dict[str, Any]
  tree: str


def read_directory(directory: str | pathlib.Path, *, tree: str | None = None, step: int | None = None) -> Saved:
  """Weights of a run's work directory or of an imported directory.

  Args:
    tree: "student" or "teacher"; None is what the run's method evaluates.
    step: of the checkpoint, the newest where None.

  Raises:
    UserError: no such directory, no checkpoint, or no teacher in it.
  """
  directory = pathlib.Path(directory)
  if not (directory / "checkpoints").is_dir():
    raise UserError(f"{directory}: neither a run's work directory nor an imported one; it has no checkpoints/.")
  card = card_of(directory)
  tree = tree or _EVALUATED.get(card.get("method", ""), "student")
  checkpointer = Checkpointer(directory)
  saved = checkpointer.read(step)
  checkpointer.close()
  found = {path: value for kind in (_STATE, _STATISTICS) for path, value in _renamed(saved, kind[tree]).items()}
  if not any(path.startswith("params/") for path in found):
    raise UserError(f"--tree={tree}: the checkpoint in {directory} has none.")
  if "layout" not in card and "channels" not in card["model"]:  # a run has those of its images, and its config none
    card["model"] = card["model"] | image_channels(card["model"], found)
  for path, name in card.get("dtypes", {}).items():
    if path in found:
      found[path] = found[path].astype(jnp.dtype(name))
  kept = None
  if "layout" in card and tree == "student":
    file = directory / KEPT
    kept = dict(read_file(file).tensors) if file.is_file() else {}
  return Saved(Weights.of(found, kept), card, tree)


def card_of(directory: pathlib.Path) -> dict[str, Any]:
  """The model card, or the same fields of a run's config."""
  for name in (CARD, "config.json"):
    file = directory / name
    if file.is_file():
      try:
        content = json.loads(file.read_text())
      except ValueError as error:
        raise UserError(f"{file}: not readable as JSON ({error}).") from None
      if name == CARD:
        return content
      method = content.get("method", {})
      return {"model": content.get("model", {}), "method": method.get("name", "")} | _normalization(method)
  raise UserError(f"{directory}: has neither {CARD} nor config.json, which name the model.")


def _normalization(method: Mapping[str, Any]) -> dict[str, Any]:
  """"mean" and "std" of a run's `config.method`, as given or by default; {} of a method without them."""
  cls = config_lib.find("methods", method.get("name", ""), Method, path="config.method.name")
  defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.name in ("mean", "std")}
  return {name: tuple(method.get(name, default)) or NO_NORMALIZATION for name, default in defaults.items()}


def image_channels(fields: Fields, found: Mapping[str, np.ndarray]) -> Fields:
  """{"channels": number} that the tensors of a backbone have; {} where their shapes do not tell, or are the default's."""
  if not hasattr(backbone(fields), "channels") or _fits(expected(fields), found):
    return {}
  one, two = expected({**fields, "channels": 1}), expected({**fields, "channels": 2})
  for path, shape in two.items():
    for axis, (more, fewer) in enumerate(zip(shape, one[path], strict=True)):
      if more != fewer and path in found:
        return {"channels": (found[path].shape[axis] - fewer) // (more - fewer) + 1}
  return {}


def _fits(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, np.ndarray]) -> bool:
  return all(found[path].shape == shape for path, shape in shapes.items() if path in found)


def _renamed(saved: Mapping[str, np.ndarray], places: tuple[tuple[str, str], ...]) -> dict[str, np.ndarray]:
  out = {}
  for path, value in saved.items():
    for place, kind in places:
      if path.startswith(place):
        out[kind + path.removeprefix(place)] = value
        break
  return out


def _float32(tree: Any) -> Any:
  return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
