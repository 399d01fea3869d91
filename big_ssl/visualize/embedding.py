"""All images as points of a plane: PCA, and t-SNE and UMAP where scikit-learn and umap-learn are installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from big_ssl.core.types import UserError
from big_ssl.evals.health import effective_rank, spectrum
from big_ssl.ops import pca
from big_ssl.visualize import drawing
from big_ssl.visualize.drawing import Picture
from big_ssl.visualize.subject import Options, Subject

_SIDE, _MARGIN, _THUMB = 520, 16, 44
_MOST, _MOST_THUMBS, _MOST_NAMES = 4000, 300, 24  # points, pictures and names drawn
_OPTIONAL = {"t-SNE": ("sklearn.manifold", "scikit-learn"), "UMAP": ("umap", "umap-learn")}


def draw(subject: Subject, options: Options) -> list[Picture]:
  """A panel per projection; points have the color of their class, and without labels they are the images themselves."""
  del options
  return [_picture(subject, ("PCA", *(name for name in _OPTIONAL if _installed(name))), "embedding")]


def draw_pca(subject: Subject, options: Options) -> list[Picture]:
  """The first panel alone, which takes no time."""
  del options
  return [_picture(subject, ("PCA",), "embedding")]


def project(x: np.ndarray, *, how: str) -> np.ndarray:
  """[N, 2] of unit features x [N, D], by "PCA", "t-SNE" or "UMAP"; the last two are of seed 0."""
  count = len(x)
  if how == "PCA":
    whitening = pca.fit_whitening(np.asarray(x, np.float32), dim=2)
    # Not whitened: the first direction stays the widest.
    return pca.whiten(x, whitening=whitening, normalize=False) * np.sqrt(whitening.eigenvalues[:2])
  if how == "t-SNE":
    from sklearn.manifold import TSNE

    return TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=0).fit_transform(x)
  from umap import UMAP

  # With a seed it takes one job in any case, and warns where it was not told to. Its spectral start needs 4 points.
  start = "spectral" if count > 3 else "random"
  return UMAP(n_neighbors=min(15, count - 1), init=start, random_state=0, n_jobs=1).fit_transform(x)


def _installed(name: str) -> bool:
  try:
    importlib.import_module(_OPTIONAL[name][0])
  except ImportError:
    return False
  return True


def _picture(subject: Subject, panels: Sequence[str], name: str) -> Picture:
  found = subject.features
  if min(found.features.shape) < 3:
    count, width = found.features.shape
    raise UserError(f"{subject.images.describe()['name']}: {count} images with {width} features; a plane needs at least 3 of both.")
  drawn = np.arange(len(found.features))
  if len(drawn) > _MOST:  # drawn at random: folders are sorted by class
    drawn = np.sort(np.random.default_rng(0).permutation(len(drawn))[:_MOST])
  x, rows = found.features[drawn], found.index[drawn]
  labels = None if found.labels is None else found.labels[drawn]
  spread, parts = spectrum(x), []
  # Of equal rows t-SNE's start is 0 / 0, from which it does not come back.
  same = [] if spread[0] > 0 else [how for how in panels if how in _OPTIONAL]
  panels = [how for how in panels if how not in same]
  for how in panels:
    points = project(x, how=how)
    panel = _images(subject, points, rows) if labels is None else _points(points, labels)
    parts.append(drawing.stack([drawing.words(how, width=_SIDE, size=15), panel], gap=0))
  if labels is not None:
    parts.append(_legend(subject, labels))
  rank = effective_rank(spread)
  missing = [f"{n} needs {_OPTIONAL[n][1]}" for n in _OPTIONAL if len(panels) > 1 and n not in panels]
  missing += [f"{' and '.join(same)} left out, as all images have the same features"] if same else []
  caption = (
    f"Features of {len(x):,} of {len(found.features):,} images in a plane ({', '.join(panels)})"
    f"{', colored by class' if labels is not None else ', images at their places as far as there is room'}. Their effective rank is {rank:.1f} of"
    f" {x.shape[1]} dimensions: so many directions, weak ones too, carry the differences between images."
    f"{' ' + '; '.join(missing) + '.' if missing else ''}"
  )
  return Picture(name, drawing.grid([parts], gap=10), caption)


def _place(points: np.ndarray, *, margin: int) -> np.ndarray:
  """Pixel columns and rows [N, 2]; both axes have the same scale, and the farthest hundredth is drawn in."""
  low, high = np.percentile(points, (0.5, 99.5), axis=0)
  center, span = (low + high) / 2, max(float((high - low).max()), 1e-12)
  unit = np.clip((points - center) / span, -0.5, 0.5)
  return (_SIDE / 2 + unit * [1, -1] * (_SIDE - 2 * margin)).astype(int)


def _points(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
  canvas = Image.new("RGB", (_SIDE, _SIDE), drawing.PAPER)
  pen, radius = ImageDraw.Draw(canvas), 3 if len(points) <= 1500 else 2
  for (column, row), label in zip(_place(points, margin=_MARGIN), labels, strict=True):
    pen.ellipse((column - radius, row - radius, column + radius, row + radius), fill=drawing.color_of(int(label)))
  pen.rectangle((0, 0, _SIDE - 1, _SIDE - 1), outline=drawing.PALE)
  return np.asarray(canvas)


def _images(subject: Subject, points: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """The first images that find a place; those that would hide another are left out."""
  canvas = Image.new("RGB", (_SIDE, _SIDE), drawing.PAPER)
  taken: list[np.ndarray] = []
  for at, row in zip(_place(points, margin=_THUMB // 2 + 4), rows, strict=True):
    if len(taken) == _MOST_THUMBS:
      break
    if any(np.abs(at - other).max() < 0.6 * _THUMB for other in taken) or (pixels := subject.pixels(int(row))) is None:
      continue
    taken.append(at)
    thumb = Image.fromarray(drawing.to_rgb(pixels))
    thumb.thumbnail((_THUMB, _THUMB))
    canvas.paste(thumb, (int(at[0]) - thumb.width // 2, int(at[1]) - thumb.height // 2))
  ImageDraw.Draw(canvas).rectangle((0, 0, _SIDE - 1, _SIDE - 1), outline=drawing.PALE)
  return np.asarray(canvas)


def _legend(subject: Subject, labels: np.ndarray) -> np.ndarray:
  present = [int(label) for label in np.unique(labels)]
  lines = []
  for label in present[:_MOST_NAMES]:
    swatch = np.full((18, 14, 3), drawing.color_of(label), np.uint8)
    lines.append(drawing.stack([swatch, drawing.words(subject.class_name(label) or "no label", width=130)], axis=1))
  if len(present) > _MOST_NAMES:
    lines.append(drawing.words(f"and {len(present) - _MOST_NAMES} more", width=150))
  return drawing.stack([drawing.words("", width=150, size=15), *lines])
