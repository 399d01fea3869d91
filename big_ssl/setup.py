"""Everything a run is made of, from its config: data, method, mesh, optimizer, jitted step."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from big_ssl import __version__
from big_ssl.augment.photometric import Normalize
from big_ssl.core import config as config_lib
from big_ssl.core import flops, sharding
from big_ssl.core.config import Config
from big_ssl.core.method import Method, as_streams
from big_ssl.core.optim import Optimizer, make_optimizer, parameter_table
from big_ssl.core.step import check_accumulation, make_step, prepare_streams
from big_ssl.core.types import Extra, PyTree, TrainState, UserError
from big_ssl.data import opening
from big_ssl.data.balanced import labeled_subset
from big_ssl.data.pipeline import Pipeline
from big_ssl.data.source import DataSource
from big_ssl.evals.base import Evaluator
from big_ssl.methods.parts import check_views
from big_ssl.models.layers import Backbone, with_fields

_PROTOCOL_FIELDS = {"model": "model.name", "patch": "model.patch", "mean": "method.mean", "std": "method.std"}
_PATCH_STREAM = 0x9A7C  # of the draws of patch sizes, so that nothing else has their numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A configured run; holds no state of training."""

  config: Config
  method: Method
  methods: dict[int, Method]  # that training draws from, by the patch size of the ViT; one, under 0, where there is no choice
  mesh: Mesh
  sources: dict[str, DataSource]  # "train", "eval"
  pipelines: dict[str, Pipeline]  # per stream of the method
  evaluators: dict[str, Evaluator]
  optimizer: Optimizer
  total_steps: int
  examples: int
  batch_shapes: PyTree  # of an augmented batch of two images, from which parameters are shaped
  abstract_state: TrainState  # with shardings
  own_data: bool = True  # False where `sources` are others than `pipelines` read

  def steps(self, interval: Any) -> int:
    return interval.steps(batch_size=self.config.batch_size, examples=self.examples)

  def initial_state(self) -> TrainState:
    """A fresh state, a function of the seed alone, placed on the mesh."""
    with jax.set_mesh(self.mesh):
      return self._fresh(jax.random.key(self.config.seed))

  @functools.cached_property
  def _fresh(self) -> Any:
    """Compiled once: a run starts from a fresh state, and compares with one in the end."""
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
    return jax.jit(functools.partial(_init_state, self.method, self.optimizer, self.batch_shapes), out_shardings=shardings)

  def boundary_after(self, step: int) -> int:
    """The next refresh after `step`, or the end of the run."""
    return min((s for s in self.method.refresh_steps() if s > step), default=self.total_steps)

  @functools.cached_property
  def resident(self) -> dict[str, Any]:
    """Images of in-memory sources, on the devices, per stream; empty where images come with the batch."""
    cache: dict[int, Any] = {}
    for pipeline in self.pipelines.values():
      if pipeline.resident is not None and id(pipeline.resident) not in cache:
        cache[id(pipeline.resident)] = sharding.replicate(self.mesh, pipeline.resident)
    return {name: cache[id(p.resident)] for name, p in self.pipelines.items() if p.resident is not None}

  def batches(self, start: int, stop: int, extra: Extra) -> Iterator[dict[str, Any]]:
    """Raw global batches of the steps start ... stop - 1, in the order that the method plans from `extra`, if it does."""
    if type(self.method).plan is not Method.plan:  # later epochs are planned when the step has donated its state
      extra = jax.tree.map(lambda x: np.array(x) if x.is_fully_addressable or x.is_fully_replicated else x, extra)
    order = functools.cache(lambda epoch: self.method.plan(extra, epoch, self.config.seed))
    iterators = {name: p.iterate(start, stop, order=order if p.shuffles else None) for name, p in self.pipelines.items()}
    while True:
      raw = {}
      for name, iterator in iterators.items():
        item = next(iterator, None)
        if item is None:
          return
        raw[name] = item[1]
      yield sharding.make_global(self.mesh, raw)

  def raw_spec(self) -> dict[str, Any]:
    """Shapes and shardings of `batches`."""
    place = jax.sharding.NamedSharding(self.mesh, sharding.BATCH)
    spec = {name: p.spec() for name, p in self.pipelines.items()}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), spec)

  def patch_at(self, step: int) -> int:
    """The entry of `methods` that a step trains: of the seed and the step alone, so that all hosts draw the same."""
    sizes = tuple(self.methods)
    return sizes[np.random.default_rng([self.config.seed % 2**64, _PATCH_STREAM, step]).integers(len(sizes))]

  def jit_step(self, patch: int | None = None) -> Any:
    """The step at one of the patch sizes of `methods`; by default the first."""
    method = self.methods[next(iter(self.methods)) if patch is None else patch]
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
    step = make_step(method, self.optimizer, seed=self.config.seed, accumulate=self.config.optim.accumulate)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

  def trace_steps(self) -> list[Any]:
    """The step at each patch size, traced from shapes alone: what does not fit is refused here, and nothing is allocated."""
    resident = {
      name: jax.ShapeDtypeStruct(p.resident.shape, p.resident.dtype, sharding=jax.sharding.NamedSharding(self.mesh, jax.P()))
      for name, p in self.pipelines.items()
      if p.resident is not None
    }
    with jax.set_mesh(self.mesh):
      return [self.jit_step(patch).trace(self.abstract_state, self.raw_spec(), resident) for patch in self.methods]

  def step_flops(self, traced: Sequence[Any]) -> float:
    """FLOPs of a step on one device, of `trace_steps`, the mean over patch sizes; what is computed again is not counted."""
    once = {patch: dataclasses.replace(m, model=with_fields(m.model, remat="none", reversible=False)) for patch, m in self.methods.items()}
    if any(m.model != self.methods[patch].model for patch, m in once.items()):
      traced = dataclasses.replace(self, methods=once).trace_steps()
    return float(np.mean([flops.count(t.jaxpr) for t in traced])) / self.mesh.size

  def compiled_step(self) -> Any:
    """The first of them, compiled to be read and not to be run: on a CPU, where code takes most of the time, with the least effort."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    with jax.set_mesh(self.mesh):
      return self.trace_steps()[0].lower().compile(compiler_options=options)

  def describe(self) -> str:
    """Parameter table, bytes per device and the course of the run."""
    shardings = jax.tree.map(lambda x: x.sharding, self.abstract_state)
    total = sharding.bytes_per_device(self.abstract_state, shardings)
    mesh = " ".join(f"{k}:{v}" for k, v in self.mesh.shape.items())
    lines = [
      parameter_table(self.optimizer.tensors),
      f"state {total / 2**20:,.1f} MiB per device (parameters, optimizer, teacher and the rest), mesh {mesh} on {jax.devices()[0].device_kind}",
      f"{self.total_steps:,} steps of {self.config.batch_size} images, {self.examples:,} images in {self.sources['train'].describe()['name']}",
    ]
    lines += [f"each refresh takes {size / 2**20:,.1f} MiB more for {name}" for name, size in self.method.refresh_memory().items()]
    return "\n".join(lines)

  def meta(self) -> dict[str, Any]:
    """The record beside a checkpoint: what must not change when the run goes on."""
    return {
      "version": __version__,
      "seed": self.config.seed,
      "batch_size": self.config.batch_size,
      "method": self.config.method["name"],
      "data": self.sources["train"].describe(),
      "protocol": self.protocol(),
    }

  def protocol(self) -> dict[str, Any]:
    """What an evaluation must share with the training: the patch of the backbone's kernel, and the normalization."""
    model, normalize = self.method.model, [a for a in self.method.eval_view().augment if isinstance(a, Normalize)]
    patch = getattr(model, "kernel_patch", None) or getattr(model, "patch", None)
    numbers = {name: getattr(normalize[0], name) if normalize else () for name in ("mean", "std")}
    return {"model": self.config.model["name"], "patch": patch} | numbers

  def check_protocol(self, saved: dict[str, Any], where: str) -> None:
    """Raises `UserError` where the record of a checkpoint tells of another method, backbone, patch or normalization."""
    mine = json.loads(json.dumps({"method.name": self.config.method["name"]} | {_PROTOCOL_FIELDS[k]: v for k, v in self.protocol().items()}))
    made = {"method.name": saved.get("method")} | {_PROTOCOL_FIELDS[k]: v for k, v in saved.get("protocol", {}).items()}
    for key, value in mine.items():
      if made.get(key) is not None and made[key] != value:  # checkpoints of earlier versions do not tell
        raise UserError(f"{where}: the checkpoint was made with config.{key}={made[key]}, this config has {value}; features of another protocol say nothing.")

  def check_meta(self, saved: dict[str, Any], *, where: str) -> None:
    """Raises `UserError` naming what differs between the record of a checkpoint and this run."""
    mine = json.loads(json.dumps(self.meta()))
    for key in ("seed", "batch_size", "method", "data"):
      if saved[key] != mine[key]:
        raise UserError(
          f"{where}: made with {key}={saved[key]}, this run has {key}={mine[key]}; the order of the data would change."
          " Restore it, or start anew with another --workdir."
        )


