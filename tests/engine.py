"""Small runs of real configs, for the tests of the engine and the contract tests."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import inspect
import json
import pathlib

import jax
import numpy as np

from big_ssl import setup
from big_ssl.core import config as config_lib
from big_ssl.core.checkpoint import Checkpointer
from big_ssl.evaluate import Extractor, refresh

ROOT = pathlib.Path(__file__).parents[1]
# Tests compile without optimization, in half the time (conftest). For those whose tolerance is the rounding of what users run:
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
_TINY_VIT = {"model.width": 24, "model.depth": 2, "model.heads": 2, "model.mlp_dim": 48}
TINY = {
  "vit": _TINY_VIT,
  "navit": _TINY_VIT,
  "resnet": {"model.stem_width": 8, "model.blocks": (1, 1, 1, 1)},
}
SMALL = {
  "batch_size": 16,
  "total": "6steps",
  "log_every": "1steps",
  "data.train_examples": 40,
  "data.eval_examples": 40,
  "optim.warmup": "2steps",
  "checkpoint.every": "2steps",
  "report.pictures": (),
}


def recipes() -> list[tuple[str, str]]:
  """(config, recipe) of every file in configs/: each public function there that takes no argument is a recipe."""
  found = []
  for file in sorted(f for f in (ROOT / "configs").glob("*.py") if f.stem != "common"):
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in vars(module).items():
      public = inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
      if public and name != "get_config" and not inspect.signature(value).parameters:
        found.append((file.stem, name))
  return found


def default_configs() -> list[str]:
  return sorted({name for name, _ in recipes()})


def methods() -> list[str]:
  """The configs of one method each, which have its name; the others are recipes of these."""
  return [name for name in default_configs() if (ROOT / "big_ssl" / "methods" / f"{name}.py").exists()]


def load(name: str, recipe: str = "", **overrides) -> config_lib.Config:
  spec = str(ROOT / "configs" / f"{name}.py") + (f":{recipe}" if recipe else "")
  return config_lib.load(spec, {k: str(v) for k, v in overrides.items()})[0]


def small(name: str, **overrides) -> config_lib.Config:
  """The default recipe of a config, shrunk in data, length and network; the method keeps every option."""
  config = load(name)
  return load(name, **SMALL | TINY.get(config.model["name"], {}) | few_labels(config) | few_clusters(config) | small_shards(config) | overrides)


def saved(name: str, workdir: pathlib.Path, **overrides) -> setup.Run:
  """A run of `small` options that was never trained: its config.json and the checkpoint of step 0."""
  fields = SMALL | TINY["vit"] | overrides
  config, tree = config_lib.load(str(ROOT / "configs" / f"{name}.py"), {k: str(v) for k, v in fields.items()})
  run = setup.make_run(config, devices=jax.devices()[:1])
  checkpointer = Checkpointer(workdir)
  checkpointer.save(run.initial_state(), meta=run.meta())
  checkpointer.close()
  (workdir / "config.json").write_text(json.dumps(tree, default=str))
  return run


def few_labels(config: config_lib.Config) -> dict:
  """Overrides for a class-balanced support, or few labels: so few classes and images that a small world of sprites has them."""
  if config.data.labels_per_class:
    return {"data.labels_per_class": 1}
  if "classes_per_step" not in config.method:
    return {}
  return {
    "data.train_examples": 120,
    "method.classes_per_step": 4,
    "method.images_per_class": 2,
    "method.labels_per_class": 3,
  }


def few_clusters(config: config_lib.Config) -> dict:
  """Overrides for a method that clusters the training set: no more clusters and dimensions than the few images allow."""
  wanted = {"num_clusters": 6, "pca_dim": 8, "solves": 3}
  found = {f"method.{name}": value for name, value in wanted.items() if name in config.method}
  if isinstance(config.method.get("num_prototypes"), tuple):
    found["method.num_prototypes"] = tuple(6 + h for h, _ in enumerate(config.method["num_prototypes"]))
  return found


def small_shards(config: config_lib.Config) -> dict:
  """Overrides for a method that packs images: shards that divide the batch of each of 8 devices."""
  small = {"method.shard_size": 2, "method.sequences": 2, "method.drop_rate": (0.25, 0.25)}
  return small if "shard_size" in config.method else {}


class _Compiled:
  """A run with its fresh state and its steps, made once for all tests that ask for the same config and devices in turn."""

  def __init__(self, config: config_lib.Config, devices: int):
    self.run = setup.make_run(config, devices=jax.devices()[:devices])

  @functools.cached_property
  def steps(self) -> dict:
    shapes = (self.run.abstract_state, self.run.raw_spec(), jax.tree.map(_shape, self.run.resident))
    with jax.set_mesh(self.run.mesh):
      return {patch: self.run.jit_step(patch).lower(*shapes).compile() for patch in self.run.methods}

  @functools.cached_property
  def _start(self):
    return jax.tree.map(np.asarray, self.run.initial_state())

  def initial_state(self):
    """Arrays of one's own: steps donate them."""
    return jax.tree.map(lambda x, a: jax.device_put(x.copy(), a.sharding), self._start, self.run.abstract_state)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


_COMPILED: collections.OrderedDict[str, _Compiled] = collections.OrderedDict()


def compiled(config: config_lib.Config, *, devices: int = 1) -> _Compiled:
  """The last few are kept."""
  key = f"{devices} {config}"
  if key not in _COMPILED:
    _COMPILED[key] = _Compiled(config, devices)
    if len(_COMPILED) > 4:
      _COMPILED.popitem(last=False)
  return _COMPILED[key]


def train_steps(config: config_lib.Config, *, devices: int = 1, state=None, stop: int | None = None):
  """Runs the real step from `state` (fresh when None) to `stop`; returns the state and the metrics of every step."""
  made = compiled(config, devices=devices)
  run = made.run
  state = made.initial_state() if state is None else state
  stop = run.total_steps if stop is None else stop
  history, extract = [], Extractor(run)
  with jax.set_mesh(run.mesh):
    step = start = int(state.step)
    while step < stop:
      if step in run.method.refresh_steps():
        state, _ = refresh(run, extract, state)
      for raw in run.batches(step, min(run.boundary_after(step), stop), state.extra):
        state, metrics = made.steps[run.patch_at(start + len(history))](state, raw, run.resident)
        history.append({k: float(v) for k, v in metrics.items()})
      step = start + len(history)
  return state, history


@functools.cache
def loss(method):
  """`method.loss`, compiled: operation by operation it takes several times as long."""
  return jax.jit(method.loss)


class Notes:
  """A logger that keeps its lines."""

  def __init__(self):
    self.lines = []

  def notice(self, line):
    self.lines.append(line)

  warning = notice

  def timer(self, name):
    del name
    return contextlib.nullcontext()


def leaves_equal(a, b) -> bool:
  return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def nested(tree: dict) -> dict:
  """{"backbone", "head", "predictor"} of a file's weights as PAWS keeps them: {"encoder": {"backbone", "head"}, "predictor"}."""
  encoder = {name: branch for name, branch in tree.items() if name != "predictor"}
  return {"encoder": encoder, "predictor": tree.get("predictor", {})}


def unnested(tree: dict) -> dict:
  """The inverse of `nested`."""
  return tree.get("encoder", {}) | {name: branch for name, branch in tree.items() if name != "encoder" and branch}
