"""Our trees as files of other libraries: which layout, what has to be folded for it, and the files themselves."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from big_ssl import __version__
from big_ssl.core.types import UserError, nearest
from big_ssl.models import positions
from big_ssl.models.layers import Backbone
from big_ssl.weights import hugging_face, transfer
from big_ssl.weights.containers import write_npz, write_safetensors
from big_ssl.weights.describe import Fields
from big_ssl.weights.families import LAYOUTS
from big_ssl.weights.family import IMAGENET, Layout
from big_ssl.weights.keymap import Weights
from big_ssl.weights.names import nest
from big_ssl.weights.stablehlo import write_program

FORMATS = ("official", "timm", "hf", "torchvision", "bigvision", "safetensors", "stablehlo")
_OWN = ("dino", "msn", "loca", "swav", "paws")  # methods whose public code has a layout
_NO_SLOT = ("bigvision",)  # layouts whose positions have no slot for CLS
_PLAIN = {"class_token": (True,), "norm": ("layernorm",), "norm_bias": (True,), "pre_norm": (False,), "patch_bias": (True,)}
_FIRST = _PLAIN | {"mlp": ("gelu",), "layer_scale": (None,), "registers": (0,)}
_RUNS = {  # values of fields with which the code behind a layout gives the same numbers; its files have names for more
  **dict.fromkeys(("dino", "msn", "hf_vit"), _FIRST),
  "torchvision_vit": _FIRST | {"qkv_bias": (True,), "gelu": ("exact",)},
  **dict.fromkeys(("dinov2", "dinov2_registers", "hf_dinov2", "hf_dinov2_registers"), _PLAIN),
  "bigvision": _FIRST | {"class_token": (True, False), "qkv_bias": (True,)},
}
_SLOT = ("dino", "msn", "dinov2", "dinov2_registers", "hf_vit", "hf_dinov2", "hf_dinov2_registers", "torchvision_vit")


@dataclasses.dataclass(frozen=True)
class Export:
  """What an export would write.

  Attributes:
    layout: of the names; None for our own.
    tensors: {name: array}.
    model: fields of `config.model` after what was folded.
    left: our leaves that the layout has no names for.
    notes: sentences about what another library does otherwise.
  """

  layout: Layout | None
  tensors: dict[str, np.ndarray]
  model: Fields
  left: tuple[str, ...]
  notes: tuple[str, ...]


def prepare(saved: transfer.Saved, *, form: str) -> Export:
  """The tensors of weights in a format.

  Raises:
    UserError: an unknown format, or one that does not have this model.
  """
  if form not in FORMATS:
    raise UserError(f"--format={form}: expected one of {', '.join(FORMATS)}.{nearest(form, FORMATS)}")
  fields = {name: _tuples(value) for name, value in saved.card["model"].items()}
  weights = saved.weights
  if form not in ("safetensors", "stablehlo") and fields.get("name") in ("vit22b", "flexivit"):
    fields = _as_vit(fields)
  if form in ("safetensors", "stablehlo"):
    return Export(None, weights.flat() | _prefixed(weights.kept), fields, (), ())
  layout = _layout(saved, fields, form)
  same = saved.card.get("layout") == layout.name
  if not same:
    if wrong := _cannot_run(fields, layout):
      raise UserError(f"--format={form}: the code of a {layout.title} does not have {', '.join(wrong)}.")
    weights = dataclasses.replace(weights, kept=None)
    weights, fields = _fold(weights, fields, layout)
  flat = weights.flat()
  options = fields | ({"heads": _classifiers(flat)} if _classifiers(flat) else {})
  names = saved.card["names"] if same and "names" in saved.card else list(flat)
  keymap = layout.keymap(options, names)
  left = tuple(path for path in flat if not keymap.writes(path))
  unfit = [path for path in left if path.split("/")[1] == "backbone"]
  if unfit:
    raise UserError(f"--format={form}: a {layout.title} has no name for {', '.join(unfit[:5])}.")
  tensors = keymap.dump(Weights.of({p: v for p, v in flat.items() if p not in left}, weights.kept))
  return Export(layout, tensors, fields, left, _notes(fields, layout))


def write(export: Export, saved: transfer.Saved, *, to: str | pathlib.Path, form: str) -> list[pathlib.Path]:
  """Writes the file, or for "hf" the directory, with its model card; returns what was written."""
  to = pathlib.Path(to)
  card = _card(export, saved, form)
  if form == "hf":
    to.mkdir(parents=True, exist_ok=True)
    model = transfer.backbone(export.model)
    msn = saved.card.get("method") == "msn" or saved.card.get("layout") == "msn"
    content = {
      "config.json": hugging_face.model_config(
        export.layout.name, model, msn=msn and export.layout.name == "hf_vit", classes=_classes(export, model)
      )
    }
    size = getattr(model, "image_size", 224)
    mean, std = (() if v == transfer.NO_NORMALIZATION else v for v in _normalization(saved, export))
    content["preprocessor_config.json"] = hugging_face.preprocessor_config(size, mean=mean, std=std)
    file, card_file = to / "model.safetensors", to / transfer.CARD
    for name, value in content.items():
      (to / name).write_text(json.dumps(value, indent=2) + "\n")
    written = [to / name for name in content]
  else:
    suffix = {"bigvision": ".npz", "stablehlo": ".stablehlo"}.get(form, ".safetensors")
    if to.suffix != suffix:
      raise UserError(f"--to={to}: --format={form} writes a file that ends in {suffix}.")
    to.parent.mkdir(parents=True, exist_ok=True)
    file, card_file, written = to, to.with_suffix(".json"), []
  if form == "stablehlo":
    write_program(file, saved.weights, export.model)
  elif form == "bigvision":
    write_npz(file, {f"params/{name}": value for name, value in export.tensors.items()})
  else:
    write_safetensors(file, export.tensors, metadata={"big_ssl": json.dumps(card)})
  card_file.write_text(json.dumps(card, indent=2) + "\n")
  return [file, card_file, *written]


def _classes(export: Export, model: Backbone) -> int:
  """Of the classifier in a file for transformers, whose Dinov2 reads CLS and the mean of the patches; else 0."""
  shape = next((v.shape for n, v in export.tensors.items() if n in ("classifier.weight", "classifier.1.weight")), None)
  if shape is None or (export.layout.name.startswith("hf_dinov2") and shape[1] != 2 * model.size().width):
    return 0
  return shape[0]


def _layout(saved: transfer.Saved, fields: Fields, form: str) -> Layout:
  """The layout of a format for a model: that of the source where it is one of them, else the one that leaves least."""
  name = fields.get("name", "")
  fit = [layout for layout in LAYOUTS if layout.format == form and layout.model == name]
  if not fit:
    other = sorted({layout.format for layout in LAYOUTS if layout.model == name})
    raise UserError(
      f"--format={form}: not for config.model.name={name!r}; there are {', '.join((*other, 'safetensors'))}."
    )
  wanted = (saved.card.get("layout"), saved.card.get("method"))
  own = next((layout for layout in fit if layout.name in wanted), None)
  if own is not None:
    return own
  flat = saved.weights.flat()
  registers = bool(fields.get("registers"))

  def cost(layout: Layout) -> tuple[int, int]:
    keymap = layout.keymap(fields, list(flat))
    left = sum(not keymap.writes(path) for path in flat) + len(_cannot_run(fields, layout))
    return left, int(layout.name.endswith("registers") != registers)

  return min(fit, key=cost)


def _as_vit(fields: Fields) -> Fields:
  """A ViT-22B or a FlexiViT is a ViT of other defaults, which are stated then."""
  model, plain = transfer.backbone(fields), transfer.backbone({"name": "vit"})
  names = [f.name for f in dataclasses.fields(plain) if f.name not in ("parent", "name")]
  return {"name": "vit"} | {n: getattr(model, n) for n in names if n in fields or getattr(model, n) != getattr(plain, n)}


def _cannot_run(fields: Fields, layout: Layout) -> list[str]:
  """Fields of a ViT, with their values, that the code behind a layout does not have."""
  if fields.get("name") != "vit":
    return []
  model, runs = transfer.backbone(fields), _RUNS.get(layout.name, {})
  return [f"config.model.{n}={getattr(model, n)!r}" for n, values in runs.items() if getattr(model, n) not in values]


def _with_table(flat: dict[str, np.ndarray], fields: Fields, layout: Layout) -> tuple[dict[str, np.ndarray], Fields]:
  """Fixed positions as a table, which other libraries read from the file; big_vision makes its own."""
  kind = fields.get("pos_table", "learned")
  if fields.get("name") != "vit" or kind == "learned" or (layout.name == "bigvision" and kind == "sincos2d"):
    return flat, fields
  model = transfer.backbone(fields)
  width, slots = model.size().width, int(model.class_token and model.class_position)
  fixed = (
    positions.sincos2d(model.table(), width=width)
    if kind == "sincos2d"
    else positions.sincos(model.table(), width=width, scrambled=kind == "sincos_scrambled")
  )
  table = np.pad(fixed, ((slots, 0), (0, 0)))[None]
  return flat | {"params/backbone/pos_embed": table}, {n: v for n, v in fields.items() if n != "pos_table"}


def _fold(weights: Weights, fields: Fields, layout: Layout) -> tuple[Weights, Fields]:
  """CLS and its position slot for layouts that have one where the weights have two, or the other way round."""
  flat, fields = _with_table(weights.flat(), dict(fields), layout)
  cls, table = "params/backbone/cls_token", "params/backbone/pos_embed"
  if fields.get("name") != "vit" or cls not in flat or table not in flat:
    return dataclasses.replace(weights, **_trees(flat)), fields
  slot = fields.get("class_position", True)
  without = layout.name in _NO_SLOT or (layout.name == "timm_vit" and bool(fields.get("registers")))
  if slot and without:
    flat |= {cls: flat[cls] + flat[table][:, :1], table: flat[table][:, 1:]}
    fields["class_position"] = False
  elif not slot and layout.name in _SLOT:
    flat[table] = np.concatenate([np.zeros_like(flat[cls]), flat[table]], axis=1)
    fields.pop("class_position")
  return dataclasses.replace(weights, **_trees(flat)), fields


def _trees(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
  tree = nest(flat)
  return {"params": tree.get("params", {}), "batch_stats": tree.get("batch_stats", {})}


def _notes(fields: Fields, layout: Layout) -> tuple[str, ...]:
  """What differs in the other library, beside the names."""
  notes = []
  rule = fields.get("pos_rule", "dino")
  if "pos_rule" in layout.fixed and rule != layout.fixed["pos_rule"]:
    notes.append(
      f"positions were resampled by the rule '{rule}', and are by '{layout.fixed['pos_rule']}' there: the same at"
      f" {fields.get('image_size', 224)} px only."
    )
  if fields.get("name") == "vit" and layout.name == "bigvision" and fields.get("gelu", "exact") == "exact":
    notes.append("trained with the exact GELU; big_vision has the tanh approximation, about 5e-4 off per activation.")
  if fields.get("name") == "vit" and layout.name == "bigvision":
    notes.append("big_vision reads values from -1 to 1; feed images normalized as this card says.")
  return tuple(notes)


def _normalization(saved: transfer.Saved, export: Export) -> tuple[Any, Any]:
  """Mean and standard deviation of each channel, or `transfer.NO_NORMALIZATION` twice."""
  found = saved.card.get("mean"), saved.card.get("std")
  return found if all(found) else (export.layout and export.layout.normalization) or IMAGENET


def _card(export: Export, saved: transfer.Saved, form: str) -> dict[str, Any]:
  """The model card of an export: what is needed to get the same numbers elsewhere, and where the weights come from."""
  source = {k: saved.card[k] for k in ("source", "source_sha256", "license", "layout", "method") if saved.card.get(k)}
  mean, std = _normalization(saved, export)
  return {
    "library": f"big_ssl {__version__}",
    "format": form,
    "layout": export.layout.name if export.layout else "big_ssl",
    "title": export.layout.title if export.layout else "big_ssl",
    "model": export.model,
    "position_rule": export.model.get("pos_rule", "dino") if export.model.get("name") == "vit" else None,
    "mean": mean,
    "std": std,
    "license": saved.card.get("license"),
    "from": source | {"tree": saved.tree},
    "left": list(export.left),
    "notes": list(export.notes),
    "kept": saved.card.get("kept", {}),
  }


def _prefixed(kept: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
  return {f"kept/{name}": value for name, value in (kept or {}).items()}


def _classifiers(flat: Mapping[str, np.ndarray]) -> int:
  """Heads of SeLa's one tensor."""
  kernel = flat.get("params/head/kernel")
  return 0 if kernel is None else len(kernel)


def _tuples(value: Any) -> Any:
  """JSON has lists for tuples."""
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
