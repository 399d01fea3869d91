"""Fits the linear probe of segmentation on cached maps of features, at several learning rates at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from big_ssl.core import schedules
from big_ssl.core.types import Array, PyTree
from big_ssl.losses.classify import cross_entropy
from big_ssl.models.segmentation_heads import ProbeHead
from big_ssl.ops.segmentation import bilinear

_WARMUP = 1500 / 40000  # of the steps, as in dinov3's recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """AdamW with warm-up and a cosine to 0 (dinov3, public code: 40,000 steps of 16 images, lr 1e-3, decay 1e-3).

  Attributes:
    classes: number of classes.
    steps, batch_size: updates, and images of one.
    lrs: learning rates, each of which trains a head of its own on the same batches.
    weight_decay: decoupled, on every parameter.
    dropout: rate of the head's.
  """

  classes: int
  steps: int
  batch_size: int
  lrs: tuple[float, ...]
  weight_decay: float = 1e-3
  dropout: float = 0.1

  @property
  def head(self) -> ProbeHead:
    return ProbeHead(self.classes, self.dropout)


def upsampled(logits: Array, *, padded: tuple[int, int], shape: tuple[int, int]) -> Array:
  """Logits [..., h, w, C] of an image that was padded at the bottom and right to `padded` pixels, at its own `shape`."""
  return bilinear(logits, shape=padded)[..., : shape[0], : shape[1], :]


def fit(maps: np.ndarray, *, labels: np.ndarray, padded: tuple[int, int], recipe: Recipe) -> PyTree:
  """The heads of all learning rates, {"params", "batch_stats"} with a leading axis for these.

  Args:
    maps: [N, h, w, D] features.
    labels: [N, H, W] classes, -1 is ignored; the loss is at this size.
    padded: height and width in pixels of what the maps cover.
  """
  rng = np.random.default_rng(0)
  batch = min(recipe.batch_size, len(maps))
  epochs = [rng.permutation(len(maps)) for _ in range(-(-recipe.steps * batch // len(maps)))]
  order = np.concatenate(epochs)[: recipe.steps * batch].reshape(recipe.steps, batch)
  start = recipe.head.init(jax.random.key(0), jnp.zeros((1, *maps.shape[1:])), train=False)
  return _fit(start, jnp.asarray(maps), jnp.asarray(labels), order, padded=padded, recipe=recipe)


@functools.partial(jax.jit, static_argnames=("padded", "recipe"))
def _fit(start: PyTree, maps: Array, labels: Array, order: Array, *, padded: tuple[int, int], recipe: Recipe) -> PyTree:
  optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(recipe.weight_decay))
  warmup = round(_WARMUP * recipe.steps)
  curve = functools.partial(schedules.warmup_cosine, start=1e-6, peak=1.0, final=0.0, warmup=warmup, total=recipe.steps)

  def loss(params: PyTree, stats: PyTree, x: Array, y: Array, key: Array) -> Any:
    variables = {"params": params, "batch_stats": stats}
    logits, new = recipe.head.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    full = upsampled(logits, padded=padded, shape=y.shape[1:])
    return cross_entropy(full.reshape(-1, recipe.classes), labels=y.ravel()), new["batch_stats"]

  def update(params: PyTree, stats: PyTree, moments: PyTree, lr: Array, x: Array, y: Array, key: Array) -> Any:
    grads, stats = jax.grad(loss, has_aux=True)(params, stats, x, y, key)
    direction, moments = optimizer.update(grads, moments, params)
    return jax.tree.map(lambda p, d: p - lr * d, params, direction), stats, moments

  def step(carry: Any, item: Any) -> Any:
    rows, number = item
    x, y = maps[rows].astype(jnp.float32), labels[rows].astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(1), number)
    lrs = jnp.asarray(recipe.lrs) * curve(number)
    return jax.vmap(update, in_axes=(0, 0, 0, 0, None, None, None))(*carry, lrs, x, y, key), None

  repeat = lambda tree: jax.tree.map(lambda v: jnp.broadcast_to(v, (len(recipe.lrs), *v.shape)), tree)
  first = (start["params"], start["batch_stats"], optimizer.init(start["params"]))
  (params, stats, _), _ = jax.lax.scan(step, repeat(first), (order, jnp.arange(recipe.steps)))
  return {"params": params, "batch_stats": stats}


@functools.partial(jax.jit, static_argnames=("recipe",))
def apply(variables: PyTree, maps: Array, *, recipe: Recipe) -> Array:
  """Logits [N, h, w, C] of one head on [N, h, w, D]."""
  return recipe.head.apply(variables, maps.astype(jnp.float32), train=False)


@functools.partial(jax.jit, static_argnames=("padded", "shape", "recipe"))
def predict(heads: PyTree, maps: Array, *, padded: tuple[int, int], shape: tuple[int, int], recipe: Recipe) -> Array:
  """Classes [L, N, H, W] by the head of each learning rate."""
  return jax.vmap(lambda v: jnp.argmax(upsampled(apply(v, maps, recipe=recipe), padded=padded, shape=shape), -1))(heads)
