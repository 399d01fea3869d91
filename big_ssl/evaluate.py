"""Features of whole data sets, and the evaluators on them, in or outside training."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from big_ssl import __version__
from big_ssl.augment.apply import augment_views
from big_ssl.core import sharding
from big_ssl.core.method import Inputs, Method, Sequential, Trunk, View, as_streams
from big_ssl.core.step import make_features, prepare
from big_ssl.core.types import Array, Extra, Params, PyTree, TrainState, UserError, nearest
from big_ssl.data import davis
from big_ssl.data.clips import Clip
from big_ssl.data.opening import open_folder
from big_ssl.data.pipeline import Pipeline
from big_ssl.data.source import DataSource
from big_ssl.evals.base import Crop, Features, Output, Report, seen
from big_ssl.feature_cache import FeatureCache, MemoryCache, Stored, key_of, output_name
from big_ssl.models import dense
from big_ssl.ops.fingerprint import fingerprint
from big_ssl.setup import Run, make_pipeline


class Extractor:
  """Features under the method's evaluation view, for the current weights or the random initialization.

  Features that do not depend on the training (pixels, random weights) are computed once. The others are remembered until
  `state` is another one.

  Args:
    run: whose method, data and evaluation view are used.
    kept: where features are read and kept beyond this process.
    memory_bytes: of the features of one state that are remembered.
  """

  def __init__(self, run: Run, *, kept: FeatureCache | None = None, memory_bytes: int = 8 * 2**30):
    self._run = run
    self._kept = kept
    self._current = MemoryCache(max_bytes=memory_bytes)
    self._fingerprints: dict[str, str] = {}
    self._constant: dict[tuple[str, Output, str], Features] = {}
    self._random: TrainState | None = None
    self._resident: dict[str, Any] = {}
    self._functions: dict[Any, Any] = {}
    self._folders: dict[str, DataSource] = {}
    self._state: TrainState | None = None

  @property
  def state(self) -> TrainState | None:
    """The weights that are "current"."""
    return self._state

  @state.setter
  def state(self, state: TrainState | None) -> None:
    if state is not self._state:
      self.forget()
    self._state = state

  def forget(self) -> None:
    """Drops what is remembered of the current weights."""
    self._current.clear()
    self._fingerprints.pop("current", None)

  def __call__(
    self, split: str, *, output: Output = "pooled", weights: str = "current", crop: Crop | None = None
  ) -> Features:
    """Args: split: "train" or "eval"; output: a key of `Method.features`, a function of the trunk, or "pixels"; weights:
    "current" or "random"; crop: instead of the evaluation view's, and nothing is remembered."""
    if crop is not None:
      return self._labeled_rows(split, self._compute(split, output, self._weights(weights), crop))
    key = (split, output, weights)
    if key in self._constant:
      return self._constant[key]
    found = self._current.get(key)
    if found is None:
      found = self._labeled_rows(split, self._stored(split, output, weights))
      if weights == "random" or output == "pixels":
        self._constant[key] = found
      else:
        self._current.put(key, found)
    return found

  def images(self, split: str) -> DataSource:
    return self._run.sources[split]

  @property
  def stride(self) -> tuple[int, int]:
    return dense.stride(self._run.method.model)

  @property
  def size(self) -> tuple[int, int]:
    return self._run.method.eval_view().shape

  def folder(self, path: str, *, field: str) -> DataSource:
    """`evals.base.Extract.folder`; read with the channels of the training images, and listed once."""
    if path not in self._folders:
      self._folders[path] = open_folder(path, channels=self._run.sources["train"].channels, field=field)
    return self._folders[path]

  def clips(self, path: str = "", *, field: str) -> Sequence[Clip]:
    """`evals.base.Extract.clips`."""
    return davis.open_clips(path, channels=self._run.sources["train"].channels, field=field) if path else self._run.sources["eval"].clips

  def apply(self, function: Callable[[Trunk, Array], PyTree], images: np.ndarray, *, weights: str = "current") -> PyTree:
    """`evals.base.Extract.apply`: the rows are spread over the devices, and gathered."""
    run, count = self._run, len(images)
    state = self._weights(weights)
    if function not in self._functions:
      self._functions[function] = jax.jit(functools.partial(_on_trunk, run.method, function))
    padded = np.concatenate([images, np.zeros((-count % run.mesh.size, *images.shape[1:]), images.dtype)])
    place = jax.sharding.NamedSharding(run.mesh, sharding.BATCH)
    placed = jax.make_array_from_callback(padded.shape, place, lambda rows: padded[rows])
    with jax.set_mesh(run.mesh):
      out = self._functions[function](state.params, state.extra, placed)
    return jax.tree.map(lambda x: _gather(x)[:count], out)

  def over_training_set(
    self,
    state: TrainState,
    function: Callable[[Params, Extra, dict[str, Array]], Array],
    *,
    views: tuple[View, ...] = (),
    rng: Array | None = None,
    split: str = "train",
  ) -> np.ndarray:
    """`core.method.Extract`: the outputs of `function` for every image of `split`, in the order of the source."""
    run, drawn = self._run, bool(views)
    views = views or (run.method.eval_view(),)
    inputs = Inputs(views=views, sampler=Sequential())
    if (function, views) not in self._functions:
      self._functions[function, views] = jax.jit(
        lambda params, extra, raw, resident, key: function(params, extra, prepare(inputs, raw, resident, key))
      )
    # Boxes are drawn by the name of the stream: others at every refresh.
    stream = f"refresh/{int(state.step)}" if drawn else f"eval/{split}"
    pipeline = make_pipeline(run.config, run.sources[split], inputs, mesh=run.mesh, stream=stream)
    resident = self._placed(split, pipeline)
    key = jax.random.key(0) if rng is None else rng
    rows = []
    with jax.set_mesh(run.mesh):
      for i, raw in pipeline.iterate(0, self._steps(split)):
        step_key = jax.random.fold_in(key, i)
        rows.append(_gather(self._functions[function, views](state.params, state.extra, sharding.make_global(run.mesh, raw), resident, step_key)))
    return np.concatenate(rows)[: len(run.sources[split])]

  def _weights(self, weights: str) -> TrainState:
    if weights != "random":
      return self.state
    if self._random is None:
      self._random = self._run.initial_state()
    return self._random

  def _pipeline(self, split: str, crop: Crop | None) -> Pipeline:
    run, inputs = self._run, Inputs(views=(self._view(crop),), source=split, sampler=Sequential())
    # Boxes are drawn by the name of the stream.
    stream = f"eval/{split}" + (f"/crop {crop.seed} {crop.epoch}" if crop else "")
    return make_pipeline(run.config, run.sources[split], inputs, mesh=run.mesh, stream=stream)

  def _view(self, crop: Crop | None) -> View:
    view = self._run.method.eval_view()
    return crop.of(view) if crop else view

  def _placed(self, split: str, pipeline: Pipeline) -> Any:
    """The images of an in-memory source on the devices, once; None for others."""
    if pipeline.resident is not None and split not in self._resident:
      streams = as_streams(self._run.method.inputs())
      trained_on = self._run.resident if self._run.own_data else {}
      there = [images for name, images in trained_on.items() if streams[name].source == split]
      self._resident[split] = there[0] if there else sharding.replicate(self._run.mesh, pipeline.resident)
    return self._resident.get(split)

  def _steps(self, split: str) -> int:
    return -(-len(self._run.sources[split]) // self._run.config.batch_size)

  def _forward(self, output: Output, view: View) -> Callable:
    """The compiled outputs of the evaluation view, or of a crop of its kind, by name."""
    view = dataclasses.replace(view, place=(0.5, 0.5), flip=0.5)  # where crops lie is the host's to know
    key = (None if isinstance(output, str) else output, view)
    if key not in self._functions:
      inputs = Inputs(views=(view,))

      def forward(params: Params, extra: Extra, raw: dict[str, Array], resident: Array | None) -> dict[str, Array]:
        images = prepare(inputs, raw, resident, jax.random.key(0))["image"][:, 0]
        return {str(output): output(self._run.method.trunk(params, extra), images)}

      self._functions[key] = jax.jit(make_features(self._run.method, view) if isinstance(output, str) else forward)
    return self._functions[key]

  def _stored(self, split: str, output: Output, weights: str) -> Stored:
    """From the files that are kept where every process has them, else computed, and kept."""
    compute = lambda: self._compute(split, output, self._weights(weights))
    key = self._key(split, output, weights)
    if self._kept is None or key is None:
      return compute()
    owner = self._owner("pixels" if output == "pixels" else weights)
    found = self._kept.load(owner=owner, key=key)
    if not _on_every_process(found is not None):
      found = compute()
      self._kept.save(found, owner=owner, key=key)
    return found

  def _key(self, split: str, output: Output, weights: str) -> str | None:
    """Names all that the features depend on besides the weights; None where something of it has no lasting name."""
    run, data, name = self._run, self._run.sources[split].describe(), output_name(output)
    if not data["hash"] or name is None:
      return None
    config = {"method": run.config.method, "model": run.config.model, "canvas": run.config.data.canvas, "crop": run.config.data.crop}
    where = {"version": __version__, "backend": jax.default_backend()}
    return key_of(where | config | {"data": data, "view": repr(run.method.eval_view()), "output": name, "weights": weights})

  def _owner(self, weights: str) -> str:
    """Names the weights; "pixels" need none."""
    if weights == "pixels":
      return weights
    state = self._weights(weights)
    if weights not in self._fingerprints:
      self._fingerprints[weights] = fingerprint((state.params, state.extra), mesh=self._run.mesh)
    return f"random-{self._fingerprints[weights]}" if weights == "random" else f"step{int(state.step)}-{self._fingerprints[weights]}"

  def _compute(self, split: str, output: Output, state: TrainState, crop: Crop | None = None) -> Stored:
    run, name, forward = self._run, str(output), self._forward(output, self._view(crop))
    pipeline = self._pipeline(split, crop)
    rows, indices, valids = [], [], []
    with jax.set_mesh(run.mesh):
      resident = self._placed(split, pipeline)
      for _, raw in pipeline.iterate(0, self._steps(split)):
        out = forward(state.params, state.extra, sharding.make_global(run.mesh, raw), resident)
        if name not in out:
          known = ", ".join(sorted(out))
          raise UserError(f"config.evals: output={name!r} is none of config.method.name={run.config.method['name']}.{nearest(name, out)} It has {known}.")
        rows.append(_gather(out[name]))
        indices.append(_gather_rows(raw["index"]))
        valids.append(_gather_rows(raw["valid"]))
    valid, index = np.concatenate(valids), np.concatenate(indices)
    found = np.concatenate(rows)[valid].astype(np.float32)
    return Stored(found.reshape(len(found), -1), index[valid], found.shape[1:])

  def _labeled_rows(self, split: str, stored: Stored) -> Features:
    source = self._run.sources[split]
    return Features(
      features=stored.features,
      shape=stored.shape,
      labels=None if source.labels is None else np.asarray(source.labels)[stored.index].astype(np.int32),
      index=stored.index,
      source=f"{source.describe()['name']} ({seen(self._run.method.eval_view())})",
      used_in_training=self._labeled(split, stored.index),
    )

  def _labeled(self, split: str, index: np.ndarray) -> np.ndarray | None:
    """Which of these images are in a class-balanced stream of the method; None where it has none."""
    if not self._run.own_data:
      return None
    streams = as_streams(self._run.method.inputs())
    rows = [p.labeled for name, p in self._run.pipelines.items() if streams[name].source == split and p.labeled is not None]
    return np.isin(index, np.concatenate(rows)) if rows else None


def keeping_extractor(run: Run, workdir: pathlib.Path, *, notice: Callable[[str], None]) -> Extractor:
  """An extractor that reads and keeps features in `<workdir>/features`, up to config.checkpoint.features_gib."""
  limit = int(run.config.checkpoint.features_gib * 2**30)
  write = jax.process_index() == 0
  return Extractor(run, kept=FeatureCache(workdir / "features", max_bytes=limit, notice=notice, write=write) if limit else None)


def _on_trunk(method: Method, function: Callable[[Trunk, Array], PyTree], params: Params, extra: Extra, images: Array) -> PyTree:
  view = dataclasses.replace(method.eval_view(), size=images.shape[1:3])
  cut = {view.name: images[:, None]}
  normalized = augment_views((view,), cut, jax.random.key(0), row=jnp.arange(len(images)))[view.name][:, 0]
  return function(method.trunk(params, extra), normalized)


def refresh(run: Run, extract: Extractor, state: TrainState) -> tuple[TrainState, dict[str, float]]:
  """The method's refresh at the current step, its result placed as the state was; names of its numbers get "refresh/"."""
  key = jax.random.fold_in(jax.random.key(run.config.seed), state.step)
  with jax.set_mesh(run.mesh):
    new, metrics = run.method.refresh(state, extract.over_training_set, jax.random.fold_in(key, 1))
    new = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), new, run.abstract_state)
  return new, {f"refresh/{k}": float(v) for k, v in metrics.items()}


