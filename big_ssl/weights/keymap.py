"""The engine that carries tensors between public files and our trees: a table of rules, read in both directions.

A family of weights (weights/vit.py, weights/resnet.py ...) is a tuple of `Rule`s and `Keep`s. Both sides of a rule are
templates of full names; `{i}`, `{j}` ... stand for integers and may be shifted or scaled, the same letter being the
same number on both sides:

  Rule("layer{i}.{j}.conv1.weight", "params/backbone/layer{i}_{j}/conv1/kernel", CONV)
  Rule("s{i}.b{j+1}.se.fc1.bias", "params/backbone/block{i}_{j}/se/fc1/bias")
  Rule("blocks.{i}.attn.qkv.bias", tuple(f"params/backbone/block_{{i}}/attention/{n}/bias" for n in QKV), ...)

Builders return the rules of a layer: `linear`, `conv`, `norm`, `batch_norm`, `fused_attention`, `split_attention`,
`tensor`. Our names start with "params/" or "batch_stats/" and then the place in `models.encoder.Encoder`: "backbone/...",
"head/...", "predictor/..."; or in a method: "prototypes/head0". The builders take that place without the collection:

  RULES = (
    *conv("conv1", "backbone/conv1", bias=False),
    *batch_norm("bn1", "backbone/bn1"),
    *linear("fc", "head/fc"),
    Keep(r"mask_token", "only its own pretraining reads it"),
  )
  keymap = KeyMap("torchvision ResNet", RULES)
  weights = keymap.load({"conv1.weight": ..., "bn1.weight": ..., ...})
  keymap.dump(weights)  # the same tensors, bit for bit

Rules hold no sizes but those that a file does not say: pass heads, depth or grid as arguments of the function that
returns the rules. A rule whose tensors are all absent is not an error; pass `expect`, {our name: shape}, for a load
that says what is missing. A new layout is a new `moves.Move`, a pair of inverse functions on tuples of arrays. Arrays may
be memory maps and broadcast views: everything but a concatenation is a view.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from big_ssl.core.types import PyTree, UserError
from big_ssl.weights.moves import CONV, LINEAR, SAME, Arrays, Move, chain, heads_bias, heads_kernel, out_kernel, rows
from big_ssl.weights.names import Template, flatten, nest

QKV = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Weights:
  """Our trees, and what a file holds beyond them.

  Attributes:
    params: nested dicts; "backbone" and, where the file has them, "head", "predictor", "prototypes" ...
    batch_stats: nested dicts of running means and variances.
    kept: {their name: array} of tensors that no model of ours reads and an export writes back; None for weights that
      were trained here, whose export gets the defaults of the `Keep` rules.
  """

  params: PyTree
  batch_stats: PyTree
  kept: dict[str, np.ndarray] | None = None

  def flat(self) -> dict[str, np.ndarray]:
    """{"params/backbone/...": array, "batch_stats/backbone/...": array}."""
    return flatten(self.params, "params/") | flatten(self.batch_stats, "batch_stats/")

  @classmethod
  def of(cls, flat: Mapping[str, np.ndarray], kept: dict[str, np.ndarray] | None = None) -> Weights:
    """The inverse of `flat`."""
    tree = nest(flat)
    return cls(tree.get("params", {}), tree.get("batch_stats", {}), kept)


@dataclasses.dataclass(frozen=True)
class Reading:
  """What of a file fits, and the names of what does not.

  Attributes:
    weights: all that fits.
    missing: tensors that the file should have.
    unexpected: tensors without a place.
    different: descriptions of tensors of another shape.
  """

  weights: Weights
  missing: tuple[str, ...]
  unexpected: tuple[str, ...]
  different: tuple[str, ...]

  def lines(self) -> list[str]:
    """What does not fit, the first 10 of each kind."""
    kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.different))
    return [
      f"{label} {len(names)}: {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}"
      for label, names in kinds
      if names
    ]

  def whole(self, title: str, *, hint: str = "") -> Weights:
    """The weights; raises `UserError` unless all of the file fits."""
    if lines := self.lines():
      raise UserError(f"weights: these are not the tensors of this {title}. {'; '.join(lines)}.{hint and ' ' + hint}")
    return self.weights


@dataclasses.dataclass(frozen=True)
class Rule:
  """Tensors of a file <-> leaves of our trees.

  Attributes:
    theirs: template, or several.
    ours: template, or several, with the collection in front: "params/backbone/conv1/kernel".
    move: between the arrays of the two, in these orders.
    needs: templates of their names that a file with these tensors has too: the bias of a weight.
  """

  theirs: str | tuple[str, ...]
  ours: str | tuple[str, ...]
  move: Move = SAME
  needs: tuple[str, ...] = ()

  @functools.cached_property
  def source(self) -> tuple[Template, ...]:
    return tuple(Template(t) for t in ((self.theirs,) if isinstance(self.theirs, str) else self.theirs))

  @functools.cached_property
  def target(self) -> tuple[Template, ...]:
    return tuple(Template(t) for t in ((self.ours,) if isinstance(self.ours, str) else self.ours))


@dataclasses.dataclass(frozen=True)
class Keep:
  """Tensors of a file that no model of ours reads; they are stored and written back.

  Attributes:
    theirs: template; a "*" in it stands for anything.
    reason: one clause, for the model card and `show`.
    constant: what the tensor must be equal to, where it is no parameter.
    beside: template of one of our leaves; an export of weights trained here writes `default` for each such leaf.
    default: see `beside`; `constant` where None.
  """

  theirs: str
  reason: str
  constant: np.ndarray | None = dataclasses.field(default=None, compare=False)
  beside: str | None = None
  default: np.ndarray | None = dataclasses.field(default=None, compare=False)

  @functools.cached_property
  def template(self) -> Template:
    return Template(self.theirs)


@dataclasses.dataclass(frozen=True)
class KeyMap:
  """The rules of a family, under the name that messages use; where several fit a name the first one counts."""

  title: str
  rules: tuple[Rule | Keep, ...]

  def load(
    self, tensors: Mapping[str, np.ndarray], *, expect: Mapping[str, tuple[int, ...]] | None = None, hint: str = ""
  ) -> Weights:
    """The tensors of a file, by the names of the templates, as our trees.

    Args:
      tensors: {name: array}; broadcast views and memory maps are fine.
      expect: {our name: shape} of the model that the weights are for, or of its backbone alone; None checks names only.
      hint: a sentence for the end of a message.

    Raises:
      UserError: tensors that no rule names, tensors that are missing, or shapes that do not fit; the first 10 of each.
    """
    return self.read(tensors, expect=expect).whole(self.title, hint=hint)

  def read(self, tensors: Mapping[str, np.ndarray], *, expect: Mapping[str, tuple[int, ...]] | None = None) -> Reading:
    """As `load`, with what fits and a list of what does not; raises for layouts and constants alone."""
    kept, rest = self._split(tensors)
    groups, unexpected = self._groups(rest, "source")
    out: dict[str, np.ndarray] = {}
    missing: list[str] = []
    for (rule, values), names in groups.items():
      missing += [need for need in (Template(t).fill(values) for t in rule.needs) if need not in tensors]
      absent = [name for name in names if name not in tensors]
      if absent:
        missing += absent
        continue
      moved = _move(rule.move.load, tuple(tensors[n] for n in names), names, self.title)
      out |= zip((t.fill(values) for t in rule.target), moved, strict=True)
    different: list[str] = []
    if expect is not None:
      parts = {path.split("/")[1] for path in expect}  # such as "backbone": of a head the sizes are free
      missing += [self._their_name(path) for path in expect if path not in out]
      unexpected += [self._their_name(path) for path in out if path not in expect and path.split("/")[1] in parts]
      wrong = [path for path, shape in expect.items() if path in out and tuple(out[path].shape) != tuple(shape)]
      different = [
        f"{self._their_name(path)} {_shown(out[path].shape)} fits no {_shown(tuple(expect[path]))} of {path}"
        for path in wrong
      ]
      out = {path: value for path, value in out.items() if path in expect or path.split("/")[1] not in parts}
      out = {path: value for path, value in out.items() if path not in wrong}
    once = lambda names: tuple(dict.fromkeys(names))
    return Reading(Weights.of(out, kept), once(missing), once(unexpected), tuple(different))

  def dump(self, weights: Weights, *, leave: str | None = None) -> dict[str, np.ndarray]:
    """The inverse of `load`: {their name: array}.

    Args:
      weights: as from `load`, or trained here.
      leave: regular expression (`re.search`) of our names that the export does without, such as "^params/head/".

    Raises:
      UserError: a leaf that no rule names, or one of several that become one tensor is missing.
    """
    flat = {p: np.asarray(v) for p, v in weights.flat().items() if leave is None or not re.search(leave, p)}
    groups, unexpected = self._groups(flat, "target")
    missing = [name for names in groups.values() for name in names if name not in flat]
    Reading(weights, tuple(missing), tuple(unexpected), ()).whole(self.title)
    out: dict[str, np.ndarray] = {}
    for (rule, values), names in groups.items():
      moved = _move(rule.move.dump, tuple(flat[n] for n in names), names, self.title)
      out |= zip((t.fill(values) for t in rule.source), moved, strict=True)
    return out | (self._defaults(flat) if weights.kept is None else weights.kept)

  def kept_because(self, name: str) -> str | None:
    """The reason why a tensor is kept aside, None where it is not."""
    return next((r.reason for r in self._keeps() if r.template.match(name) is not None), None)

  def place(self, name: str) -> str | None:
    """Our name, or the first of several, of a tensor; the reason why it is kept aside; None for an unknown one."""
    groups, _ = self._groups([name], "source")
    return next((rule.target[0].fill(values) for rule, values in groups), self.kept_because(name))

  def writes(self, path: str) -> bool:
    """Whether a leaf of ours has a name in this layout."""
    return not self._groups([path], "target")[1]

  def _keeps(self) -> list[Keep]:
    return [r for r in self.rules if isinstance(r, Keep)]

  def _split(self, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """What is kept, after a comparison with its constant, and the other names."""
    kept, rest = {}, []
    for name in tensors:
      rule = next((r for r in self._keeps() if r.template.match(name) is not None), None)
      if rule is None:
        rest.append(name)
        continue
      kept[name] = tensors[name]
      if rule.constant is not None and not np.array_equal(kept[name], rule.constant):
        raise UserError(f"weights: '{name}' of a {self.title} is expected to be constant ({rule.reason}), and is not.")
    return kept, rest

  def _groups(
    self, names: Iterable[str], side: str
  ) -> tuple[dict[tuple[Rule, tuple[tuple[str, int], ...]], tuple[str, ...]], list[str]]:
    """{(rule, integers): all names of that side}, and the names without a rule."""
    rules = [(r, t) for r in self.rules if isinstance(r, Rule) for t in getattr(r, side)]
    groups, unknown = {}, []
    for name in names:
      found = next(((r, v) for r, t in rules if (v := t.match(name)) is not None), None)
      if found is None:
        unknown.append(name)
      else:
        groups[found] = tuple(t.fill(found[1]) for t in getattr(found[0], side))
    return groups, unknown

  def _their_name(self, path: str) -> str:
    """The name, or the first of several, that a leaf of ours has in a file."""
    groups, unknown = self._groups([path], "target")
    return f"{unknown[0]} (no name in this layout)" if unknown else next(r.source[0].fill(v) for r, v in groups)

  def _defaults(self, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for rule in self._keeps():
      value = rule.constant if rule.default is None else rule.default
      if rule.beside is not None and value is not None:
        beside = Template(rule.beside)
        out |= {rule.template.fill(v): value for p in flat if (v := beside.match(p)) is not None}
    return out


def _move(step: Callable[[Arrays], Arrays], arrays: Arrays, names: tuple[str, ...], title: str) -> Arrays:
  try:
    return step(arrays)
  except (ValueError, IndexError) as error:
    shapes = ", ".join(f"'{n}' {_shown(a.shape)}" for n, a in zip(names, arrays, strict=True))
    raise UserError(f"weights: {shapes} has not the layout of a {title}: {error}.") from None


def _shown(shape: tuple[int, ...]) -> str:
  return "x".join(map(str, shape)) or "scalar"


def linear(theirs: str, ours: str, *, bias: bool | None = True) -> tuple[Rule, ...]:
  """{weight [out, in], bias} <-> {kernel [in, out], bias}; `bias` None: where there is one."""
  return _weight_and_bias(theirs, ours, LINEAR, bias)


def conv(theirs: str, ours: str, *, bias: bool | None = True) -> tuple[Rule, ...]:
  """{weight OIHW, bias} <-> {kernel HWIO, bias}, depthwise and grouped ones too; `bias` None: where there is one."""
  return _weight_and_bias(theirs, ours, CONV, bias)


def _weight_and_bias(theirs: str, ours: str, move: Move, bias: bool | None) -> tuple[Rule, ...]:
  needs = ((f"{theirs}.bias",), (f"{theirs}.weight",)) if bias else ((), ())
  weight = Rule(f"{theirs}.weight", f"params/{ours}/kernel", move, needs[0])
  return (weight,) if bias is False else (weight, Rule(f"{theirs}.bias", f"params/{ours}/bias", SAME, needs[1]))


def norm(theirs: str, ours: str) -> tuple[Rule, ...]:
  """LayerNorm or an affine map {weight, bias} <-> {scale, bias}; `models.layers.LayerNorm` needs "/norm" at the end of `ours`."""
  return tensor(f"{theirs}.weight", f"{ours}/scale") + tensor(f"{theirs}.bias", f"{ours}/bias")


def batch_norm(theirs: str, ours: str) -> tuple[Rule | Keep, ...]:
  """{weight, bias, running_mean, running_var} <-> params {scale, bias}, batch_stats {mean, var}; the counter is kept."""
  counter = Keep(
    f"{theirs}.num_batches_tracked",
    "a counter that torch reads only without momentum",
    beside=f"batch_stats/{ours}/mean",
    default=np.int64(0),
  )
  leaves = {
    "weight": f"params/{ours}/scale",
    "bias": f"params/{ours}/bias",
    "running_mean": f"batch_stats/{ours}/mean",
    "running_var": f"batch_stats/{ours}/var",
  }
  needs = tuple(f"{theirs}.{name}" for name in leaves)
  return (*(Rule(f"{theirs}.{name}", path, SAME, needs) for name, path in leaves.items()), counter)


def tensor(theirs: str, ours: str, move: Move = SAME) -> tuple[Rule, ...]:
  """One parameter."""
  return (Rule(theirs, f"params/{ours}", move),)


def fused_attention(qkv: str, out: str, ours: str, *, heads: int, joint: str = ".") -> tuple[Rule, ...]:
  """torch's rows [q | k | v] in one tensor and the output projection <-> `models.attention.MultiHeadAttention`.

  `joint` is what stands before "weight" and "bias" of that tensor: "_" in torch's own MultiheadAttention.
  """
  part = lambda leaf: tuple(f"params/{ours}/{name}/{leaf}" for name in QKV)
  return (
    Rule(f"{qkv}{joint}weight", part("kernel"), chain(rows(3), heads_kernel(heads))),
    Rule(f"{qkv}{joint}bias", part("bias"), chain(rows(3), heads_bias(heads))),
    *_attention_out(out, ours, heads=heads),
  )


def split_attention(query: str, key: str, value: str, out: str, ours: str, *, heads: int) -> tuple[Rule, ...]:
  """Three torch projections and the output projection <-> `models.attention.MultiHeadAttention`."""
  projections = tuple(
    rule
    for theirs, name in zip((query, key, value), QKV, strict=True)
    for rule in (
      *tensor(f"{theirs}.weight", f"{ours}/{name}/kernel", heads_kernel(heads)),
      *tensor(f"{theirs}.bias", f"{ours}/{name}/bias", heads_bias(heads)),
    )
  )
  return projections + _attention_out(out, ours, heads=heads)


def _attention_out(theirs: str, ours: str, *, heads: int) -> tuple[Rule, ...]:
  return tensor(f"{theirs}.weight", f"{ours}/out/kernel", out_kernel(heads)) + tensor(
    f"{theirs}.bias", f"{ours}/out/bias"
  )