def _evaluator(name: str, fields: Any) -> Evaluator:
  path = f"config.evals.{name}"
  if not isinstance(fields, Mapping):
    raise UserError(f"{path}={fields!r}: expected keys and values, or none to leave it out.")
  return config_lib.build_named("evals", {"name": name} | dict(fields), Evaluator, path=path)


def _init_state(method: Method, optimizer: Optimizer, shapes: PyTree, key: Any) -> TrainState:
  return _new_state(optimizer, *_init(method, shapes, key))


def _new_state(optimizer: Optimizer, params: PyTree, extra: Extra) -> TrainState:
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), extra=extra)


def _init(method: Method, shapes: PyTree, key: Any) -> Any:
  return method.init(key, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))


def batch_shapes(method: Method, pipelines: dict[str, Pipeline]) -> PyTree:
  """Shapes of an augmented batch of two images."""
  raw = {name: jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), p.spec()) for name, p in pipelines.items()}
  resident = {n: jax.ShapeDtypeStruct(p.resident.shape, p.resident.dtype) for n, p in pipelines.items() if p.resident is not None}
  return jax.eval_shape(lambda r, i: prepare_streams(method, r, i, jax.random.key(0)), raw, resident)


def make_method(
  config: Config, *, total_steps: int = 1, num_examples: int = 0, channels: int = 3, num_classes: int = 0
) -> Method:
  """The method with its backbone, built and checked; `channels` is 0 as long as the data is not known."""
  model = config_lib.build_named("models", config.model, Backbone, path="config.model")
  if channels and hasattr(model, "channels") and "channels" not in config.model:
    model = model.clone(channels=channels)
  return config_lib.build_named(
    "methods",
    config.method,
    Method,
    path="config.method",
    model=model,
    total_steps=total_steps,
    batch_size=config.batch_size,
    num_examples=num_examples,
    image_channels=channels,
    num_classes=num_classes,
  )


