"""What a layout of weights is: how a file of it is recognized, what model it implies, and its rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.models import vit as vit_lib
from big_ssl.weights.describe import Fields, Shapes
from big_ssl.weights.keymap import Keep, KeyMap, Rule, Weights

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNIT = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # values from -1 to 1
Rules = tuple[Rule | Keep, ...]


def prefixes(*texts: str, renames: Mapping[str, str] | None = None) -> Callable[[str], str]:
  """Removes each prefix once, in this order, where it is there; then replaces the prefixes of `renames`."""

  def clean(name: str) -> str:
    for text in texts:
      name = name.removeprefix(text)
    for old, new in (renames or {}).items():
      name = new + name.removeprefix(old) if name.startswith(old) else name
    return name

  return clean


DDP = ("module.", "_orig_mod.")
WRAPPED = prefixes(  # DINO's; its first files call the head otherwise
  *DDP, "backbone.", renames={"projection_head.mlp": "head.mlp", "projection_head.last_layer": "head.last_layer"}
)
HF_NAMES = prefixes("vit.", "dinov2.", "dinov2_with_registers.", "regnet.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The names of one publisher for one architecture.

  Attributes:
    name: as in `--layout`.
    title: for messages.
    format: what `--format` calls it: official, timm, hf, torchvision or bigvision.
    model: `config.model.name`.
    marks: names that such a file has, after `clean`, all of them.
    lacks: names that it has not.
    shaped: what the shapes of such a file are beside, where names alone do not tell.
    hints: places in a file, or kinds of file, that speak for it where names alone leave a choice: "target_encoder",
      "safetensors".
    clean: a name of a file without what wrappers put around it.
    fields: `config.model` from the shapes of the cleaned names and what the user gives.
    fixed: fields that the publisher's code fixes, such as the rule for positions.
    rules: from the fields of `config.model`, and names of either side for what else files of the layout differ in.
    normalization: mean and std of the images; None where the publisher has several.
  """

  name: str
  title: str
  format: str
  model: str
  marks: tuple[str, ...]
  fields: Callable[[Shapes, Fields], Fields]
  rules: Callable[[Fields, Collection[str]], Rules]
  lacks: tuple[str, ...] = ()
  shaped: Callable[[Shapes], bool] = lambda shapes: True
  hints: tuple[str, ...] = ()
  clean: Callable[[str], str] = lambda name: name
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = IMAGENET

  def keymap(self, fields: Fields, names: Collection[str]) -> KeyMap:
    return KeyMap(self.title, self.rules(fields, names))


@dataclasses.dataclass(frozen=True)
class Imported:
  """Weights of a file with what is known about them.

  Attributes:
    weights: our trees.
    layout: of the file.
    model: fields of `config.model` that these weights are for.
    names: {cleaned name: name in the file}.
    kept: {name: reason} of the tensors that no model reads.
    left: lines about what did not fit, of a partial import.
  """

  weights: Weights
  layout: Layout
  model: Fields
  names: dict[str, str]
  kept: dict[str, str]
  left: tuple[str, ...] = ()

  def tensors(self) -> dict[str, np.ndarray]:
    """The tensors under the names of the file: the inverse of `convert`."""
    dumped = self.layout.keymap(self.model, self.names).dump(self.weights)
    return {self.names[name]: value for name, value in dumped.items()}


def heads_of(fields: Fields) -> int:
  """Attention heads of a ViT."""
  size = vit_lib.SIZES.get(fields.get("variant", ""))
  return fields.get("heads") or (size.heads if size else 0)


def shapes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
  """Shapes, without reading what is not read yet."""
  shape = getattr(tensors, "shape", None)
  return {name: shape(name) if shape else tuple(np.shape(tensors[name])) for name in tensors}


def cleaned(layout: Layout, names: Collection[str]) -> dict[str, str]:
  """{cleaned name: name}; of two names that become one the later counts, so that a file with both is told as such."""
  out: dict[str, str] = {}
  for name in names:
    short = layout.clean(name)
    if short in out:
      raise UserError(f"weights: '{out[short]}' and '{name}' are the same tensor of a {layout.title}.")
    out[short] = name
  return out


