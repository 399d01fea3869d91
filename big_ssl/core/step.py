"""The training step: views are cut and augmented, the loss differentiated, the update applied; one jitted function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_ssl.augment import apply as augment
from big_ssl.augment import resample
from big_ssl.core.health import first_nonfinite
from big_ssl.core.method import Inputs, Method, View, as_streams
from big_ssl.core.optim import Optimizer
from big_ssl.core.types import Array, Metrics, PyTree, TrainState, UserError


def prepare(inputs: Inputs, raw: dict[str, Array], resident: Array | None, key: Array) -> dict[str, Array]:
  """One stream's raw batch (canvas or resident images, boxes, flips) to augmented views.

  Args:
    inputs: the stream's views.
    raw: as `data.pipeline.Pipeline` yields it, B rows.
    resident: uint8 [N, H, W, C] images that live on the device, or None.
    key: augmentation key of this step.

  Returns:
    {view.name: [B, count, h, w, C] float32, "index": [B], other keys}; for views with `return_box` also view.name +
    "_box" [B, count, 4], view.name + "_flip" [B, count] and "size" [B, 2].
  """
  names = {v.name for v in inputs.views}
  plans = {v.name: {k.split("/")[-1]: x for k, x in raw.items() if k.startswith(f"{v.name}/plan/")} for v in inputs.views if v.packing}
  batch = {k: v for k, v in raw.items() if k.split("/")[0] not in names and k not in ("canvas", "size")}
  canvas = raw.get("canvas")
  if canvas is None and resident is not None:
    canvas = jnp.take(resident, raw["index"], axis=0)
  cut = {}
  for view in inputs.views:
    pixels = raw.get(f"{view.name}/pixels")
    if pixels is not None:
      cut[view.name] = pixels.astype(jnp.float32) / jnp.iinfo(pixels.dtype).max
    else:
      boxes, flips = raw[f"{view.name}/box"], raw[f"{view.name}/flip"]
      whole = view.crop in ("center", "scaled")  # the filter reads around the crop, as "resize, then cut" does
      sizes = _sizes(raw, canvas) if whole else None
      kwargs = {"interpolation": view.interpolation, "antialias": view.antialias}
      extent = plans[view.name]["extent"][:, None] * view.packing.patch if view.packing else None
      cut[view.name] = resample.cut(canvas, boxes, flips, size=view.shape, sizes=sizes, extent=extent, **kwargs)
    if view.return_box:
      batch["size"] = _sizes(raw, canvas)
      batch[f"{view.name}_box"] = _normalized(raw[f"{view.name}/box"], batch["size"])
      batch[f"{view.name}_flip"] = raw[f"{view.name}/flip"]
  rows = jnp.arange(raw["index"].shape[0])
  batch |= {f"{name}_plan": plan for name, plan in plans.items()}
  return batch | augment.augment_views(inputs.views, cut, key, row=rows)


def _sizes(raw: dict[str, Array], canvas: Array | None) -> Array:
  """Height and width [B, 2] of each image; resident images fill their canvas."""
  if "size" in raw:
    return raw["size"].astype(jnp.float32)
  return jnp.broadcast_to(jnp.array(canvas.shape[1:3], jnp.float32), (raw["index"].shape[0], 2))


def _normalized(box: Array, sizes: Array) -> Array:
  """Pixel boxes y0, x0, h, w [B, V, 4] to y0, x0, y1, x1 as shares of the image's height and width."""
  scale = jnp.concatenate([sizes, sizes], axis=-1)[:, None]
  start, extent = box[..., :2], box[..., 2:]
  return jnp.concatenate([start, start + extent], axis=-1) / scale


def prepare_streams(method: Method, raw: dict[str, Any], resident: dict[str, Array | None], key: Array) -> dict[str, Any]:
  """All streams of a method; a single stream is not nested."""
  streams = as_streams(method.inputs())
  batches = {
    name: prepare(inputs, raw[name], resident.get(name), jax.random.fold_in(key, i))
    for i, (name, inputs) in enumerate(streams.items())
  }
  return batches[""] if set(batches) == {""} else batches