def by_patch_size(method: Method) -> dict[int, Method]:
  """The method at each of `config.model.patch_sizes`, on the same parameters (FlexiViT, arXiv 2212.08013, section 3.3)."""
  at = lambda patch: dataclasses.replace(method, model=method.model.at_patch(patch))
  return {patch: at(patch) for patch in getattr(method.model, "patch_sizes", ())} or {0: method}


def make_evaluators(config: Config) -> dict[str, Evaluator]:
  """Those of `config.evals`, by name; None leaves one out."""
  return {name: _evaluator(name, fields) for name, fields in config.evals.items() if fields is not None}


def _for_data(evaluators: dict[str, Evaluator], held_out: DataSource) -> dict[str, Evaluator]:
  labeled = held_out.labels is not None and bool(np.any(held_out.labels >= 0))
  return {name: evaluator for name, evaluator in evaluators.items() if not (labeled and evaluator.unlabeled)}


def open_data(config: Config) -> dict[str, DataSource]:
  """The sources "train" and "eval" of `config.data`, all images of them."""
  return opening.open_splits(
    config.data.source,
    split=config.data.split,
    eval_split=config.data.eval_split,
    data_dir=config.data.dir,
    seed=config.seed,
    train_examples=config.data.train_examples,
    eval_examples=config.data.eval_examples,
    image_size=config.data.image_size,
  )


def on_other_data(run: Run, config: Config) -> Run:
  """The same method and state, evaluated on the data and by the evaluators of `config`; it cannot be trained.

  Raises:
    UserError: the data cannot be opened, or have other channels than the images of `run`.
  """
  evaluators, sources = make_evaluators(config), open_data(config)
  evaluators = _for_data(evaluators, sources["eval"])
  sources["train"] = labeled_subset(sources["train"], config.data)
  for source in sources.values():
    if source.channels != run.method.image_channels:
      has, expected = f"{source.channels} channel{'s' * (source.channels > 1)}", run.method.image_channels
      where = f"config.data.source={config.data.source!r}: {source.describe()['name']}"
      raise UserError(f"{where} has {has}, the checkpoint is for images of {expected}.")
  return dataclasses.replace(run, config=config, sources=sources, evaluators=evaluators, own_data=False)


