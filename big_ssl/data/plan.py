"""Which example, which crop, flipped or not: a pure function of (seed, position), in numpy, before any pixel is read.

The position of row i of step s is `s * batch_size + i`; it is the only clock of the data. There is no generator to
advance: every number is a hash of what it belongs to, so step 10^6 costs what step 0 costs, and any host can compute
any row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable

import numpy as np

from big_ssl.core.method import Sequential, Shuffle, View
from big_ssl.core.types import UserError

Order = Callable[[int], "np.ndarray | None"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_TRIES = 10
_NEAR = 16  # neighbors that are tried in place of a bad image
_PER_COPY = 2 * _TRIES + 3  # area and aspect per try, y and x, flip


def _mix(x: np.ndarray) -> np.ndarray:
  """The finalizer of splitmix64 (Steele, Lea & Flood 2014): a bijection of uint64 that spreads every bit over all."""
  with np.errstate(over="ignore"):
    x = (x + _GOLDEN).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
  return x ^ (x >> np.uint64(31))


def _key(seed: int, name: str) -> np.uint64:
  """64 bits that differ for every (seed, name), the same on every machine."""
  digest = hashlib.blake2b(f"{int(seed)}/{name}".encode(), digest_size=8).digest()
  return np.uint64(int.from_bytes(digest, "little"))


def uniforms(seed: int, stream_name: str, positions: np.ndarray, count: int) -> np.ndarray:
  """Independent uniform numbers that belong to positions of a named stream.

  Number j of position p is hash(hash(key, p) + hash(key, j)), 53 bits of it: it depends on neither `count` nor on the
  other positions. Hash and construction are own choice.

  Args:
    seed: of the run, any integer.
    stream_name: what the numbers are for; other names give independent numbers.
    positions: [B] integers, not negative.
    count: numbers per position.

  Returns:
    [B, count] float64 in [0, 1).
  """
  key = _key(seed, stream_name)
  row = _mix(_mix(np.asarray(positions).astype(np.uint64)) ^ key)
  column = _mix(_mix(np.arange(count, dtype=np.uint64)) + key)
  with np.errstate(over="ignore"):
    bits = _mix(row[:, None] + column)
  return (bits >> np.uint64(11)) * 2.0**-53


def permute(index: np.ndarray, *, size: int, seed: int | np.ndarray) -> np.ndarray:
  """A pseudo-random permutation of range(size), evaluated at `index` without making it.

  A Feistel network on pairs (left, right) with left < a, right < b and a * b just above `size` (Black & Rogaway 2002,
  section 5), walked on until it falls below `size`, which is nearly always the first value. O(1) in time and memory
  per index for any size.

  Args:
    index: integers in [0, size), any shape.
    size: 1 to 2**62.
    seed: an integer, or uint64 keys shaped as `index`: each key has its own permutation.

  Returns:
    int64, shaped as `index`.
  """
  if not 1 <= size <= 2**62:
    raise ValueError(f"size={size}: a permutation of 1 to 2**62 elements was expected")
  index = np.asarray(index)
  key = np.asarray(seed if isinstance(seed, np.ndarray) else _key(seed, "permute"), np.uint64)
  key = np.broadcast_to(key, index.shape).ravel()
  a = math.isqrt(size - 1) + 1
  b = -(-size // a)
  x = index.astype(np.uint64).ravel()
  if x.size and int(x.max()) >= size:
    raise ValueError(f"index {int(x.max())} is not below size={size}")
  x = _feistel(x, key, a, b)
  outside = np.flatnonzero(x >= np.uint64(size))
  while outside.size:  # a bijection of the larger domain returns to the smaller one
    x[outside] = _feistel(x[outside], key[outside], a, b)
    outside = outside[x[outside] >= np.uint64(size)]
  return x.astype(np.int64).reshape(index.shape)


def _feistel(x: np.ndarray, key: np.ndarray, a: int, b: int) -> np.ndarray:
  """Eight rounds on [n] uint64 below a * b; four are enough for a pseudo-random function, the rest is for tiny a, b."""
  a, b = np.uint64(a), np.uint64(b)
  left, right = x // b, x % b
  with np.errstate(over="ignore"):
    for i in range(0, 8, 2):
      left = (left + _mix(_mix(right ^ key) + np.uint64(i)) % a) % a
      right = (right + _mix(_mix(left ^ key) + np.uint64(i + 1)) % b) % b
  return left * b + right


def replacements(count: int) -> np.ndarray:
  """How far from a bad image others are tried in its place, itself first: near by, then spread over all, past a folder of bad ones.

  Args:
    count: images to choose from, at least 1; the distances are below it.
  """
  if count <= 2 * _NEAR:
    return np.arange(count)
  spread = (np.arange(1, _NEAR + 1) * (5**0.5 - 1) / 2) % 1  # the golden ratio leaves no large gap
  return np.concatenate([np.arange(_NEAR), (spread * count).astype(np.int64)])


def indices(
  sampler: Shuffle | Sequential, positions: np.ndarray, *, size: int, seed: int, order: Order | None = None
) -> np.ndarray:
  """The example at each position.

  Args:
    sampler: `Shuffle` permutes each epoch by (seed, epoch), `Sequential` keeps the order of the source.
    positions: [B] int64; the epoch is `position // size`, so a batch may hold the end of one and the start of the next.
    size: examples of the source.
    seed: of the run.
    order: epoch -> [size] indices, or None to leave that epoch to the sampler. Called once per epoch that `positions`
      touches, so an expensive one should remember its answer.

  Returns:
    [B] int64 in [0, size).
  """
  if size < 1:
    raise UserError(f"data: the source holds {size} examples; at least one is needed.")
  positions = np.asarray(positions, np.int64)
  epoch, offset = positions // size, positions % size
  if isinstance(sampler, Sequential):
    result = offset
  elif isinstance(sampler, Shuffle):
    result = permute(offset, size=size, seed=_mix(_mix(epoch.astype(np.uint64)) ^ _key(seed, "epoch")))
  else:
    raise UserError(f"inputs.sampler={sampler!r}: expected Shuffle() or Sequential().")
  for number in [] if order is None else np.unique(epoch):
    given = order(int(number))
    if given is not None:
      here = epoch == number
      result = np.where(here, _checked(given, size, int(number))[offset], result)
  return result


def _checked(given: np.ndarray, size: int, epoch: int) -> np.ndarray:
  given = np.asarray(given)
  if given.shape != (size,) or not np.issubdtype(given.dtype, np.integer):
    raise UserError(f"plan of epoch {epoch}: {given.dtype} {given.shape}; expected [{size}] integers, one per example.")
  if given.min() < 0 or given.max() >= size:
    raise UserError(f"plan of epoch {epoch}: index {given.min()} to {given.max()}; the source holds 0 to {size - 1}.")
  return given.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Boxes:
  """The geometry of one view.

  Attributes:
    box: [B, count, 4] float32: y0, x0, height, width in pixels of the image; inside it, at least one pixel long. Those of
      "scaled" may end outside of it.
    flip: [B, count] bool.
  """

  box: np.ndarray
  flip: np.ndarray


def boxes(view: View, sizes: np.ndarray, *, seed: int, positions: np.ndarray) -> Boxes:
  """Draws the crop boxes of a view, keyed by (seed, view.like or view.name, position, copy).

  Args:
    view: how to crop.
    sizes: [B, 2] height and width of the images in pixels; the boxes are in these pixels.
    seed: of the run.
    positions: [B].
  """
  sizes = np.asarray(sizes, np.int64)
  if sizes.shape != (len(positions), 2) or (sizes.size and sizes.min() < 1):
    raise ValueError(f"sizes {sizes.shape} from {sizes.min(initial=0)}: expected [{len(positions)}, 2] of 1 and more")
  draws = uniforms(seed, f"boxes/{view.like or view.name}", positions, view.count * _PER_COPY)
  draws = draws.reshape(len(positions), view.count, _PER_COPY)
  if view.crop == "random_resized":
    box = _random_resized(view, sizes, draws)
  elif view.crop == "clipped":
    box = _clipped(view, sizes, draws)
  elif view.crop == "center":
    box = np.broadcast_to(_center(view, sizes)[:, None], (len(positions), view.count, 4))
  elif view.crop == "scaled":
    box = _scaled(view, sizes, draws)
  elif view.crop == "none":
    whole = np.concatenate([np.zeros_like(sizes), sizes], -1)
    box = np.broadcast_to(whole[:, None], (len(positions), view.count, 4))
  else:
    raise UserError(f"view '{view.name}': crop={view.crop!r}; expected 'random_resized', 'clipped', 'center', 'none' or 'scaled'.")
  return Boxes(box=np.ascontiguousarray(box, np.float32), flip=draws[..., -1] < view.flip)


def _random_resized(view: View, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
  """torchvision's RandomResizedCrop.get_params, all tries at once; [B, count, 4] whole pixels."""
  full = np.broadcast_to(sizes[:, None, :], (*draws.shape[:2], 2))  # [B, count, 2]
  height, width = full[..., :1], full[..., 1:]
  tried = _sides(view, height * width, draws[..., :_TRIES], draws[..., _TRIES : 2 * _TRIES])  # [B, count, tries, 2]
  fits = ((tried >= 1) & (tried <= full[..., None, :])).all(-1)
  first = np.take_along_axis(tried, fits.argmax(-1)[..., None, None], -2)[..., 0, :]
  # No try fits: the whole image, cut to the nearest allowed aspect, in the center.
  clamped = np.concatenate([np.rint(width / view.ratio[0]), np.rint(height * view.ratio[1])], -1)
  clamped = np.clip(clamped, 1, full)
  found = fits.any(-1)[..., None]
  side = np.where(found, first, clamped)
  free = full - side
  drawn = np.floor(draws[..., 2 * _TRIES : 2 * _TRIES + 2] * (free + 1))
  return np.concatenate([np.where(found, drawn, free // 2), side], -1)


def _clipped(view: View, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
  """One draw, sides clipped to the image (BYOL, arXiv 2006.07733, released code); [B, count, 4] whole pixels."""
  full = np.broadcast_to(sizes[:, None, :], (*draws.shape[:2], 2))  # [B, count, 2]
  side = np.clip(_sides(view, full[..., 0] * full[..., 1], draws[..., 0], draws[..., _TRIES]), 1, full)
  return np.concatenate([np.floor(draws[..., 2 * _TRIES : 2 * _TRIES + 2] * (full - side + 1)), side], -1)


def _sides(view: View, area: np.ndarray, share: np.ndarray, shape: np.ndarray) -> np.ndarray:
  """Height and width [..., 2] in whole pixels from draws of the share of the area and of the logarithm of the aspect."""
  log_ratio = np.log(view.ratio)
  area = area * (view.scale[0] + (view.scale[1] - view.scale[0]) * share)
  aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * shape)
  return np.stack([np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))], -1)


def _scaled(view: View, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
  """[B, count, 4] crops of resized images (mmsegmentation: resize by a ratio, random crop, pad), in their own pixels."""
  output = np.asarray(view.shape)
  factor = view.scale[0] + (view.scale[1] - view.scale[0]) * draws[..., :1]
  resized = factor * output.min() / view.center_fraction  # pixels of the shorter side
  pixel = sizes.min(-1)[:, None, None] / resized  # [B, count, 1] pixels of the image per pixel of the output
  full = np.broadcast_to(sizes[:, None, :], (*draws.shape[:2], 2))
  side = output * pixel
  square = full.min(-1, keepdims=True)
  low, within = ((full - square) / 2, square) if view.square else (0.0, full)
  return np.concatenate([low + draws[..., 2 * _TRIES : 2 * _TRIES + 2] * np.maximum(within - side, 0.0), side], -1)


def _center(view: View, sizes: np.ndarray) -> np.ndarray:
  """[B, 4] the crop that "resize until the output over `center_fraction` just fits, cut the center" takes.

  To the pixel as torchvision: the loose side of the resized image is rounded down, the offset to the nearest.
  """
  height, width = sizes[:, 0], sizes[:, 1]
  target = np.rint(np.asarray(view.shape) / view.center_fraction).astype(np.int64)
  tight_y = target[0] * width >= target[1] * height
  resized_y = np.where(tight_y, target[0], target[1] * height // width)
  resized_x = np.where(tight_y, target[0] * width // height, target[1])
  resized = np.stack([resized_y, resized_x], -1)
  output = np.asarray(view.shape)
  pixel = sizes / resized
  side = np.maximum(output * pixel, 1.0)
  start = np.clip(np.rint((resized - output) * view.place) * pixel, 0.0, sizes - side)
  return np.concatenate([start, side], -1)
