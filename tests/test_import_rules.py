"""Who may import whom, and what else keeps the tree readable, held by parsing the sources."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "big_ssl").rglob("*.py")) + sorted((ROOT / "configs").glob("*.py"))
MAX_LINES = 420

# What of big_ssl a file may import, by the longest prefix of its own name.
# A file without one may import all but projects.
MAY_IMPORT = {
  "core": ("core",),
  "core.types": (),
  "core.method": ("core.types", "core.packing"),
  "core.resampling": ("core.types",),
  "core.packing": ("core.types",),
  "core.health": ("core.types",),
  "core.logger": ("core.types",),
  "core.checkpoint": ("core.types",),
  "core.step": ("core", "augment"),  # the step is where augmentation, loss and optimizer meet
  "losses": ("core.types", "losses", "ops"),
  "ops": ("core.types", "ops"),
  "augment": ("core.types", "core.packing", "core.resampling", "augment"),
  "models": ("core.types", "core.packing", "losses", "ops", "augment", "models"),
  "weights": ("core.types", "models", "weights"),
  "weights.transfer": ("core.types", "core.config", "core.checkpoint", "core.method", "models", "weights"),
  "weights.__main__": ("core.types", "core.checkpoint", "core.command", "weights"),
  "methods": (
    *("core.types", "core.method", "core.health", "core.packing", "core.schedules"),
    *("losses", "ops", "augment", "models", "methods"),
  ),
  "evals": ("core.types", "core.method", "core.packing", "core.resampling", "core.schedules", "losses", "ops", "augment", "models", "evals"),
  "data": ("core.types", "core.method", "core.packing", "core.resampling", "data"),
  "configs": ("core.types",),
}
# Libraries that only some files may import; a name ends at a dot.
ONLY_IN = {
  "tensorflow": ("data",),
  "tensorflow_datasets": ("data",),
  "clu": ("core.logger",),
  "tensorboard": (),
  "orbax": ("core.checkpoint",),
  "flax.linen": ("models",),
  "absl": ("main", "core.config", "configs"),
  "ml_collections": ("main", "core.config", "configs"),
  "torch": ("weights", "benchmark"),
}
# Imported inside functions only: slow to load, or not needed by every run.
LAZY = ("tensorflow", "tensorflow_datasets", "clu", "torch")
# Where a loop over steps may stand: the training loop, and the iterator that makes the batches of a range of steps.
STEP_LOOPS = ("train", "data.pipeline")


def within(name: str, prefixes) -> bool:
  return any(name == p or name.startswith(p + ".") for p in prefixes)


def module_name(file: pathlib.Path) -> str:
  """big_ssl/core/types.py -> core.types; configs/msn.py -> configs.msn."""
  parts = file.relative_to(ROOT).with_suffix("").parts
  parts = parts[1:] if parts[0] == "big_ssl" else parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, package: str) -> list[tuple[int, str, bool]]:
  """(line, dotted name, inside a function) of every import, relative ones resolved against `package`."""
  found = []

  def visit(node: ast.AST, inside: bool) -> None:
    if isinstance(node, ast.Import):
      found.extend((node.lineno, alias.name, inside) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
      found.extend((node.lineno, f"{base}.{alias.name}", inside) for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
      found.extend((node.lineno, a.value, inside) for a in node.args[:1] if isinstance(a, ast.Constant))
    for child in ast.iter_child_nodes(node):
      visit(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

  visit(tree, False)
  return found


def violations(name: str, source: str, *, is_package: bool = False) -> list[str]:
  """What is wrong with the imports and loops of module `name` (without "big_ssl.")."""
  tree, wrong = ast.parse(source), []
  full = f"big_ssl.{name}".rstrip(".")
  prefixes = [p for p in MAY_IMPORT if within(name, [p])]
  allowed = MAY_IMPORT[max(prefixes, key=len)] if prefixes else None
  for line, target, inside in imports(tree, full if is_package else full.rpartition(".")[0]):
    inner = target.removeprefix("big_ssl.") if target.startswith("big_ssl.") else None
    if inner is not None:
      if within(inner, ["projects"]) and not within(name, ["projects"]):
        wrong.append(f"{name}:{line} imports a project, {target}")
      elif allowed is not None and inner != "__version__" and not within(inner, allowed):
        wrong.append(f"{name}:{line} imports {target}, may import {', '.join(allowed) or 'nothing of big_ssl'}")
    for library, places in ONLY_IN.items():
      if within(target, [library]) and not within(name, places):
        wrong.append(f"{name}:{line} imports {target}, only {', '.join(places) or 'no file'} may")
    if within(target, LAZY) and not inside:
      wrong.append(f"{name}:{line} imports {target} at module level")
  for node in ast.walk(tree):
    loop = isinstance(node, (ast.For, ast.AsyncFor)) and any(
      isinstance(n, ast.Name) and n.id == "step" for n in ast.walk(node.target)
    )
    if loop and name not in STEP_LOOPS:
      wrong.append(f"{name}:{node.lineno} loops over steps; the one training loop is in train")
  return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(file):
  wrong = violations(module_name(file), file.read_text(), is_package=file.name == "__init__.py")
  assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
  "name,source",
  [
    ("losses.a", "from big_ssl.models import vit"),
    ("losses.a", "def f():\n  import big_ssl.methods.msn"),
    ("losses.a", "from ..models import vit"),
    ("losses.a", "from .. import models"),
    ("losses.a", "if True:\n  from big_ssl import train"),
    ("data.a", "from big_ssl.core import config"),
    ("core.types", "from big_ssl.core import method"),
    ("core.optim", "from big_ssl.methods import msn"),
    ("models.a", "from big_ssl.core.method import View"),
    ("methods.a", "import tensorflow as tf"),
    ("methods.a", "from flax import linen as nn"),
    ("methods.a", "import flax.linen.partitioning"),
    ("data.a", "import tensorflow as tf"),
    ("data.a", "class A:\n  from tensorflow import data"),
    ("core.logger", "from clu import metric_writers"),
    ("train", "import orbax.checkpoint"),
    ("train", "from orbax import checkpoint"),
    ("setup", "import importlib\nimportlib.import_module('tensorflow')"),
    ("methods.a", "def f():\n  from absl import logging"),
    ("methods.a", "import ml_collections"),
    ("train", "from big_ssl.projects import video"),
    ("configs.a", "from big_ssl.methods import msn"),
    ("methods.a", "for step in range(3): pass"),
    ("methods.a", "for i, step in enumerate(range(3)): pass"),
  ],
)
def test_what_breaks_a_rule_is_found(name, source):
  assert violations(name, source)


@pytest.mark.parametrize(
  "name,source",
  [
    ("losses.a", "from big_ssl.core.types import Array\nfrom big_ssl.ops.ema import ema"),
    ("data.a", "def f():\n  import tensorflow as tf"),
    ("core.logger", "def f():\n  from clu import metric_writers"),
    ("models.a", "import flax.linen as nn"),
    ("core.types", "import flax.struct"),
    ("train", "for step in range(3): pass"),
    ("train", "from big_ssl import evaluate"),
    ("augment.a", "from big_ssl.core.resampling import axis_weights"),
  ],
)
def test_what_keeps_the_rules_passes(name, source):
  assert violations(name, source) == []


def test_the_rules_name_modules_that_exist():
  names = {module_name(f) for f in FILES}
  places = [*MAY_IMPORT, *STEP_LOOPS, *(p for targets in MAY_IMPORT.values() for p in targets)]
  places += [p for targets in ONLY_IN.values() for p in targets]
  missing = sorted({p for p in places if not any(within(n, [p]) for n in names)})
  assert not missing, missing


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_stays_short(file):
  lines = len(file.read_text().splitlines())
  assert lines <= MAX_LINES, f"{file.relative_to(ROOT)} has {lines} lines"


def test_no_file_is_a_bin_for_everything():
  bins = [str(f.relative_to(ROOT)) for f in FILES if f.stem in ("util", "utils", "common", "helpers", "misc", "legacy")]
  assert [b for b in bins if b != "configs/common.py"] == []


def test_every_module_is_imported_without_tensorflow():
  names = sorted({module_name(f) for f in FILES if f.is_relative_to(ROOT / "big_ssl")})
  code = f"""
import sys
BLOCKED = ("tensorflow", "tensorflow_datasets", "tensorboard", "clu", "torch")
class Block:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in BLOCKED:
      raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Block())
import importlib
import big_ssl
for name in {names!r}:
  importlib.import_module(f"big_ssl.{{name}}".rstrip("."))
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