def convert(
  tensors: Mapping[str, np.ndarray],
  *,
  layout: Layout,
  given: Fields | None = None,
  expected: Callable[[Fields], Mapping[str, tuple[int, ...]]] | None = None,
  hint: str = "",
  partial: bool = False,
) -> Imported:
  """Tensors of a file as our trees.

  Args:
    tensors: {name in the file: array}, of one network.
    layout: of the file.
    given: fields of `config.model` that the user states; they count more than what the file implies.
    expected: shapes of the model of some fields, by our names; None compares no shapes.
    hint: last sentence of a message about tensors that do not fit.
    partial: takes what fits, and lists the rest.

  Raises:
    UserError: tensors that are missing, unexpected or of another shape.
  """
  names, given = cleaned(layout, list(tensors)), given or {}
  all_shapes = shapes_of(tensors)
  shapes = {short: all_shapes[name] for short, name in names.items()}
  absent = [mark for mark in layout.marks if mark not in shapes]
  if absent:
    raise UserError(f"weights: not a {layout.title}; missing {len(absent)}: {', '.join(absent)}.{hint and ' ' + hint}")
  fields = _fields(layout, shapes, given) | dict(layout.fixed) | given
  keymap = layout.keymap(fields, names)
  short_tensors = _Renamed(tensors, names)
  reading = keymap.read(short_tensors, expect=None if expected is None else expected(fields))
  weights = reading.weights if partial else reading.whole(layout.title, hint=hint)
  kept = {name: keymap.kept_because(name) or "" for name in weights.kept or {}}
  return Imported(weights, layout, fields, names, kept, tuple(reading.lines()))


def _fields(layout: Layout, shapes: Shapes, given: Fields) -> Fields:
  """`layout.fields`; raises `UserError` for shapes with which it cannot be."""
  try:
    return layout.fields(shapes, given)
  except (ValueError, LookupError, ZeroDivisionError, StopIteration) as error:
    if isinstance(error, UserError):
      raise
    shown = ", ".join(f"{mark} {list(shapes[mark])}" for mark in layout.marks)
    raise UserError(f"weights: these are not the shapes of a {layout.title}: {shown}.") from None


class _Renamed(Mapping):
  """`tensors` under other names, read when asked for."""

  def __init__(self, tensors: Mapping[str, np.ndarray], names: dict[str, str]):
    self._tensors, self._names = tensors, names

  def __getitem__(self, name: str) -> np.ndarray:
    return self._tensors[self._names[name]]

  def __iter__(self):
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def detect(
  tensors: Mapping[str, np.ndarray], layouts: tuple[Layout, ...], *, hints: Collection[str] = (), inside: str = ""
) -> Layout:
  """The layout whose rules leave the fewest tensors over; hints and then the order of `layouts` decide between equals.

  Args:
    inside: the part of the file that the tensors are of, for the message.

  Raises:
    UserError: none has all of its marks there; names what the file holds and the nearest family.
  """
  shapes, best = shapes_of(tensors), []
  for order, layout in enumerate(layouts):
    short = {layout.clean(name): shape for name, shape in shapes.items()}
    named = all(mark in short for mark in layout.marks) and not any(name in short for name in layout.lacks)
    if named and layout.shaped(short):
      left = leftover(layout, short)
      best.append((left, -len(set(hints) & set(layout.hints)), order, layout))
  if best:
    return min(best, key=lambda entry: entry[:3])[3]
  if (below := wrapped(shapes, layouts)) is not None:
    place, layout = below
    whole = f"{inside}/{place}" if inside else place
    raise UserError(f"weights: of no family that is known, but below '{place}' lies a {layout.title}: --subtree={whole}.")
  shown = ", ".join(list(shapes)[:5])
  raise UserError(
    f"weights: of no family that is known. The {len(shapes)} tensors begin with: {shown}.{closest(shapes, layouts)}"
    " --subtree=NAME chooses a part of the file, --layout=NAME a family."
  )


def wrapped(shapes: Shapes, layouts: tuple[Layout, ...]) -> tuple[str, Layout] | None:
  """A prefix, without the "." or "/" at its end, below which lie all the marks of a layout; and that layout."""
  for layout in layouts:
    first, *others = layout.marks
    for name in shapes:
      front = name.removesuffix(first)
      ends = front != name and front[-1:] in (".", "/")
      if ends and all(front + mark in shapes for mark in others) and not any(front + n in shapes for n in layout.lacks):
        return front[:-1], layout
  return None


def leftover(layout: Layout, names: Collection[str]) -> int:
  """How many names no rule of a layout fits, whatever the sizes are."""
  keymap = layout.keymap({"heads": 1, "depth": 1, "image_size": 1, "patch": 1}, names)
  return sum(keymap.place(name) is None for name in names)


def closest(shapes: Shapes, layouts: tuple[Layout, ...]) -> str:
  """ " The nearest is ..., which also has ..." or ""."""
  found = []
  for layout in layouts:
    short = {layout.clean(name) for name in shapes}
    there = sum(mark in short for mark in layout.marks)
    found.append((there / len(layout.marks), layout, [m for m in layout.marks if m not in short]))
  share, layout, absent = max(found, key=lambda entry: entry[0])
  return f" The nearest is a {layout.title}, which also has {', '.join(absent)}." if share and absent else ""


def by_name(name: str, layouts: tuple[Layout, ...]) -> Layout:
  """The layout of a name; raises `UserError` with the nearest."""
  found = {layout.name: layout for layout in layouts}
  if name not in found:
    raise UserError(f"--layout={name}: expected one of {', '.join(found)}.{nearest(name, found)}")
  return found[name]
