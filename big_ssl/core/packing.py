"""Several images in one sequence of tokens: the layout, written once for the host's plans and for static crops.

Patch n' Pack (NaViT, arXiv 2307.06304, section 2.1 and appendix A.3): images come in order, and each goes to the first
sequence that has room. Tokens that are left over are padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from big_ssl.core.types import UserError, nearest

PADDING = -1  # segment and image of a token that belongs to none


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingFields:
  """How the images of a batch become sequences: fields of a method, which errors cite as config.method.

  A batch is packed in shards, `shard_size` consecutive positions into `sequences` sequences, each by itself: no image waits for
  a later step, a device or a host needs no image of another, and the same sequences come out for any number of them.
  Sides are drawn per image and then, shard by shard, lowered by a common factor until all images fit (own choice).

  Attributes:
    tokens: length of a sequence.
    shard_size, sequences: images and sequences of a shard.
    max_images: of a sequence.
    max_grid: patches along the longer side of an image, at most; longer images are squashed. 0 is twice the square's.
    side: smallest and largest R in pixels; an image is resized to the area R^2, its aspect kept, then rounded to patches.
    side_law: "normal", N(`side_mean`, `side_std`) cut to [-1, 1], which is mapped to `side` (section 3.4 favors small
      images: mean -0.5, deviation 1); or "uniform".
    drop_law: how the share of an image's tokens that is dropped is drawn: "constant", the upper end of `drop_rate`; "beta",
      Beta(`drop_beta`) on `drop_rate`; "resolution", from the lower end for the smallest to the upper for the largest side;
      "schedule", lower + (upper - lower) sigmoid((`drop_center` - n) / `drop_width`) after n images: it falls in training.
    drop_rate: lower and upper end, in [0, 1).
  """

  tokens: int = 256
  shard_size: int = 16
  sequences: int = 8
  max_images: int = 8
  max_grid: int = 0
  side: tuple[int, int] = (64, 256)
  side_law: Literal["normal", "uniform"] = "normal"
  side_mean: float = -0.5
  side_std: float = 1.0
  drop_law: Literal["constant", "beta", "resolution", "schedule"] = "constant"
  drop_rate: tuple[float, float] = (0.0, 0.0)
  drop_beta: tuple[float, float] = (1.0, 1.0)
  drop_center: float = 1e6
  drop_width: float = 1e5

  def __post_init__(self):
    for name in ("tokens", "shard_size", "sequences", "max_images"):
      if getattr(self, name) < 1:
        raise UserError(f"config.method.{name}={getattr(self, name)}: at least 1 is needed.")
    for name, laws in (("side_law", ("normal", "uniform")), ("drop_law", ("constant", "beta", "resolution", "schedule"))):
      if getattr(self, name) not in laws:
        found = getattr(self, name)
        raise UserError(f"config.method.{name}={found!r}: expected one of {', '.join(laws)}.{nearest(found, laws)}")
    if not 0 < self.side[0] <= self.side[1]:
      raise UserError(f"config.method.side={self.side}: expected a smallest and a largest side in pixels.")
    if not 0 <= self.drop_rate[0] <= self.drop_rate[1] < 1:
      raise UserError(f"config.method.drop_rate={self.drop_rate}: expected two shares in [0, 1), the lower one first.")
    if min(*self.drop_beta, self.side_std, self.drop_width) <= 0:
      raise UserError("config.method.drop_beta, side_std and drop_width: expected positive numbers.")
    room = self.sequences * min(self.max_images, self.tokens)
    if self.shard_size > room:
      raise UserError(
        f"config.method.shard_size={self.shard_size}: {self.sequences} sequences of {self.tokens} tokens and at most"
        f" {self.max_images} images hold {room}; raise sequences or max_images."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing(PackingFields):
  """The packing of images into patches of `patch` pixels a side."""

  patch: int

  @property
  def grid_limit(self) -> int:
    """Patches along a side, at most."""
    return self.max_grid or 2 * -(-self.side[1] // self.patch)


def target_grid(sizes: np.ndarray, *, patch: int | tuple[int, int], max_tokens: int | np.ndarray) -> np.ndarray:
  """The largest grid of at most `max_tokens` patches that keeps the aspect: NaFlex's rule (arXiv 2502.14786, section 2.4; public code).

  The largest ratio r with ceil(H r / p) ceil(W r / p) <= max_tokens, by bisection of (1e-6, 100) down to 1e-5.

  Args:
    sizes: [n, 2] height and width in pixels.
    patch: side of a patch in pixels, or height and width.
    max_tokens: one number, or [n].

  Returns:
    [n, 2] int64 patches; at least 1 per side.
  """
  sizes, patch = np.asarray(sizes, np.float64), np.asarray(patch)
  low, high = np.full(len(sizes), 1e-6), np.full(len(sizes), 100.0)
  grid = lambda ratio: np.maximum(np.ceil(sizes * ratio[:, None] / patch), 1).astype(np.int64)
  while len(sizes) and (high - low).max() >= 1e-5:
    ratio = (low + high) / 2
    fits = grid(ratio).prod(axis=1) <= max_tokens
    low, high = np.where(fits, ratio, low), np.where(fits, high, ratio)
  return grid(low)


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where images went, [n] int32 each: sequence, number of the image inside it, first token; -1 where none had room."""

  row: np.ndarray
  slot: np.ndarray
  start: np.ndarray


