"""The images that a prototype or a cluster stands for."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from big_ssl.core.method import Method
from big_ssl.core.types import Array, Extra, Params, UserError
from big_ssl.ops.kmeans import kmeans
from big_ssl.visualize import drawing
from big_ssl.visualize.drawing import Picture
from big_ssl.visualize.subject import Options, Subject

_TILE, _SHOWN = 88, 10


@dataclasses.dataclass(frozen=True)
class Groups:
  """Which group each image is in, by row of the source [N], and how well it fits; groups of `total`, named `kind`."""

  assigned: np.ndarray
  fit: np.ndarray
  total: int
  kind: str


@dataclasses.dataclass(frozen=True)
class _Best:
  """As a function of the frozen method, so that it is compiled once."""

  method: Method

  def __call__(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array:
    scores = self.method.assignments(params, extra, batch)
    if scores is None:
      return jnp.zeros((len(batch["image"]), 0))
    width = jnp.full(len(scores), scores.shape[1], jnp.float32)
    return jnp.stack([jnp.argmax(scores, -1).astype(jnp.float32), jnp.max(scores, -1), width], axis=-1)


def draw(subject: Subject, options: Options) -> list[Picture]:
  """A row per group, the largest first: how many images it has, and those that fit best."""
  groups = assign(subject, clusters=options.clusters)
  known = groups.assigned[groups.assigned >= 0]
  counts = np.bincount(known, minlength=groups.total)
  rows = []
  for group in np.argsort(-counts, kind="stable")[: min(options.count, int((counts > 0).sum()))]:
    members = np.flatnonzero(groups.assigned == group)
    best = members[np.argsort(-groups.fit[members], kind="stable")][:_SHOWN]
    side = {"width": _TILE, "size": 12}
    head = drawing.stack([drawing.words(f"no. {group + 1}", **side), drawing.words(f"{counts[group]:,} images", **side)], gap=0)
    tiles = [drawing.tile(p, height=_TILE, width=_TILE) for p in map(subject.pixels, best) if p is not None]
    rows.append([head, *tiles])
  used = int((counts > 0).sum())
  caption = (
    f"Images by {groups.kind}: {used} of {groups.total} have any of the {len(known):,} images; the largest"
    f" {len(rows)} are shown, largest first, with the images that fit best."
  )
  return [Picture("prototypes", drawing.grid(rows), caption)]


def assign(subject: Subject, *, clusters: int = 0) -> Groups:
  """By the scores of the method's head; by k-means of the features where it has none, or `clusters` are asked for.

  Raises:
    UserError: more clusters than images, or fewer than two.
  """
  if not clusters:
    found = subject.extract.over_training_set(subject.extract.state, _Best(subject.run.method), split="eval")
    if found.shape[1]:
      return Groups(found[:, 0].astype(int), found[:, 1], int(found[0, 2]), "prototype")
  x = subject.features.features
  labels = subject.features.labels
  # As many as classes; else what leaves some eight images to each, sixteen at most (own choice); never one.
  classes = len(np.unique(labels[labels >= 0])) if labels is not None else 0
  wanted = clusters or max(2, classes or min(16, len(x) // 8))
  if not 2 <= wanted <= len(x):
    raise UserError(f"--clusters={wanted}: expected 2 to {len(x)}, the number of images.")
  found = kmeans(x, clusters=wanted, rng=np.random.default_rng(0), mesh=subject.run.mesh)
  distance = np.linalg.norm(x - found.centroids[found.assignments], axis=1)
  # By row of the source: an image that cannot be read is in no group.
  assigned, fit = np.full(len(subject.images), -1), np.full(len(subject.images), -np.inf)
  assigned[subject.features.index], fit[subject.features.index] = found.assignments, -distance
  return Groups(assigned, fit, wanted, "cluster of k-means on the features")
