"""What the method is shown: the crops of some training images, augmented as in training but for the normalization."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from big_ssl.augment.photometric import Normalize
from big_ssl.core.method import Inputs, as_streams
from big_ssl.core.step import prepare
from big_ssl.core.types import UserError
from big_ssl.visualize import drawing
from big_ssl.visualize.drawing import Picture
from big_ssl.visualize.subject import Options, Subject

_TILE, _WIDEST = 96, 12  # pixels of the largest view; tiles of a row


def draw(subject: Subject, options: Options) -> list[Picture]:
  """A row per image, of the first step of the first stream.

  Raises:
    UserError: the views are packed into common sequences, or another process has some of the images.
  """
  run = subject.run
  name, inputs = next(iter(as_streams(run.method.inputs()).items()))
  if any(view.packing for view in inputs.views) or jax.process_count() > 1:
    raise UserError("pictures of views: crops that share a sequence, or a batch that is spread over processes, are not drawn.")
  pipeline = run.pipelines[name]
  raw = {key: value[: options.count] for key, value in pipeline.batch(0).items()}
  if pipeline.resident is not None:
    raw["canvas"] = pipeline.resident[raw["index"]]
    raw["size"] = np.broadcast_to(np.array(pipeline.resident.shape[1:3], np.int32), (len(raw["index"]), 2))
  batch = jax.jit(lambda r: prepare(_without_normalize(inputs), r, None, jax.random.key(0)))(raw)
  largest = max(max(view.shape) for view in inputs.views)
  tiles = _tiles(batch, inputs, largest)
  rows = [_row(tiles, i) for i in range(len(raw["index"]))]
  kinds = ", ".join(f"{v.count} '{v.name}' of {v.shape[0]}x{v.shape[1]} px" for v in inputs.views)
  of = f" of the stream '{name}'" if name else ""
  caption = f"What the method sees{of} of {len(raw['index'])} training images in the first step, before normalization: {kinds}. Sizes are to scale."
  return [Picture("views", drawing.grid(rows), caption)]


def _without_normalize(inputs: Inputs) -> Inputs:
  plain = lambda view: dataclasses.replace(view, augment=tuple(a for a in view.augment if not isinstance(a, Normalize)))
  return dataclasses.replace(inputs, views=tuple(plain(view) for view in inputs.views))


def _tiles(batch: dict[str, jax.Array], inputs: Inputs, largest: int) -> list[tuple[np.ndarray, int, int]]:
  """(images [B, h, w, C], height, width of their tile) of every copy of every view."""
  out = []
  for view in inputs.views:
    images = np.asarray(batch[view.name])
    height, width = (max(8, round(_TILE * side / largest)) for side in view.shape)
    out += [(images[:, copy], height, width) for copy in range(images.shape[1])]
  return out[:_WIDEST]


def _row(tiles: list[tuple[np.ndarray, int, int]], i: int) -> list[np.ndarray]:
  return [drawing.tile(images[i], height=height, width=width) for images, height, width in tiles]
