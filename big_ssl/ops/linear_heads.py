"""Linear classifiers by SGD on features in memory: many heads, each with its learning rate and decay, in one pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from big_ssl.core.types import Array, PyTree

Schedule = Literal["cosine_steps", "cosine_epochs", "milestones", "inverse_sqrt"]
RESIDENT_BYTES = 4 << 30  # features below this stay on the device for the whole training; others come in segments
SEGMENT_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """A head and its optimizer.

  Attributes:
    norm: before the linear map. "layer": LayerNorm (epsilon 1e-5). "batch" and "batch_affine": BN over the images and
      the positions of a channel, with running statistics (momentum 0.1) for the prediction.
    unit: l2-normalize after it.
    momentum, nesterov: of SGD.
    lr_in_buffer: the momentum buffer holds gradients times their learning rate (MSN, arXiv 2204.07141, public code)
      instead of gradients.
    decayed: what the weight decay is of: all, the linear map with its bias, or its matrix alone.
  """

  norm: Literal["none", "layer", "batch", "batch_affine"] = "none"
  unit: bool = False
  momentum: float = 0.9
  nesterov: bool = False
  lr_in_buffer: bool = False
  decayed: Literal["all", "linear", "kernel"] = "all"


def learning_rates(
  lr: np.ndarray,
  *,
  schedule: Schedule,
  steps: int,
  per_epoch: int,
  milestones: tuple[float, ...] = (),
  weight_decay: np.ndarray | float = 0.0,
) -> np.ndarray:
  """[steps, H] float64 learning rates of H heads.

  Args:
    lr: [H], at the start.
    schedule: "cosine_steps": lr (1 + cos(pi t / T)) / 2. "cosine_epochs": the same, held during an epoch. "milestones":
      a tenth after each. "inverse_sqrt": lr / sqrt(1 + lr wd t) (DeepCluster, arXiv 1807.05520, public code).
    steps: T.
    per_epoch: steps of an epoch.
    milestones: shares of T, held to whole epochs.
    weight_decay: [H], of "inverse_sqrt".
  """
  t, lr = np.arange(steps, dtype=np.float64)[:, None], np.asarray(lr, np.float64)[None]
  epoch, epochs = t // per_epoch, steps / per_epoch
  if schedule == "inverse_sqrt":
    return lr / np.sqrt(1 + lr * np.asarray(weight_decay) * t)
  if schedule == "milestones":
    return lr * 0.1 ** sum((epoch >= np.round(m * epochs)).astype(np.float64) for m in milestones)
  share = t / steps if schedule == "cosine_steps" else epoch / epochs
  return lr * 0.5 * (1 + np.cos(np.pi * share))


@dataclasses.dataclass(frozen=True)
class Heads:
  """H heads: each leaf has them as its first axis.

  Attributes:
    params: {"linear": {"kernel": [H, D, K], "bias": [H, K]}, "norm": {"scale", "bias"}}.
    stats: running statistics of BN {"mean", "var": [H, channels]}, or {}.
    buffer: state of the optimizer.
  """

  params: PyTree
  stats: PyTree
  buffer: PyTree


jax.tree_util.register_dataclass(Heads, data_fields=["params", "stats", "buffer"], meta_fields=[])


def init_heads(recipe: Recipe, *, count: int, shape: tuple[int, ...], classes: int, seed: int = 0) -> Heads:
  """`count` equal heads: weights from a normal distribution of deviation 0.01, biases zero.

  Args:
    recipe: of the heads.
    count: H.
    shape: of a row of features, (D,) or (channels, positions).
    classes: K.
    seed: of the weights.
  """
  dims, wide = int(np.prod(shape)), shape[0] if recipe.norm.startswith("batch") else int(np.prod(shape))
  kernel = 0.01 * np.random.default_rng(seed).normal(size=(dims, classes)).astype(np.float32)
  params = {"linear": {"kernel": kernel, "bias": np.zeros(classes, np.float32)}}
  if recipe.norm in ("layer", "batch_affine"):
    params["norm"] = {"scale": np.ones(wide, np.float32), "bias": np.zeros(wide, np.float32)}
  batch = recipe.norm.startswith("batch")
  stats = {"mean": np.zeros(wide, np.float32), "var": np.ones(wide, np.float32)} if batch else {}
  one = Heads(params, stats, _optimizer(recipe, 1.0, 0.0).init(params))
  return jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x)[None], count, axis=0), one)


def logits(recipe: Recipe, params: PyTree, stats: PyTree, x: Array) -> Array:
  """[n, K] of one head in prediction, for features x [n, D] or [n, channels, positions]."""
  return _forward(recipe, params, stats, x, train=False)[0]


def _forward(recipe: Recipe, params: PyTree, stats: PyTree, x: Array, *, train: bool) -> tuple[Array, PyTree]:
  if recipe.norm.startswith("batch"):
    x, stats = _batch_norm(stats, x.reshape(*x.shape[:2], -1), train=train)
    if recipe.norm == "batch_affine":
      x = x * params["norm"]["scale"][:, None] + params["norm"]["bias"][:, None]
  x = x.reshape(len(x), -1)
  if recipe.norm == "layer":
    x = (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
  if recipe.unit:
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  linear = params["linear"]
  return jnp.matmul(x, linear["kernel"], precision=jax.lax.Precision.HIGHEST) + linear["bias"], stats


def _batch_norm(stats: PyTree, x: Array, *, train: bool) -> tuple[Array, PyTree]:
  """x [n, channels, positions] normalized, and the new running statistics, whose variance is the unbiased one."""
  mean, var = stats["mean"], stats["var"]
  if train:
    mean, var = x.mean((0, 2)), x.var((0, 2))
    count = x.shape[0] * x.shape[2]
    new = {"mean": mean, "var": var * count / max(count - 1, 1)}
    stats = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, stats, new)
  return (x - mean[:, None]) / jnp.sqrt(var[:, None] + 1e-5), stats


def _optimizer(recipe: Recipe, lr: Array | float, weight_decay: Array | float) -> optax.GradientTransformation:
  prefix = {"all": (), "linear": ("linear",), "kernel": ("linear", "kernel")}[recipe.decayed]
  covered = lambda path, _: tuple(key.key for key in path)[: len(prefix)] == prefix
  decay = optax.add_decayed_weights(weight_decay, mask=lambda params: jax.tree.map_with_path(covered, params))
  scale, trace = optax.scale(-lr), optax.trace(recipe.momentum, nesterov=recipe.nesterov)
  # The order of the last two does not change the shape of the state, and with a constant rate not the result.
  return optax.chain(decay, scale, trace) if recipe.lr_in_buffer else optax.chain(decay, trace, scale)


@functools.partial(jax.jit, static_argnames=("recipe", "shape"), donate_argnames=("heads",))
def train_segment(
  heads: Heads,
  bank: Array,
  labels: Array,
  rows: Array,
  lr: Array,
  weight_decay: Array,
  *,
  recipe: Recipe,
  shape: tuple[int, ...],
) -> tuple[Heads, Array]:
  """Some updates of all heads on the same batches.

  Args:
    heads: H heads.
    bank: [N, D] features.
    labels: [N].
    rows: [S, B] rows of the bank, a batch for each of S updates.
    lr: [S, H].
    weight_decay: [H].
    recipe: of the heads.
    shape: of a row of features.

  Returns:
    The heads, and the losses [S, H] before each update.
  """

  def update(heads: Heads, item: tuple[Array, Array]) -> tuple[Heads, Array]:
    chosen, rates = item
    x, y = bank[chosen].reshape(len(chosen), *shape), labels[chosen]

    def one(head: Heads, rate: Array, decay: Array) -> tuple[Heads, Array]:
      def loss(params: PyTree) -> tuple[Array, PyTree]:
        out, stats = _forward(recipe, params, head.stats, x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), stats

      (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(head.params)
      updates, buffer = _optimizer(recipe, rate, decay).update(gradient, head.buffer, head.params)
      return Heads(optax.apply_updates(head.params, updates), stats, buffer), value

    return jax.vmap(one)(heads, rates, weight_decay)

  return jax.lax.scan(update, heads, (rows, lr))


def train_heads(
  x: np.ndarray,
  *,
  labels: np.ndarray,
  heads: Heads,
  recipe: Recipe,
  shape: tuple[int, ...],
  lr: np.ndarray,
  weight_decay: np.ndarray,
  batch_size: int,
  seed: int = 0,
  first_epoch: int = 0,
  resident_bytes: int = RESIDENT_BYTES,
  segment_bytes: int = SEGMENT_BYTES,
) -> Heads:
  """Trains on one device; every process with the same arguments gets the same heads.

  An epoch is a permutation of the rows by (seed, epoch), cut to whole batches. Calls for some epochs each, with the
  heads and the features of the call before or other ones, are one training.

  Args:
    x: [N, D] float32, on the host.
    labels: [N].
    heads, recipe, shape: see `train_segment`; `heads` is used up.
    lr: [steps, H], of the steps of this call.
    weight_decay: [H].
    batch_size: at most N.
    seed: of the order.
    first_epoch: how many epochs the heads were trained before.
    resident_bytes, segment_bytes: features on the device, all of them where they fit or those of some updates.
  """
  per_epoch = len(x) // batch_size
  epochs = range(first_epoch, first_epoch - (-len(lr) // per_epoch))
  orders = (np.random.default_rng((seed, e)).permutation(len(x))[: per_epoch * batch_size] for e in epochs)
  rows = np.concatenate([order.reshape(per_epoch, batch_size) for order in orders])[: len(lr)].astype(np.int32)
  resident = x.nbytes <= resident_bytes
  size = len(lr) if resident else max(1, segment_bytes // (batch_size * x.shape[1] * 4))
  decay, bank, classes = jnp.asarray(weight_decay, jnp.float32), None, None
  with np.errstate(over="ignore"):  # a head with an absurd rate diverges, and the caller sees it
    lr = np.asarray(lr, np.float32)
  if resident:
    bank, classes = jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.int32)
  for start in range(0, len(lr), size):
    chosen, rates = rows[start : start + size], jnp.asarray(lr[start : start + size])
    if not resident:
      bank, classes = jnp.asarray(x[chosen.ravel()], jnp.float32), jnp.asarray(labels[chosen.ravel()], jnp.int32)
      chosen = np.arange(chosen.size, dtype=np.int32).reshape(chosen.shape)
    heads, _ = train_segment(heads, bank, classes, jnp.asarray(chosen), rates, decay, recipe=recipe, shape=shape)
  return heads


@functools.partial(jax.jit, static_argnames=("recipe", "shape"))
def _logits(heads: Heads, x: Array, *, recipe: Recipe, shape: tuple[int, ...]) -> Array:
  x = x.reshape(len(x), *shape)
  return jax.vmap(lambda h: logits(recipe, h.params, h.stats, x))(heads)


def predict(heads: Heads, x: np.ndarray, *, recipe: Recipe, shape: tuple[int, ...], chunk: int = 1024) -> np.ndarray:
  """Classes [H, n] of features x [n, D], `chunk` rows at a time."""
  return np.concatenate([np.argmax(out, axis=-1) for out in _chunks(heads, x, recipe=recipe, shape=shape, chunk=chunk)], axis=1)


def probabilities(heads: Heads, x: np.ndarray, *, recipe: Recipe, shape: tuple[int, ...], chunk: int = 1024) -> np.ndarray:
  """Softmax [H, n, K] of features x [n, D], `chunk` rows at a time."""
  parts = _chunks(heads, x, recipe=recipe, shape=shape, chunk=chunk)
  return np.concatenate([np.asarray(jax.nn.softmax(out)) for out in parts], axis=1)


def _chunks(heads: Heads, x: np.ndarray, *, recipe: Recipe, shape: tuple[int, ...], chunk: int) -> Iterator[np.ndarray]:
  chunk = min(chunk, max(len(x), 1))
  for i in range(0, len(x), chunk):
    part = np.asarray(x[i : i + chunk], np.float32)
    padded = np.pad(part, ((0, chunk - len(part)), (0, 0)))
    yield np.asarray(_logits(heads, jnp.asarray(padded), recipe=recipe, shape=shape))[:, : len(part)]
