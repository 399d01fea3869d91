"""`python -m big_ssl.weights`: public files in, our weights out, and a look at either.

import FILE --to=DIR     DIR is then what config.init_from.path takes
export DIR --format=timm --to=FILE
show FILE
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from big_ssl import __version__
from big_ssl.core.checkpoint import quiet_storage
from big_ssl.core.command import exit_code
from big_ssl.core.types import UserError
from big_ssl.weights import export as export_lib
from big_ssl.weights import hugging_face, transfer
from big_ssl.weights.containers import File, describe, read_file
from big_ssl.weights.describe import Fields
from big_ssl.weights.families import LAYOUTS
from big_ssl.weights.family import Imported, Layout, by_name, convert, detect
from big_ssl.weights.keymap import Weights

_UNKNOWN = "not stated by the file; see its publisher"


def parse(argv: list[str]) -> argparse.Namespace:
  """The command line; `--model.KEY=VALUE` options end up as a dict in `model`."""
  given, rest = {}, []
  for item in argv:
    key, equals, value = item.removeprefix("--model.").partition("=")
    if item.startswith("--model.") and equals:
      given[key] = _value(value)
    else:
      rest.append(item)
  parser = argparse.ArgumentParser(
    prog="big_ssl.weights",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  importing = commands.add_parser("import", help="a public file as a directory for config.init_from.path")
  importing.add_argument("--to", required=True, help="directory to write")
  importing.add_argument("--allow-partial", action="store_true", help="take what fits, and list the rest")
  importing.add_argument("--license", default=_UNKNOWN, help="of the weights, for the model card")
  exporting = commands.add_parser("export", help="a run or an imported directory as a file of another library")
  exporting.add_argument("directory", help="work directory of a run, or what import wrote")
  exporting.add_argument("--format", required=True, help=", ".join(export_lib.FORMATS))
  exporting.add_argument("--to", required=True, help="file to write, or directory with --format=hf")
  exporting.add_argument("--tree", choices=("student", "teacher"), help="default: what the run's method evaluates")
  exporting.add_argument("--step", type=int, help="of the checkpoint; default the newest")
  showing = commands.add_parser("show", help="what a file holds, and what would be read")
  for command in (importing, showing):
    command.add_argument("file", help="a .pth, .pt, .tar, .safetensors, .npz or .msgpack file")
    command.add_argument(
      "--subtree", help="part of the file, such as teacher; two, trained and averaged: student,teacher"
    )
    command.add_argument("--layout", help="names in the file, where they are not recognized")
  args = parser.parse_args(rest)
  args.model = given
  return args


def _value(text: str) -> Any:
  """A number, a list of numbers as in 224,192, true or false, or text."""
  if "," in text:
    return tuple(_value(part) for part in text.split(",") if part)
  try:
    return json.loads(text)
  except ValueError:
    return text


def _read(file: File, subtree: str | None, layout: str | None, given: Fields, *, partial: bool) -> Imported:
  part = transfer.choose(file, subtree)
  hints = (*part.hints, file.kind)
  if own := _own_card(file):
    layout, given = layout or own["layout"], {k: _tuple(v) for k, v in own["model"].items()} | given
  elif file.kind == "safetensors":
    given = hugging_face.given_beside(file.path) | given
  found = {"hints": hints, "inside": part.subtree}
  detected = detect(part.tensors, LAYOUTS, **found) if layout is None else by_name(layout, LAYOUTS)
  hint = ""
  if layout is not None:
    hint = _suggestion(part, hints, detected)
  return convert(part.tensors, layout=detected, given=given, expected=transfer.expected, hint=hint, partial=partial)


def _own_card(file: File) -> dict[str, Any]:
  """The model card of a file that `export` wrote, in its metadata or beside it; else {}."""
  try:
    if "big_ssl" in file.metadata:
      return json.loads(file.metadata["big_ssl"])
    beside = file.path.with_suffix(".json")
    card = json.loads(beside.read_text()) if beside.is_file() else {}
  except ValueError:
    return {}
  return card if isinstance(card, dict) and str(card.get("library", "")).startswith("big_ssl ") else {}


def _suggestion(part: transfer.Part, hints: tuple[str, ...], layout: Layout) -> str:
  try:
    other = detect(part.tensors, LAYOUTS, hints=hints)
  except UserError:
    return ""
  return "" if other is layout else f"The file looks like a {other.title}: --layout={other.name}."


def _tuple(value: Any) -> Any:
  return tuple(map(_tuple, value)) if isinstance(value, list) else value


def import_file(args: argparse.Namespace) -> None:
  """Writes the directory and prints how to use it."""
  file = read_file(args.file)
  own = _own_card(file)
  if own.get("layout") == "big_ssl":
    flat = {name: file.tensors[name] for name in file.tensors}
    kept = {name.removeprefix("kept/"): flat.pop(name) for name in list(flat) if name.startswith("kept/")}
    card = own | _origin(file, own.get("license") or args.license) | (own.get("from") or {})
    weights = Weights.of(flat, kept)
    transfer.write_directory(args.to, weights, card=card | {"dtypes": transfer.dtypes(weights)})
    print(f"wrote {args.to}")
    return
  first, _, second = (args.subtree or "").partition(",")
  imported = _read(file, first or None, args.layout, args.model, partial=args.allow_partial)
  teacher = _read(file, second, args.layout, args.model, partial=args.allow_partial) if second else None
  part = transfer.choose(file, first or None)
  card = card_of(imported, file, license_=args.license, subtree=part.subtree)
  card |= {k: own[k] for k in ("mean", "std", "license", "from", "notes") if own.get(k)}
  state = part.state if "head" in imported.weights.params else {}  # it is that of the head's outputs
  transfer.write_directory(args.to, imported.weights, card=card, teacher=teacher and teacher.weights, state=state)
  print(
    f"{imported.layout.title}: {len(imported.weights.flat())} tensors, {_millions(imported.weights)}; wrote {args.to}"
  )
  if state:
    print(f"with the state of its pretraining: {', '.join(state)}")
  for line in imported.left:
    print(f"left: {line}")
  flags = " ".join(f"--config.model.{k}={_flag(v)}" for k, v in imported.model.items())
  print(f"use: --config.init_from.path={args.to} {flags}")


def card_of(imported: Imported, file: File, *, license_: str, subtree: str) -> dict[str, Any]:
  """The model card: where the weights come from, and what is needed to get the published numbers from them."""
  mean, std = imported.layout.normalization or (None, None)
  return {
    "library": f"big_ssl {__version__}",
    **_origin(file, license_),
    "subtree": subtree,
    "layout": imported.layout.name,
    "title": imported.layout.title,
    "model": imported.model,
    "position_rule": imported.model.get("pos_rule"),
    "mean": mean,
    "std": std,
    "names": list(imported.names),
    "kept": imported.kept,
    "left": list(imported.left),
    "dtypes": transfer.dtypes(imported.weights),
  }


def _origin(file: File, license_: str) -> dict[str, Any]:
  return {"source": file.path.name, "source_sha256": file.sha256(), "license": license_}


def export_directory(args: argparse.Namespace) -> None:
  """Writes the file and prints what was left out."""
  saved = transfer.read_directory(args.directory, tree=args.tree, step=args.step)
  prepared = export_lib.prepare(saved, form=args.format)
  written = export_lib.write(prepared, saved, to=args.to, form=args.format)
  print(f"{saved.tree}: {len(prepared.tensors)} tensors; wrote {', '.join(map(str, written))}")
  if prepared.left:
    print(f"left, without a name there: {', '.join(prepared.left)}")
  for note in prepared.notes:
    print(f"note: {note}")


def show_file(args: argparse.Namespace) -> None:
  """Prints what a file holds and what an import would do."""
  file = read_file(args.file)
  print(f"{file.path}: {file.kind}, {len(file.tensors)} tensors")
  part = transfer.choose(file, args.subtree)
  numbers = sum(math.prod(part.tensors.shape(name)) for name in part.tensors)
  print(f"part: {part.subtree or 'the whole file'}, {len(part.tensors)} tensors, {numbers / 1e6:.3f} M numbers")
  for place, count in part.others.items():
    print(f"  not read: {place}, {count} tensors")
  for name, value in part.state.items():
    print(f"  beside it, for the pretraining to go on: {name} {list(value.shape)}")
  for place, value in file.others.items():
    print(f"  not read: {place} = {describe(value)}")
  imported = _read(file, args.subtree, args.layout, args.model, partial=True)
  print(f"layout: {imported.layout.name}, {imported.layout.title}")
  print("config.model: " + " ".join(f"{k}={_flag(v)}" for k, v in imported.model.items()))
  for line in imported.left or ("complete",):
    print(line)
  for reason in sorted(set(imported.kept.values())):
    names = [name for name, why in imported.kept.items() if why == reason]
    print(f"kept aside, {reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
  keymap = imported.layout.keymap(imported.model, imported.names)
  for short, name in imported.names.items():
    print(f"  {name} {list(part.tensors.shape(name))} -> {keymap.place(short) or 'no place'}")


def _flag(value: Any) -> str:
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _millions(weights: Weights) -> str:
  return f"{sum(math.prod(value.shape) for value in weights.flat().values()) / 1e6:.3f} M numbers"


def main(argv: list[str] | None = None) -> int:
  args = parse(sys.argv[1:] if argv is None else argv)
  quiet_storage()
  try:
    return exit_code(lambda: {"import": import_file, "export": export_directory, "show": show_file}[args.command](args))
  except BrokenPipeError:  # the reader, such as `head`, has seen enough
    sys.stderr.close()
    return 0
  except OSError as error:
    print(f"error: {error.filename or args.command}: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