@dataclasses.dataclass(frozen=True)
class _Gradients:
  grads: PyTree
  extra: PyTree
  metrics: Metrics


def _gradients(method: Method, state: TrainState, batch: PyTree, key: Array, accumulate: int) -> _Gradients:
  loss_fn = jax.value_and_grad(method.loss, has_aux=True)
  if accumulate == 1:
    (loss, (extra, metrics)), grads = loss_fn(state.params, state.extra, batch, key, state.step)
    return _Gradients(grads, extra, metrics | {"loss": loss})
  # Strided microbatches: each takes its rows from every device, so that nothing moves between devices.
  split = jax.tree.map(lambda x: x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

  def body(carry, item):
    grads, extra = carry
    micro, micro_key = item
    (loss, (extra, metrics)), new = loss_fn(state.params, extra, micro, micro_key, state.step)
    return (jax.tree.map(jnp.add, grads, new), extra), metrics | {"loss": loss}

  zeros = jax.tree.map(jnp.zeros_like, state.params)
  (grads, extra), metrics = jax.lax.scan(body, (zeros, state.extra), (split, jax.random.split(key, accumulate)))
  return _Gradients(jax.tree.map(lambda g: g / accumulate, grads), extra, jax.tree.map(jnp.mean, metrics))


def check_accumulation(method: Method, accumulate: int) -> None:
  """Raises `UserError` where microbatches are asked of a method whose loss does not allow them."""
  if accumulate > 1 and not method.supports_accumulation:
    raise UserError(f"config.optim.accumulate={accumulate}: {type(method).__name__} does not allow it: {method.accumulation_reason}.")


def make_step(method: Method, optimizer: Optimizer, *, seed: int, accumulate: int = 1) -> Callable:
  """Returns `step(state, raw, resident) -> (state, metrics)`, to be jitted with the state donated.

  A step whose loss or gradients are not finite changes nothing but the clock: `metrics["skipped"]` is 1, and
  `metrics["nonfinite"]` is the index of the first non-finite gradient tensor (-1: none).

  Raises:
    UserError: accumulation asked of a method whose loss does not allow it.
  """
  check_accumulation(method, accumulate)

  def step(state: TrainState, raw: dict, resident: dict) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    key_augment, key_loss = jax.random.split(key)
    batch = prepare_streams(method, raw, resident, key_augment)
    projected = state.replace(params=method.project(state.params))
    out = _gradients(method, projected, batch, key_loss, accumulate)
    updated = optimizer.apply(projected.params, out.grads, state.opt_state, state.step)
    extra = method.post_update(updated.params, out.extra, state.step)

    nonfinite = first_nonfinite(out.grads)
    finite = jnp.isfinite(out.metrics["loss"]) & (nonfinite < 0)
    new = TrainState(step=state.step, params=updated.params, opt_state=updated.opt_state, extra=extra)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    metrics = out.metrics | updated.metrics
    metrics["grad_norm"] = optax.global_norm(out.grads)
    metrics["skipped"] = 1.0 - finite.astype(jnp.float32)
    metrics["nonfinite"] = nonfinite.astype(jnp.float32)
    return new.replace(step=state.step + 1), metrics

  return step


def make_features(method: Method, view: View | None = None) -> Callable:
  """Returns `features(params, extra, raw, resident) -> {"pooled": [B, D], "pixels": [B, h*w*C], ...}` for evaluation.

  `view`, whose name is "image" too, stands for the evaluation view.
  """
  inputs = Inputs(views=(view or method.eval_view(),))

  def features(params: PyTree, extra: PyTree, raw: dict[str, Array], resident: Array | None) -> dict[str, Array]:
    batch = prepare(inputs, raw, resident, jax.random.key(0))
    out = method.features(params, extra, batch)
    return out | {"pixels": batch["image"].reshape(batch["image"].shape[0], -1)}

  return features
