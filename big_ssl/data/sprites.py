"""`sprites`: an embedded procedural world, every image a pure function of (seed, split, index).

A large object filled with one of ten motifs lies on a plain background. The class is the MOTIF; the
nuisances are mostly what the published augmentations change: position and phase, scale, a mild rotation and a bend, both colors of the
motif (their polarity too), the color of the background, contrast, brightness, a lighting gradient and noise. Pixels of two
images of a class hardly correlate, while a small crop of the object still shows its motif.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from big_ssl.data.plan import uniforms

CLASSES = ("stripes", "bars", "checks", "dots", "rings", "crosses", "zigzag", "bricks", "chevrons", "triangles")
SHAPES = ("disk", "square", "diamond", "hexagon", "star")
_CHUNK = 256


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
  parts = [_render(indices[i : i + _CHUNK], seed, split, size) for i in range(0, len(indices), _CHUNK)]
  join = lambda name: np.concatenate([getattr(p, name) for p in parts])
  return Sprites(join("image"), join("label"), join("mask"), join("box"), [c for p in parts for c in p.caption])


def _render(indices: np.ndarray, seed: int, split: str, size: int) -> Sprites:
  n = len(indices)
  u = iter(uniforms(seed, f"sprites/{split}", indices.astype(np.uint64), 32).T)
  between = lambda low, high: (low + (high - low) * next(u)).astype(np.float32)
  label = (next(u) * len(CLASSES)).astype(np.int32)
  shape = (next(u) * len(SHAPES)).astype(np.int32)

  column = lambda x: np.asarray(x, np.float32)[:, None, None]
  axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
  y, x = axis[None, :, None], axis[None, None, :]
  radius = between(0.45, 0.6)
  cy, cx = between(-0.12, 0.12), between(-0.12, 0.12)
  outline = _outline((y - column(cy)) / column(radius), (x - column(cx)) / column(radius), shape)
  mask = _soft(-outline * radius[:, None, None], size)

  # Motif coordinates, in periods: a mild rotation, a scale within a factor 1.7 and a random phase.
  angle = between(-0.3, 0.3)
  period = between(0.11, 0.19)
  py, px = between(0, 1), between(0, 1)
  cos, sin = column(np.cos(angle)), column(np.sin(angle))
  # A gentle bend, half a period at the most: motifs of two images line up nowhere for long.
  bend, turn = between(0.03, 0.08), between(0.7, 1.3)
  y, x = y + column(bend) * np.sin(6.28 * (column(turn) * x + column(between(0, 1)))), x + column(bend) * np.sin(6.28 * (column(turn) * y + column(between(0, 1))))
  my = (cos * y + sin * x) / column(period) + column(py)
  mx = (-sin * y + cos * x) / column(period) + column(px)
  field = np.empty((n, size, size), np.float32)
  for k in range(len(CLASSES)):
    rows = label == k
    if rows.any():
      field[rows] = _motif(k, my[rows], mx[rows])
  ink = _soft(field * column(period), size)

  # Colors vary about as far as color jitter moves them, so that they tell instances apart no better than it lets them.
  hue, saturation = between(0.0, 0.2), between(0.15, 0.45)
  light, dark = between(0.6, 0.95), between(0.1, 0.4)
  flip = next(u) < 0.5
  first = _color(hue, saturation, np.where(flip, light, dark))
  second = _color(hue, saturation, np.where(flip, dark, light))
  back = _color(between(0.0, 0.2), between(0.1, 0.4), between(0.3, 0.7))
  object_ = first[:, None, None] * ink[..., None] + second[:, None, None] * (1 - ink[..., None])
  image = object_ * mask[..., None] + back[:, None, None] * (1 - mask[..., None])
  gradient = 1 + column(between(-0.3, 0.3)) * 2 * y + column(between(-0.3, 0.3)) * 2 * x
  noise = uniforms(seed, f"sprites/{split}/noise", indices.astype(np.uint64), size * size).reshape(n, size, size)
  image = image * gradient[..., None] + 0.06 * (noise[..., None].astype(np.float32) - 0.5)
  hard = mask > 0.5
  return Sprites(
    image=np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8),
    label=label,
    mask=hard.astype(np.uint8),
    box=_boxes(hard),
    caption=[f"a {SHAPES[s]} filled with {CLASSES[k]}" for s, k in zip(shape, label, strict=True)],
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


def _boxes(mask: np.ndarray) -> np.ndarray:
  """Tight boxes y0, x0, y1, x1 as shares of the side."""
  size = mask.shape[1]
  rows, columns = mask.any(2), mask.any(1)
  first = lambda a: a.argmax(1)
  last = lambda a: size - a[:, ::-1].argmax(1)
  return np.stack([first(rows), first(columns), last(rows), last(columns)], axis=1).astype(np.float32) / size
