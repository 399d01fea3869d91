"""Which size an image gets, which of its tokens stay and where in which sequence they lie: numpy only, before any pixel.

Everything is a function of (seed, position) and of the sizes of the images of one shard of the batch (see
`core.packing.Packing`), so that any host computes any shard, and a run is resumed at any step.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import special

from big_ssl.core.packing import Layout, Packing, Placement, first_fit, layout, target_grid
from big_ssl.core.types import UserError
from big_ssl.data.plan import uniforms

_SHRINK = 0.97  # factor on the sides of a shard, again and again, until its images fit


def native_grid(
  sizes: np.ndarray, sides: np.ndarray, *, patch: int, max_tokens: np.ndarray, max_grid: int
) -> np.ndarray:
  """Patches [n, 2] of images resized to the area side^2, aspect kept, each side rounded to patches and at least one.

  Images that would have more than `max_tokens` [n] patches get the largest grid that has not.
  """
  sizes = np.asarray(sizes, np.float64)
  stretch = np.sqrt(sizes[:, 0] / sizes[:, 1])
  wanted = np.stack([sides * stretch, sides / stretch], axis=1) / patch
  grid = np.clip(np.rint(wanted), 1, max_grid).astype(np.int64)
  over = grid.prod(axis=1) > max_tokens
  if over.any():
    grid[over] = np.clip(target_grid(sizes[over], patch=patch, max_tokens=max_tokens[over]), 1, max_grid)
  return grid


def sides(packing: Packing, *, seed: int, positions: np.ndarray) -> np.ndarray:
  """R of each position, [n] float64 pixels (arXiv 2307.06304, section 3.4)."""
  u = uniforms(seed, "packing/side", positions, 1)[:, 0]
  if packing.side_law == "normal":
    ends = special.ndtr((np.array([-1.0, 1.0]) - packing.side_mean) / packing.side_std)
    normal = packing.side_mean + packing.side_std * special.ndtri(ends[0] + (ends[1] - ends[0]) * u)
    u = np.clip((normal + 1) / 2, 0, 1)
  return packing.side[0] + (packing.side[1] - packing.side[0]) * u


def drop_rates(packing: Packing, *, sides: np.ndarray, seed: int, positions: np.ndarray) -> np.ndarray:
  """Share of the tokens of each position that is dropped, [n] (arXiv 2307.06304, section 2.2).

  The number of images seen is the position itself, so that a schedule needs no state.
  """
  low, high = packing.drop_rate
  if packing.drop_law == "constant":
    share = np.ones(len(positions))
  elif packing.drop_law == "beta":
    share = special.betaincinv(*packing.drop_beta, uniforms(seed, "packing/rate", positions, 1)[:, 0])
  elif packing.drop_law == "resolution":
    share = (sides - packing.side[0]) / max(packing.side[1] - packing.side[0], 1)
  else:
    share = special.expit((packing.drop_center - np.asarray(positions, np.float64)) / packing.drop_width)
  return low + (high - low) * share


def kept_count(grid: np.ndarray, rates: np.ndarray) -> np.ndarray:
  """max(1, floor(n (1 - rate))) tokens of grids [n, 2]."""
  return np.maximum(np.floor(grid.prod(axis=1) * (1 - rates) + 1e-6), 1).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Fitted:
  """Grids [n, 2] and kept tokens [n] of the images of a shard, and where they go."""

  grid: np.ndarray
  kept: np.ndarray
  placement: Placement


def fit(packing: Packing, sizes: np.ndarray, *, sides: np.ndarray, rates: np.ndarray) -> Fitted:
  """Lowers the sides of a shard by a common factor until all its images have a place.

  An image of one patch always has one, `Packing` sees to it; so the end is reached.
  """
  most = np.floor((packing.tokens + 1e-6) / (1 - rates)).astype(np.int64)
  while True:
    grid = native_grid(sizes, sides, patch=packing.patch, max_tokens=most, max_grid=packing.grid_limit)
    kept = kept_count(grid, rates)
    placement = first_fit(kept, capacity=packing.tokens, rows=packing.sequences, max_images=packing.max_images)
    if placement.row.min(initial=0) >= 0:
      return Fitted(grid, kept, placement)
    sides = sides * _SHRINK


def plan(
  packing: Packing, sizes: np.ndarray, *, seed: int, positions: np.ndarray, name: str = ""
) -> list[Layout]:
  """The sequences of some shards of a batch.

  Args:
    sizes: [b, 2] height and width in pixels of the images (or of the crops that are to be packed).
    positions: [b] consecutive; they hold whole shards, so that a batch and the rows of a host must be multiples of
      `packing.shard_size`.
    name: of the view; others draw independently.

  Returns:
    One layout per shard; its images are numbered from 0 in each.

  Raises:
    UserError: positions that cut a shard.
  """
  seed = int(uniforms(seed, f"packing/{name}", np.zeros(1, np.int64), 1)[0, 0] * 2**53) if name else seed
  positions, shard = np.asarray(positions, np.int64), packing.shard_size
  if len(positions) % shard or (len(positions) and positions[0] % shard):
    raise UserError(
      f"config.method.shard_size={shard}: must divide config.batch_size and the images of each device; found {len(positions)}"
      f" images from position {positions[0] if len(positions) else 0}."
    )
  side = sides(packing, seed=seed, positions=positions)
  rate = drop_rates(packing, sides=side, seed=seed, positions=positions)
  layouts = []
  for start in range(0, len(positions), shard):
    rows = slice(start, start + shard)
    fitted = fit(packing, sizes[rows], sides=side[rows], rates=rate[rows])
    kept = [
      _subset(seed, position, int(grid.prod()), int(count))
      for position, grid, count in zip(positions[rows], fitted.grid, fitted.kept, strict=True)
    ]
    size = {"rows": packing.sequences, "capacity": packing.tokens, "slots": packing.max_images}
    layouts.append(layout(fitted.placement, fitted.grid, kept=kept, **size))
  return layouts


def _subset(seed: int, position: int, tokens: int, count: int) -> np.ndarray | None:
  """`count` of `tokens` tokens at random, ascending; None is all of them. A new draw for every position, so in every epoch."""
  if count >= tokens:
    return None
  return np.sort(np.argsort(uniforms(seed, "packing/tokens", np.array([position]), tokens)[0], kind="stable")[:count])


def as_batch(layouts: list[Layout]) -> dict[str, np.ndarray]:
  """The arrays that travel with a batch: sequences of all shards, and per image its sequence IN its shard and its segment.

  Returns:
    "image", "segment", "y", "x" [G R, T], "grid" [G R, E, 2], "row", "slot" [G n], "extent" [G n, 2], the grid of
    each image; all int32, but "shard" [G] float32, the share of padding in each.
  """
  names = ("image", "segment", "y", "x", "grid", "row", "slot")
  extent = [one.grid[one.row, one.slot] for one in layouts]
  arrays = {name: np.concatenate([getattr(one, name) for one in layouts]) for name in names}
  return arrays | {"extent": np.concatenate(extent), "shard": np.array([one.padding for one in layouts], np.float32)}
