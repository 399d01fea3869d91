"""`sprites`: an embedded procedural world, every image a pure function of (seed, split, index).

A large object filled with one of ten motifs lies on a plain background. The class is the MOTIF; the
nuisances are mostly what the published augmentations change: position and phase, scale, a mild rotation and a bend, both colors of the
motif (their polarity too), the color of the background, contrast, brightness, a lighting gradient and noise. Pixels of two
images of a class hardly correlate, while a small crop of the object still shows its motif.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os

import numpy as np

from big_ssl.data.plan import uniforms

CLASSES = ("stripes", "bars", "checks", "dots", "rings", "crosses", "zigzag", "bricks", "chevrons", "triangles")
SHAPES = ("disk", "square", "diamond", "hexagon", "star")
_CHUNK = 64  # its arrays fit into the cache of a core


@dataclasses.dataclass(frozen=True)
class Sprites:
  """image uint8 [N, S, S, 3]; label int32 [N]; mask uint8 [N, S, S], 1 on the object; box float32 [N, 4] as y0, x0, y1, x1
  shares of the image; caption, one sentence each."""

  image: np.ndarray
  label: np.ndarray
  mask: np.ndarray
  box: np.ndarray
  caption: list[str]


def render(indices: np.ndarray, *, seed: int = 0, split: str = "train", size: int = 48) -> Sprites:
  """Draws the images `indices` of a split, of side `size` pixels."""
  indices = np.asarray(indices, np.int64)
  chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    parts = list(pool.map(lambda chunk: _render(chunk, seed, split, size), chunks))
  join = lambda name: np.concatenate([getattr(p, name) for p in parts])
  return Sprites(join("image"), join("label"), join("mask"), join("box"), [c for p in parts for c in p.caption])


@dataclasses.dataclass(frozen=True)
class Objects:
  """How N objects look and where they lie, before any pixel; lengths in image widths, places from the middle of the image.

  Attributes:
    label, shape: [N] int32, into CLASSES and SHAPES.
    radius, cy, cx: [N] of the outline.
    angle, period, py, px: [N] rotation, period and phase of the motif.
    bend, turn, by, bx: [N] of a gentle bend, half a period at the most: motifs of two images line up nowhere for long.
    first, second, back: [N, 3] RGB in [0, 1] of ink, fill and background.
    gy, gx: [N] gradient of the light.
  """

  label: np.ndarray
  shape: np.ndarray
  radius: np.ndarray
  cy: np.ndarray
  cx: np.ndarray
  angle: np.ndarray
  period: np.ndarray
  py: np.ndarray
  px: np.ndarray
  bend: np.ndarray
  turn: np.ndarray
  by: np.ndarray
  bx: np.ndarray
  first: np.ndarray
  second: np.ndarray
  back: np.ndarray
  gy: np.ndarray
  gx: np.ndarray

  def take(self, rows: np.ndarray) -> Objects:
    return Objects(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


def draw(indices: np.ndarray, *, seed: int, stream: str) -> Objects:
  """The objects that belong to positions of a named stream."""
  u = iter(uniforms(seed, stream, indices.astype(np.uint64), 32).T)
  between = lambda low, high: (low + (high - low) * next(u)).astype(np.float32)
  pick = lambda names: (next(u) * len(names)).astype(np.int32)
  # The order of the draws is part of the world.
  lies = dict(label=pick(CLASSES), shape=pick(SHAPES), radius=between(0.45, 0.6), cy=between(-0.12, 0.12), cx=between(-0.12, 0.12))
  # Motif coordinates, in periods: a mild rotation, a scale within a factor 1.7 and a random phase.
  motif = dict(angle=between(-0.3, 0.3), period=between(0.11, 0.19), py=between(0, 1), px=between(0, 1))
  bend = dict(bend=between(0.03, 0.08), turn=between(0.7, 1.3), by=between(0, 1), bx=between(0, 1))
  # Colors vary about as far as color jitter moves them, so that they tell instances apart no better than it lets them.
  hue, saturation = between(0.0, 0.2), between(0.15, 0.45)
  light, dark = between(0.6, 0.95), between(0.1, 0.4)
  flip = next(u) < 0.5
  colors = dict(
    first=_color(hue, saturation, np.where(flip, light, dark)),
    second=_color(hue, saturation, np.where(flip, dark, light)),
    back=_color(between(0.0, 0.2), between(0.1, 0.4), between(0.3, 0.7)),
  )
  return Objects(**lies, **motif, **bend, **colors, gy=between(-0.3, 0.3), gx=between(-0.3, 0.3))


def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
  """y [1, S, 1] and x [1, 1, S] of the pixel centers, in image widths from the middle."""
  axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
  return axis[None, :, None], axis[None, None, :]


def _column(x: np.ndarray) -> np.ndarray:
  return np.asarray(x, np.float32)[:, None, None]


def coverage(o: Objects, y: np.ndarray, x: np.ndarray, *, size: int, scale: float | np.ndarray = 1.0) -> np.ndarray:
  """[N, S, S] in [0, 1]: how far each pixel is in its object; `scale` is that of the coordinates, for the antialiasing."""
  outline = _outline((y - _column(o.cy)) / _column(o.radius), (x - _column(o.cx)) / _column(o.radius), o.shape)
  return _soft(-outline * _column(o.radius) * scale, size)


def bent(o: Objects, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The coordinates of the motif, [N, S, S] each."""
  return (
    y + _column(o.bend) * np.sin(6.28 * (_column(o.turn) * x + _column(o.by))),
    x + _column(o.bend) * np.sin(6.28 * (_column(o.turn) * y + _column(o.bx))),
  )