def first_fit(
  lengths: Sequence[int],
  *,
  capacity: int,
  rows: int | None = None,
  max_images: int | None = None,
  open_rows: int | None = None,
) -> Placement:
  """Greedy packing: each image, in order, to the first sequence with room for it (arXiv 2307.06304, appendix A.3).

  Args:
    lengths: [n] tokens of the images.
    capacity: tokens of a sequence.
    rows: sequences; None opens as many as are needed.
    max_images: of a sequence; None is any number.
    open_rows: only so many of the latest sequences take images; 1 is "next fit", None keeps all open.

  Raises:
    UserError: an image longer than a sequence.
  """
  if len(lengths) and max(lengths) > capacity:
    raise UserError(f"packing: an image of {max(lengths)} tokens in sequences of {capacity}; give longer sequences.")
  used: list[int] = []
  count: list[int] = []
  places = np.full((3, len(lengths)), -1, np.int32)
  for i, length in enumerate(int(n) for n in lengths):
    first = 0 if open_rows is None else max(len(used) - open_rows, 0)
    fits = (r for r in range(first, len(used)) if used[r] + length <= capacity and count[r] != max_images)
    row = next(fits, len(used))
    if row == len(used):
      if row == rows:
        continue
      used.append(0)
      count.append(0)
    places[:, i] = row, count[row], used[row]
    used[row] += length
    count[row] += 1
  return Placement(*places)


@dataclasses.dataclass(frozen=True)
class Layout:
  """Sequences token by token.

  Attributes:
    image: [R, T] int32, number of the image that a token is of; -1 is padding.
    segment: [R, T] int32, number of that image in the sequence; -1 is padding.
    y, x: [R, T] int32, row and column of the patch in its image; 0 in padding.
    grid: [R, E, 2] int32, patches (height, width) of the images of a sequence, dropped ones counted; 1 where there is none.
    row, slot: [n] int32, sequence and segment of each image.
  """

  image: np.ndarray
  segment: np.ndarray
  y: np.ndarray
  x: np.ndarray
  grid: np.ndarray
  row: np.ndarray
  slot: np.ndarray

  @property
  def padding(self) -> float:
    """Share of the tokens that are of no image."""
    return float(np.mean(self.image < 0))


def layout(
  placement: Placement,
  grids: np.ndarray,
  *,
  rows: int,
  capacity: int,
  slots: int,
  kept: Sequence[np.ndarray | None] | None = None,
) -> Layout:
  """The tokens of placed images.

  Args:
    placement: of n images, all of them placed.
    grids: [n, 2] patches (height, width).
    rows, capacity, slots: R, T and E.
    kept: per image the tokens that stay, as indices y * width + x; None keeps all.
  """
  if len(placement.row) and placement.row.min() < 0:
    raise ValueError(f"packing: {int(np.sum(placement.row < 0))} images have no place")
  image, segment = np.full((2, rows, capacity), PADDING, np.int32)
  y, x = np.zeros((2, rows, capacity), np.int32)
  grid = np.ones((rows, slots, 2), np.int32)
  for i, (row, slot, start) in enumerate(zip(placement.row, placement.slot, placement.start, strict=True)):
    height, width = grids[i]
    tokens = np.arange(height * width) if kept is None or kept[i] is None else kept[i]
    where = slice(start, start + len(tokens))
    image[row, where], segment[row, where] = i, slot
    y[row, where], x[row, where] = tokens // width, tokens % width
    grid[row, slot] = height, width
  return Layout(image, segment, y, x, grid, placement.row, placement.slot)
