"""Features of whole data sets, and the evaluators on them, in or outside training."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from big_ssl.augment.apply import augment_views
from big_ssl.core import sharding
from big_ssl.core.method import Inputs, Method, Sequential, Trunk, View, as_streams
from big_ssl.core.step import make_features, prepare
from big_ssl.core.types import Array, Extra, Params, PyTree, TrainState
from big_ssl.data.pipeline import Pipeline
from big_ssl.data.source import DataSource
from big_ssl.evals.base import Features
from big_ssl.setup import Run, make_pipeline


class Extractor:
  """Features under the method's evaluation view, for the current weights or the random initialization.

  Features that do not depend on the training (pixels, random weights) are computed once.
  """

  def __init__(self, run: Run):
    self._run = run
    self._features = jax.jit(make_features(run.method), static_argnames=())
    self._constant: dict[tuple[str, str, str], Features] = {}
    self._random: TrainState | None = None
    self._pipelines: dict[str, Pipeline] = {}
    self._resident: dict[str, Any] = {}
    self._functions: dict[Any, Any] = {}
    self.state: TrainState | None = None

  def __call__(self, split: str, *, output: str = "pooled", weights: str = "current") -> Features:
    """Args: split: "train" or "eval"; output: a key of `Method.features`, or "pixels"; weights: "current" or "random"."""
    key = (split, output, weights)
    if key in self._constant:
      return self._constant[key]
    features = self._compute(split, output, self._random_state() if weights == "random" else self.state)
    if weights == "random" or output == "pixels":
      self._constant[key] = features
    return features

  def images(self, split: str) -> DataSource:
    return self._run.sources[split]

  def apply(self, function: Callable[[Trunk, Array], PyTree], images: np.ndarray, *, weights: str = "current") -> PyTree:
    """`evals.base.Extract.apply`: the rows are spread over the devices, and gathered."""
    run, count = self._run, len(images)
    state = self._random_state() if weights == "random" else self.state
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
  ) -> np.ndarray:
    """`core.method.Extract`: the outputs of `function` for every training image, in the order of the source."""
    run, drawn = self._run, bool(views)
    views = views or (run.method.eval_view(),)
    inputs = Inputs(views=views, sampler=Sequential())
    if (function, views) not in self._functions:
      self._functions[function, views] = jax.jit(
        lambda params, extra, raw, resident, key: function(params, extra, prepare(inputs, raw, resident, key))
      )
    # Boxes are drawn by the name of the stream: others at every refresh.
    stream = f"refresh/{int(state.step)}" if drawn else "eval/train"
    pipeline = make_pipeline(run.config, run.sources["train"], inputs, mesh=run.mesh, stream=stream)
    resident = self._placed("train", pipeline)
    key = jax.random.key(0) if rng is None else rng
    rows = []
    with jax.set_mesh(run.mesh):
      for i, raw in pipeline.iterate(0, self._steps("train")):
        step_key = jax.random.fold_in(key, i)
        rows.append(_gather(self._functions[function, views](state.params, state.extra, sharding.make_global(run.mesh, raw), resident, step_key)))
    return np.concatenate(rows)[: len(run.sources["train"])]

  def _random_state(self) -> TrainState:
    if self._random is None:
      self._random = self._run.initial_state()
    return self._random

  def _pipeline(self, split: str) -> Pipeline:
    if split not in self._pipelines:
      run = self._run
      inputs = Inputs(views=(run.method.eval_view(),), source=split, sampler=Sequential())
      pipeline = make_pipeline(run.config, run.sources[split], inputs, mesh=run.mesh, stream=f"eval/{split}")
      self._pipelines[split] = pipeline
    return self._pipelines[split]

  def _placed(self, split: str, pipeline: Pipeline) -> Any:
    """The images of an in-memory source on the devices, once; None for others."""
    if pipeline.resident is not None and split not in self._resident:
      streams = as_streams(self._run.method.inputs())
      there = [images for name, images in self._run.resident.items() if streams[name].source == split]
      self._resident[split] = there[0] if there else sharding.replicate(self._run.mesh, pipeline.resident)
    return self._resident.get(split)

  def _steps(self, split: str) -> int:
    return -(-len(self._run.sources[split]) // self._run.config.batch_size)

  def batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
    """This process's raw rows of `split`, in order; "valid" marks the rows that count."""
    pipeline = self._pipeline(split)
    for _, raw in pipeline.iterate(0, self._steps(split)):
      yield raw

  def _compute(self, split: str, output: str, state: TrainState) -> Features:
    run = self._run
    rows, indices, valids = [], [], []
    with jax.set_mesh(run.mesh):
      for raw in self.batches(split):
        resident = self._placed(split, self._pipeline(split))
        out = self._features(state.params, state.extra, sharding.make_global(run.mesh, raw), resident)
        if output not in out:
          raise KeyError(f"{type(run.method).__name__} has no output '{output}'; it has {', '.join(sorted(out))}")
        rows.append(_gather(out[output]))
        indices.append(_gather_rows(raw["index"]))
        valids.append(_gather_rows(raw["valid"]))
    valid, index = np.concatenate(valids), np.concatenate(indices)
    labels = run.sources[split].labels
    return Features(
      features=np.concatenate(rows)[valid].astype(np.float32),
      labels=None if labels is None else np.asarray(labels)[index[valid]].astype(np.int32),
      index=index[valid],
      source=run.sources[split].describe()["name"],
      used_in_training=self._labeled(split, index[valid]),
    )

  def _labeled(self, split: str, index: np.ndarray) -> np.ndarray | None:
    """Which of these images are in a class-balanced stream of the method; None where it has none."""
    streams = as_streams(self._run.method.inputs())
    rows = [p.labeled for name, p in self._run.pipelines.items() if streams[name].source == split and p.labeled is not None]
    return np.isin(index, np.concatenate(rows)) if rows else None


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


def _gather_rows(x: np.ndarray) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(x, tiled=True)) if jax.process_count() > 1 else x


def evaluate(run: Run, extract: Extractor, state: TrainState, *, names: list[str], logger: Any, step: int) -> dict[str, float]:
  """Runs the named evaluators on `state` and logs each with its protocol."""
  extract.state = state
  results = {}
  for name in names:
    report = run.evaluators[name](extract, mesh=run.mesh)
    logger.log_eval(step, name, report.metrics, report.protocol)
    results |= {f"{name}/{k}": v for k, v in report.metrics.items()}
  return results


def extract_to(directory: pathlib.Path, run: Run, extract: Extractor, state: TrainState) -> list[pathlib.Path]:
  """Writes features_<split>.npz (features, labels, index) for both splits."""
  extract.state = state
  files = []
  for split in ("train", "eval"):
    out = extract(split)
    file = directory / f"features_{split}.npz"
    if jax.process_index() == 0:
      np.savez(file, features=out.features, index=out.index, **({} if out.labels is None else {"labels": out.labels}))
    files.append(file)
  return files
