"""Images beside those whose features are nearest."""

from __future__ import annotations

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.ops import knn
from big_ssl.visualize import drawing
from big_ssl.visualize.drawing import Picture
from big_ssl.visualize.subject import Options, Subject

_TILE, _NEAREST = 104, 7


def draw(subject: Subject, options: Options) -> list[Picture]:
  """A row per query: the image, and its nearest among all other images; framed by whether the class is the same."""
  found = subject.features
  x, labels = found.features, found.labels
  if len(x) < 2:
    raise UserError(f"{subject.images.describe()['name']}: {len(x)} images; neighbors need at least 2.")
  queries = np.linspace(0, len(x) - 1, min(options.count, len(x))).astype(int)
  k = min(_NEAREST, len(x) - 1)
  hits = knn.nearest(x[queries], bank=x, k=k + 1, mesh=subject.run.mesh)
  rows, agree = [], []
  for query, index, similarity in zip(queries, hits.index, hits.similarity, strict=True):
    others = [(int(i), float(s)) for i, s in zip(index, similarity, strict=True) if i != query][:k]
    row = [_tile(subject, int(found.index[query]), f"{subject.title(int(found.index[query]))}", drawing.INK)]
    row.append(np.full((1, 8, 3), 255, np.uint8))
    for i, cosine in others:
      known = labels is not None and labels[query] >= 0 and labels[i] >= 0
      same = known and labels[query] == labels[i]
      agree += [same] if known else []
      color = drawing.PALE if not known else drawing.GOOD if same else drawing.BAD
      title = f"{cosine:.2f} {subject.title(int(found.index[i]))}"
      row.append(_tile(subject, int(found.index[i]), title, color))
    rows.append(row)
  caption = f"Images (left, dark frame) and their {k} nearest among {len(x):,} by cosine of the features, which is given below each."
  if agree:
    caption += f" Blue frames are of the same class, {np.mean(agree):.0%} of those shown; orange ones are not."
  return [Picture("neighbors", drawing.grid(rows), caption)]


def _tile(subject: Subject, row: int, title: str, color: tuple[int, int, int]) -> np.ndarray:
  pixels = subject.pixels(row)
  pixels = np.full((8, 8, 3), 200, np.uint8) if pixels is None else pixels
  shown = drawing.framed(drawing.tile(pixels, height=_TILE, width=_TILE), color=color)
  return drawing.stack([shown, drawing.words(title, width=_TILE, size=11)], gap=0)