def filling(o: Objects, y: np.ndarray, x: np.ndarray, *, size: int, scale: float | np.ndarray = 1.0) -> np.ndarray:
  """Colors [N, S, S, 3] of the motif at bent coordinates; `scale` as in `coverage`."""
  cos, sin = _column(np.cos(o.angle)), _column(np.sin(o.angle))
  my = (cos * y + sin * x) / _column(o.period) + _column(o.py)
  mx = (-sin * y + cos * x) / _column(o.period) + _column(o.px)
  field = np.empty(my.shape, np.float32)
  for k in range(len(CLASSES)):
    rows = o.label == k
    if rows.any():
      field[rows] = _motif(k, my[rows], mx[rows])
  ink = _soft(field * _column(o.period) * scale, size)
  return o.first[:, None, None] * ink[..., None] + o.second[:, None, None] * (1 - ink[..., None])


def over(color: np.ndarray, below: np.ndarray, *, alpha: np.ndarray) -> np.ndarray:
  """`color` where `alpha` [N, S, S] is 1, and `below` where it is 0."""
  return color * alpha[..., None] + below * (1 - alpha[..., None])


def develop(image: np.ndarray, *, light: np.ndarray, noise: np.ndarray) -> np.ndarray:
  """uint8 [N, S, S, 3] of colors under a `light` and with uniform `noise`, [N, S, S] each."""
  image = image * light[..., None] + 0.06 * (noise[..., None].astype(np.float32) - 0.5)
  return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def lighting(o: Objects, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  return 1 + _column(o.gy) * 2 * y + _column(o.gx) * 2 * x


def _render(indices: np.ndarray, seed: int, split: str, size: int) -> Sprites:
  o = draw(indices, seed=seed, stream=f"sprites/{split}")
  y, x = grid(size)
  mask = coverage(o, y, x, size=size)
  y, x = bent(o, y, x)
  image = over(filling(o, y, x, size=size), o.back[:, None, None], alpha=mask)
  noise = uniforms(seed, f"sprites/{split}/noise", indices.astype(np.uint64), size * size).reshape(mask.shape)
  hard = mask > 0.5
  return Sprites(
    image=develop(image, light=lighting(o, y, x), noise=noise),
    label=o.label,
    mask=hard.astype(np.uint8),
    box=boxes(hard),
    caption=[f"a {SHAPES[s]} filled with {CLASSES[k]}" for s, k in zip(o.shape, o.label, strict=True)],
  )


def _soft(distance: np.ndarray, size: int) -> np.ndarray:
  """Coverage of a pixel from a signed distance in image widths, positive inside: antialiased edges."""
  return np.clip(distance * size + 0.5, 0.0, 1.0)


def _outline(y: np.ndarray, x: np.ndarray, shape: np.ndarray) -> np.ndarray:
  """Signed distance-like field of the object in units of its radius, negative inside."""
  r, angle = np.hypot(y, x), np.arctan2(y, x)
  fields = [
    r - 1.0,
    np.maximum(abs(y), abs(x)) - 0.86,
    abs(y) + abs(x) - 1.15,
    np.maximum(abs(x), 0.5 * abs(x) + 0.866 * abs(y)) - 0.92,
    r - (0.85 + 0.15 * np.cos(5 * angle)),
  ]
  out = np.empty_like(r)
  for k, field in enumerate(fields):
    rows = shape == k
    out[rows] = field[rows]
  return out


def _wave(t: np.ndarray) -> np.ndarray:
  """Triangle wave of period 1 between -0.25 and 0.25: the distance to the nearest edge of equal stripes, in periods."""
  return 0.25 - abs(t - np.floor(t) - 0.5)


def _motif(kind: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Signed distance in periods to the edge of the ink, positive inside; classes survive a left-right flip."""
  fy, fx = y - np.floor(y) - 0.5, x - np.floor(x) - 0.5
  match CLASSES[kind]:
    case "stripes":
      return _wave(y)
    case "bars":
      return _wave(x)
    case "checks":
      a, b = _wave(y), _wave(x)
      return np.sign(a) * np.sign(b) * np.minimum(abs(a), abs(b))
    case "dots":
      return 0.33 - np.hypot(fy, fx)
    case "rings":
      return 0.12 - abs(np.hypot(fy, fx) - 0.32)
    case "crosses":
      return np.minimum(0.42 - np.maximum(abs(fy), abs(fx)), 0.13 - np.minimum(abs(fy), abs(fx)))
    case "zigzag":
      return _wave(y + 2 * abs(fx))
    case "bricks":
      shifted = x / 2 + 0.5 * (np.floor(y) % 2)
      return np.minimum(0.38 - abs(fy), 2 * (0.43 - abs(shifted - np.floor(shifted) - 0.5)))
    case "chevrons":
      return _wave(np.where(np.floor(x / 2) % 2 == 0, x + y, x - y))
    case _:
      return np.minimum(0.35 - fy, fy + 0.35 - 1.6 * abs(fx)) * 0.6


def _color(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
  """HSV to RGB, [N] each -> [N, 3]."""
  k = (np.array([5.0, 3.0, 1.0]) + 6.0 * np.asarray(hue)[:, None]) % 6.0
  fall = np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)
  return (np.asarray(value)[:, None] * (1.0 - np.asarray(saturation)[:, None] * fall)).astype(np.float32)


def boxes(mask: np.ndarray) -> np.ndarray:
  """Tight boxes [N, 4] as y0, x0, y1, x1 shares of the side of masks [N, S, S] bool; the whole image where there is no pixel."""
  size = mask.shape[1]
  rows, columns = mask.any(2), mask.any(1)
  first = lambda a: a.argmax(1)
  last = lambda a: size - a[:, ::-1].argmax(1)
  return np.stack([first(rows), first(columns), last(rows), last(columns)], axis=1).astype(np.float32) / size
