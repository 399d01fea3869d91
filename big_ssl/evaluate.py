"""Features of whole data sets, and the evaluators on them, in or outside training."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from big_ssl.core import sharding
from big_ssl.core.method import Inputs, Sequential
from big_ssl.core.step import make_features
from big_ssl.core.types import TrainState
from big_ssl.data.pipeline import Pipeline
from big_ssl.evals.base import Features
from big_ssl.setup import Run, make_pipeline


class Extractor:
  """Features under the method's evaluation view, for the current weights or the random initialisation.

  Features that do not depend on the training (pixels, random weights) are computed once.
  """

  def __init__(self, run: Run):
    self._run = run
    self._features = jax.jit(make_features(run.method), static_argnames=())
    self._constant: dict[tuple[str, str, str], Features] = {}
    self._random: TrainState | None = None
    self._pipelines: dict[str, Pipeline] = {}
    self._resident: dict[str, Any] = {}
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
      if pipeline.resident is not None:
        train = run.resident.get("") if split == "train" else None
        self._resident[split] = train if train is not None else sharding.replicate(run.mesh, pipeline.resident)
    return self._pipelines[split]

  def batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
    """This process's raw rows of `split`, in order; "valid" marks the rows that count."""
    pipeline = self._pipeline(split)
    steps = -(-len(self._run.sources[split]) // self._run.config.batch_size)
    for _, raw in pipeline.iterate(0, steps):
      yield raw

  def _compute(self, split: str, output: str, state: TrainState) -> Features:
    run = self._run
    rows, indices, valids = [], [], []
    with jax.set_mesh(run.mesh):
      for raw in self.batches(split):
        out = self._features(state.params, state.extra, sharding.make_global(run.mesh, raw), self._resident.get(split))
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
    )


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