def make_run(config: Config, *, devices: Sequence[jax.Device] | None = None) -> Run:
  """Opens the data, builds every part and checks that they fit, before anything is computed."""
  mesh = sharding.make_mesh(config.mesh, batch_size=config.batch_size, devices=devices)
  if config.optim.accumulate < 1 or config.batch_size % (config.optim.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]):
    raise UserError(f"config.optim.accumulate={config.optim.accumulate}: must divide the batch of each device ({config.batch_size} over all).")
  check_accumulation(make_method(config, channels=0), config.optim.accumulate)  # config errors before any data is opened
  evaluators, sources = make_evaluators(config), open_data(config)
  evaluators = _for_data(evaluators, sources["eval"])
  known = sources["train"].labels
  num_classes = int(np.max(known)) + 1 if known is not None and len(known) else 0  # also of classes that no chosen image has
  train = sources["train"] = labeled_subset(sources["train"], config.data)
  examples = len(train)
  total_steps = config.total.steps(batch_size=config.batch_size, examples=examples)
  if total_steps < 1:
    raise UserError(f"config.total={config.total}: nothing to train.")
  method = make_method(
    config,
    total_steps=total_steps,
    num_examples=examples,
    channels=train.channels,
    num_classes=num_classes,
  )
  check_views(method)
  pipelines = {
    name: make_pipeline(config, sources[inputs.source], inputs, mesh=mesh, stream=name) for name, inputs in as_streams(method.inputs()).items()
  }
  shapes = batch_shapes(method, pipelines)
  params, extra = jax.eval_shape(functools.partial(_init, method, shapes), jax.random.key(0))
  optimizer = make_optimizer(
    config.optim,
    params=params,
    rules=method.param_rules(),
    total_steps=total_steps,
    batch_size=config.batch_size,
    examples=examples,
    freeze_backbone=config.init_from.freeze_backbone if config.init_from else None,
  )
  abstract = jax.eval_shape(lambda p, e: _new_state(optimizer, p, e), params, extra)
  shardings = sharding.state_shardings(mesh, abstract, config.mesh, row_sharded=method.row_sharded)
  abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
  return Run(
    config=config,
    method=method,
    methods=by_patch_size(method),
    mesh=mesh,
    sources=sources,
    pipelines=pipelines,
    evaluators=evaluators,
    optimizer=optimizer,
    total_steps=total_steps,
    examples=examples,
    batch_shapes=shapes,
    abstract_state=abstract,
  )


def keep_compiled() -> None:
  """Compiled functions outlive the process, in JAX_COMPILATION_CACHE_DIR or ~/.cache/big_ssl/jax."""
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/big_ssl/jax"))
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_pipeline(config: Config, source: DataSource, inputs: Any, *, mesh: Mesh, stream: str = "", batch_size: int = 0) -> Pipeline:
  """A pipeline over this process's rows of the global batch."""
  size = batch_size or inputs.batch_size or config.batch_size
  per_device = mesh.shape["data"] * mesh.shape["fsdp"]
  if size % per_device:
    field = "config.method.classes_per_step x images_per_class" if inputs.batch_size else "config.batch_size"
    raise UserError(f"{field}={size}: must be divisible by the {per_device} devices of the data and fsdp axes.")
  shards = [v.packing.shard_size for v in inputs.views if v.packing]
  if any(size // per_device % shard for shard in shards):
    raise UserError(f"config.method.shard_size={shards[0]}: must divide the {size // per_device} images of each device.")
  largest = max(max(v.shape) for v in inputs.views)
  crop = "device" if shards else config.data.crop  # sizes of packed crops are known once all of a shard are decoded
  if crop == "auto":
    crop = "host" if jax.default_backend() == "cpu" and source.images is None else "device"
  return Pipeline(
    source,
    inputs,
    stream=stream,
    batch_size=size,
    seed=config.seed,
    rows=sharding.local_rows(mesh, size),
    canvas=config.data.canvas or int(-(-2.3 * largest // 32) * 32),
    crop=crop,
    threads=config.data.threads,
    prefetch=config.data.prefetch,
  )