def _gather(x: jax.Array) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(x, tiled=True)) if jax.process_count() > 1 else np.asarray(x)


def _on_every_process(condition: bool) -> bool:
  """All processes take the same branch: some may not see the files of others."""
  return bool(np.all(_gather_rows(np.array([condition]))))


def _gather_rows(x: np.ndarray) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(x, tiled=True)) if jax.process_count() > 1 else x


def foreign_classes(run: Run) -> str:
  """Says that no held-out image is of a training class, where labels are there and this is why none counts; else ""."""
  held, train = run.sources["eval"], run.sources["train"]
  if held.labels is None or not len(held) or np.any(held.labels >= 0) or not train.class_names:
    return ""
  known = ", ".join(train.class_names[:3])
  return f"none of the {len(held)} held-out images, such as {held.name(0)}, is in a folder of a training class ({known}, ...)"


def evaluate(run: Run, extract: Extractor, state: TrainState, *, names: list[str], logger: Any, step: int) -> list[str]:
  """Runs the named evaluators on `state` and logs each with its protocol; features stay remembered (`Extractor.forget`).

  One that refuses the data ends neither the others nor a training: that is its protocol, and a warning.

  Returns:
    What was refused, in words.
  """
  extract.state = state
  refused = []
  for name in names:
    try:
      report = run.evaluators[name](extract, mesh=run.mesh)
    except UserError as error:
      said = str(error).replace("config.evals:", f"config.evals.{name}:", 1)
      report = Report({}, f"not computed: {said}")
      refused.append(said)
      logger.warning(said)
    logger.log_eval(step, name, report.metrics, report.protocol)
    if not report.metrics and (why := foreign_classes(run)):
      logger.warning(f"config.evals.{name}: {why}")
  return refused


def extract_to(directory: pathlib.Path, run: Run, extract: Extractor, state: TrainState) -> list[pathlib.Path]:
  """Writes features_<split>.npz (features, labels, index) for both splits, each in one move.

  Raises:
    UserError: a file cannot be written, as on a full disk.
  """
  extract.state = state
  files = []
  for split in ("train", "eval"):
    out = extract(split)
    file = directory / f"features_{split}.npz"
    if jax.process_index() == 0:
      temporary = file.with_suffix(".tmp")
      try:
        with temporary.open("wb") as f:
          np.savez(f, features=out.features, index=out.index, **({} if out.labels is None else {"labels": out.labels}))
        temporary.replace(file)
      except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written: {error.strerror or error}.") from None
    files.append(file)
  return files
