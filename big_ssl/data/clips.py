"""Clips: short videos with a mask per frame; those of the embedded world, every one a pure function of (seed, split, index)."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np

from big_ssl.data import sprites
from big_ssl.data.plan import uniforms

_MOST_FRAMES = 4096  # of a clip: the noise of two clips has no number in common
_NEAR = 0.45  # size of an object in a clip, of that in an image
_FINE = 0.6  # period of its motif, likewise


class Clip(abc.ABC):
  """A video whose objects are marked in every frame.

  Attributes:
    name: for messages.
  """

  name: str

  @abc.abstractmethod
  def __len__(self) -> int:
    """Frames."""

  @abc.abstractmethod
  def frame(self, index: int) -> np.ndarray:
    """uint8 [h, w, C]."""

  @abc.abstractmethod
  def mask(self, index: int) -> np.ndarray:
    """Integers [h, w]: 0 is background, 1 and on are the objects, 255 is not judged."""


@dataclasses.dataclass(frozen=True)
class ArrayClip(Clip):
  """A clip in memory.

  Attributes:
    frames: uint8 [T, S, S, 3].
    masks: uint8 [T, S, S], 0 background, 1 ... K the objects.
    labels: [K] int32, the classes of the objects.
    boxes: float32 [T, K, 4] as y0, x0, y1, x1 shares of the frame, around what is seen of an object; zeros where nothing is.
  """

  name: str
  frames: np.ndarray
  masks: np.ndarray
  labels: np.ndarray
  boxes: np.ndarray

  def __len__(self) -> int:
    return len(self.frames)

  def frame(self, index: int) -> np.ndarray:
    return self.frames[index]

  def mask(self, index: int) -> np.ndarray:
    return self.masks[index]


def render_clip(index: int, *, seed: int = 0, split: str = "train", frames: int = 12, size: int = 96) -> ArrayClip:
  """Draws one clip of the sprites: one or two objects that move, turn and grow or shrink before a plain background.

  The objects, motifs and colors are those of `sprites.render`, an object is about half as large. The second one passes
  before the first. The path is the same for any number of frames, and the masks are exact.

  Raises:
    ValueError: no frame, or more than 4096.
  """
  if not 1 <= frames <= _MOST_FRAMES:
    raise ValueError(f"a clip of {frames} frames; expected 1 to {_MOST_FRAMES}")
  u = uniforms(seed, f"clips/{split}/path", np.asarray([index]), 17)[0]
  count = 1 + int(u[16] < 0.5)
  rows = np.arange(2 * index, 2 * index + count)
  objects = sprites.draw(rows, seed=seed, stream=f"clips/{split}")
  objects = dataclasses.replace(
    objects, radius=objects.radius * _NEAR, period=objects.period * _FINE, cy=0 * objects.cy, cx=0 * objects.cx
  )
  y, x = sprites.grid(size)
  time = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None]
  masks = np.zeros((frames, size, size), np.uint8)
  first = objects.take(np.zeros(frames, np.int64))
  image = first.back[:, None, None]
  for k in range(count):
    one = objects.take(np.full(frames, k))
    draws = 2 * u[8 * k : 8 * k + 8].astype(np.float32) - 1
    scale = np.exp(0.25 * draws[5] * time)
    ty, tx = _seen(y, x, draws, time=time, scale=scale, side=0 if count == 1 else 2 * k - 1)
    alpha = sprites.coverage(one, ty, tx, size=size, scale=scale)
    image = sprites.over(sprites.filling(one, *sprites.bent(one, ty, tx), size=size, scale=scale), image, alpha=alpha)
    masks[alpha > 0.5] = k + 1
  noise = uniforms(seed, f"clips/{split}/noise", index * _MOST_FRAMES + np.arange(frames), size * size).reshape(masks.shape)
  return ArrayClip(
    name=f"sprites/{split}/clip {index}",
    frames=sprites.develop(image, light=sprites.lighting(first, y, x), noise=noise),
    masks=masks,
    labels=objects.label,
    boxes=np.stack([sprites.boxes(masks == k + 1) * (masks == k + 1).any((1, 2))[:, None] for k in range(count)], axis=1),
  )


def _seen(
  y: np.ndarray, x: np.ndarray, draws: np.ndarray, *, time: np.ndarray, scale: np.ndarray, side: int
) -> tuple[np.ndarray, np.ndarray]:
  """The coordinates [T, S, S] of the image, y and x, as an object sees them that moves and turns with the time.

  Args:
    draws: [8] in [-1, 1].
    time: [T, 1, 1] from 0 to 1.
    scale: [T, 1, 1] of the object.
    side: -1 or 1 starts it in the left or right half, 0 anywhere.
  """
  start_y, end_y, end_x = 0.25 * draws[0], 0.28 * draws[1], 0.28 * draws[3]
  start_x = side * (0.22 + 0.06 * draws[2]) if side else 0.25 * draws[2]
  dy, dx = y - (start_y + (end_y - start_y) * time), x - (start_x + (end_x - start_x) * time)
  turn = 0.7 * draws[4] * time
  cos, sin = np.cos(turn), np.sin(turn)
  return (cos * dy + sin * dx) / scale, (cos * dx - sin * dy) / scale


@dataclasses.dataclass(frozen=True)
class SpriteClips(Sequence):
  """The first `count` clips of a split, drawn when they are asked for."""

  seed: int = 0
  split: str = "eval"
  count: int = 32
  frames: int = 12
  size: int = 96

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> ArrayClip:
    if not -self.count <= index < self.count:
      raise IndexError(f"clip {index} of {self.count}")
    return render_clip(index % self.count, seed=self.seed, split=self.split, frames=self.frames, size=self.size)
