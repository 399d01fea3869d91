"""Masks carried along a clip by the similarity of patch features (DINO, arXiv 2104.14294, section 4.2.2; released code)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array
from big_ssl.ops.segmentation import bilinear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """How the labels of a frame follow from those of its context.

  Attributes:
    topk: context patches that vote for a target patch, the most similar of all context frames together; ties at the last
      of them all stay.
    window: a target patch sees context patches at most so many cells away, vertically and horizontally; 0 is everywhere.
    temperature: T of the weights exp(cosine / T).
  """

  topk: int = 5
  window: int = 12
  temperature: float = 0.1


@flax.struct.dataclass
class Context:
  """Frames whose labels are known; of a fixed size, so that one compilation serves a whole clip.

  Attributes:
    features: [F, h, w, D], rows of norm 1.
    labels: [F, h, w, C] soft masks.
    valid: [F] bool, which frames there are.
  """

  features: Array
  labels: Array
  valid: Array


def unit(features: Array) -> Array:
  """Features [..., D] divided by their norm, in float32."""
  x = jnp.asarray(features, jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def propagate(target: Array, *, context: Context, rule: Rule = Rule()) -> Array:
  """Soft labels [h, w, C] float32 of a frame: a weighted mean of the labels of the `rule.topk` nearest context patches.

  A row of target patches at a time, against the rows of the window: a pair outside it has weight 0, not exp(0), so it can
  only be among the nearest where the window holds fewer, and changes nothing there.

  Args:
    target: [h, w, D] features, rows of norm 1.
    context: its frames are of the same h, w and D.
  """
  height, width = target.shape[:2]
  frames, classes = context.valid.shape[0], context.labels.shape[-1]
  reach = min(rule.window or max(height, width), height - 1)  # rows above and below that can be seen
  span = 2 * reach + 1
  pad = ((0, 0), (reach, reach), (0, 0), (0, 0))
  features, labels = jnp.pad(context.features, pad), jnp.pad(context.labels, pad)
  column = jnp.arange(width)
  near = jnp.abs(column[:, None] - column) <= (rule.window or width)  # [w, w]

  def row(y: Array, x: Array) -> Array:
    cut = lambda a: jax.lax.dynamic_slice_in_dim(a, y, span, axis=1)
    cosine = jnp.einsum("qd,fykd->qfyk", x, cut(features), precision=jax.lax.Precision.HIGHEST)
    above = y - reach + jnp.arange(span)
    there = context.valid[:, None] & (above >= 0) & (above < height)  # [F, span]
    cosine = jnp.where(there[None, :, :, None] & near[:, None, None, :], cosine, -jnp.inf).reshape(width, -1)
    # Without their places, which nothing else needs, XLA sorts whole rows in this loop, which takes 80 times as long.
    values, _ = jax.lax.optimization_barrier(jax.lax.top_k(cosine, min(rule.topk, cosine.shape[1])))
    weights = jnp.where(cosine >= values[:, -1:], jnp.exp((cosine - values[:, :1]) / rule.temperature), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return jnp.matmul(weights, cut(labels).reshape(frames * span * width, classes), precision=jax.lax.Precision.HIGHEST)

  return jax.lax.map(lambda args: row(*args), (jnp.arange(height), target))


def propagate_clip(
  features: Iterable[Array], *, first_labels: Array, last_frames: int = 7, rule: Rule = Rule()
) -> Iterator[Array]:
  """Yields the soft labels [h, w, C] of frames 2, 3, ...; the context is the first frame and the `last_frames` before.

  What is yielded is what goes on: soft, neither hardened nor normalized.

  Args:
    features: [h, w, D] of every frame, the first one too; of any norm.
    first_labels: [h, w, C] of the first frame.
  """
  frames = iter(features)
  context = _start(jnp.asarray(next(frames)), jnp.asarray(first_labels, jnp.float32), frames=last_frames + 1)
  for number, frame in enumerate(frames):
    # The first frame keeps its place 0; the last ones take turns in the others. Their order does not matter.
    place = 1 + number % last_frames if last_frames else 0
    context, soft = _advance(context, jnp.asarray(frame), jnp.int32(place), rule=rule)
    yield soft


@functools.partial(jax.jit, static_argnames="frames")
def _start(features: Array, labels: Array, *, frames: int) -> Context:
  fill = lambda x: jnp.zeros((frames, *x.shape), x.dtype).at[0].set(x)
  return Context(fill(unit(features)), fill(labels), jnp.arange(frames) == 0)


@functools.partial(jax.jit, static_argnames="rule")
def _advance(context: Context, features: Array, place: Array, *, rule: Rule) -> tuple[Context, Array]:
  """The labels of a frame, and the context with that frame at `place`; 0, that of the first frame, leaves it as it is."""
  target = unit(features)
  soft = propagate(target, context=context, rule=rule)
  put = lambda old, new: jnp.where(place > 0, old.at[place].set(new), old)
  return Context(put(context.features, target), put(context.labels, soft), put(context.valid, True)), soft


@functools.partial(jax.jit, static_argnames="size")
def enlarge(soft: Array, *, size: tuple[int, int]) -> Array:
  """Soft labels [h, w, C] at `size` pixels, bilinear between the centers of the patches, each class scaled to [0, 1].

  A class is shifted and scaled by its own minimum and maximum where its maximum is above 0. A constant map, of which the
  released code makes NaN, becomes 1 everywhere.
  """
  x = bilinear(soft, shape=size)
  low, high = x.min(axis=(0, 1)), x.max(axis=(0, 1))
  low = jnp.where((high > 0) & (high > low), low, 0.0)
  return jnp.where(high > 0, (x - low) / jnp.where(high > 0, high - low, 1.0), x)


def nearest_places(count: int, *, step: float, limit: int) -> np.ndarray:
  """[count] int: the pixel, of `limit`, under the center of each of `count` cells of `step` pixels.

  With step = limit / count this is the nearest-neighbor resize of PIL: the steps are added up as there, which decides where
  a center falls between two pixels.
  """
  centers = np.cumsum(np.append(0.5 * step, np.full(count - 1, step, np.float64)))
  return np.minimum(centers.astype(np.int64), limit - 1)


def one_hot(labels: np.ndarray, *, classes: int) -> np.ndarray:
  """[..., classes] float32; a label that is not a class has no 1."""
  return (np.asarray(labels)[..., None] == np.arange(classes)).astype(np.float32)
