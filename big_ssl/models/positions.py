"""Position tables: fixed sines, and the resampling of learned tables by the rules of the public code bases.

A rule is a pair of matrices, one per axis, built in float64 from static shapes: result = M_h P M_w^T. Getting the rule
wrong is silent and changes tokens by 0.2 to 1.6 on an N(0, 1) table, so it is a field of the model.
"""

from __future__ import annotations

import math

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.models.patch_resize import bilinear_matrix

RULES = ("dino", "msn", "hf", "antialias", "linear", "flexivit", "bilinear", "corners")


def sincos(grid: tuple[int, int], *, width: int, scrambled: bool = False, temperature: float = 10_000.0) -> np.ndarray:
  """The fixed 2-D table of MoCo v3 (arXiv 2104.02057, appendix; public code): sin y, cos y, sin x, cos x, a quarter each.

  Frequencies are temperature ** (-4 i / width), i < width / 4, of the row y and the column x of a patch.

  Args:
    grid: patches (height, width).
    scrambled: the public code's order: it counts down the columns of a grid whose patches come row by row, so that on a
      grid that is not square neighbors get distant places. The same where height = width.

  Returns:
    [h * w, width] float32, row by row.

  Raises:
    UserError: a width that has no quarters.
  """
  if width % 4:
    raise UserError(f"config.model.width={width}: sine positions need a multiple of 4.")
  slow, fast = np.divmod(np.arange(grid[0] * grid[1]), grid[0] if scrambled else grid[1])
  frequency = temperature ** -(np.arange(width // 4) / (width // 4))
  y, x = slow[:, None] * frequency, fast[:, None] * frequency
  return np.concatenate([np.sin(y), np.cos(y), np.sin(x), np.cos(x)], axis=1).astype(np.float32)


def sincos2d(grid: tuple[int, int], *, width: int, temperature: float = 10_000.0) -> np.ndarray:
  """The fixed table of big_vision (arXiv 2205.01580, section 2): sin x, cos x, sin y, cos y, a quarter each.

  Frequencies are temperature ** (-i / (width / 4 - 1)), the last one 1 / temperature; x is the column.

  Returns:
    [h * w, width] float32, row by row.

  Raises:
    UserError: a width that has no quarters of at least 2.
  """
  if width % 4 or width < 8:
    raise UserError(f"config.model.width={width}: sine positions need a multiple of 4, at least 8.")
  y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
  frequency = temperature ** -(np.arange(width // 4) / (width // 4 - 1))
  y, x = y[:, None] * frequency, x[:, None] * frequency
  return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def table_grid(
  tokens: int, grid: tuple[int, int] | None = None, *, wanted: tuple[int, int] | None = None
) -> tuple[int, int]:
  """The (height, width) of a table of `tokens` patches; a table that is not square needs `grid`.

  Args:
    wanted: the grid it will be resampled to, for the message only.
  """
  if grid is not None:
    if grid[0] * grid[1] != tokens:
      raise UserError(f"position table of {tokens} patches: does not fit the grid {grid[0]}x{grid[1]}.")
    return tuple(grid)
  side = math.isqrt(tokens)
  if side * side != tokens:
    target = f" to resample it to {wanted[0]}x{wanted[1]}" if wanted else ""
    raise UserError(
      f"position table of {tokens} patches: not a square ({side}x{side} has {side * side}); give its grid{target}."
    )
  return side, side


def resample_matrices(
  rule: str, *, table: tuple[int, int], grid: tuple[int, int], image: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray] | None:
  """Matrices (h x table_h, w x table_w) from the learned `table` to the wanted `grid`; None is the identity.

  Args:
    rule: "dino" (DINO, DINOv2 without registers): cubic a = -0.75, borders clamped, scale (n + 0.1) / sqrt(N);
      "msn": the same kernel, one scale sqrt(n / N) for both axes, skipped when the counts are equal; n / g of each axis
      for rectangles, which the released code does not take (own choice);
      "hf": the same kernel, scale n / g; "antialias" (timm, DINOv2 with registers): cubic a = -0.5, antialiased;
      "linear" (LOCA): linear, antialiased; "flexivit" (big_vision): the same, skipped where the counts are equal;
      "bilinear" (timm's other mode): linear without antialiasing, borders clamped; "corners" (what big_vision does once
      when it loads a file): linear between the corners of the grids.
    image: (height, width) in pixels; DINO skips the resampling only where the count is equal and the image square.

  Raises:
    UserError: unknown rule.
  """
  if rule not in RULES:
    raise UserError(f"config.model.pos_rule={rule!r}: expected one of {', '.join(RULES)}.{nearest(rule, RULES)}")
  equal_count = grid[0] * grid[1] == table[0] * table[1]
  if rule == "msn":
    if equal_count and (grid == table or grid[0] == grid[1]):
      return None
    scale = math.sqrt(grid[0] * grid[1] / (table[0] * table[1]))
    square = grid[0] == grid[1] and table[0] == table[1]
    return tuple(_cubic_clamped(n, g, scale if square else n / g) for n, g in zip(grid, table, strict=True))
  if rule == "dino":
    if equal_count and image[0] == image[1]:
      return None
    side = math.sqrt(table[0] * table[1])
    return tuple(_cubic_clamped(n, g, (n + 0.1) / side) for n, g in zip(grid, table, strict=True))
  if grid == table or (rule == "flexivit" and equal_count):
    return None
  axes = list(zip(grid, table, strict=True))
  if rule == "bilinear":
    return tuple(bilinear_matrix(g, new=n) for n, g in axes)
  if rule == "corners":
    return tuple(_corner_aligned(n, g) for n, g in axes)
  if rule == "hf":
    return tuple(_cubic_clamped(n, g, n / g) for n, g in axes)
  kernel = _cubic_half if rule == "antialias" else _triangle
  return tuple(_antialiased(n, g, kernel) for n, g in axes)


def _cubic_clamped(out: int, size: int, scale: float) -> np.ndarray:
  """Cubic a = -0.75, four taps, source x = (i + 0.5) / scale - 0.5, indices clamped at the border, no antialiasing."""
  matrix = np.zeros((out, size))
  for i in range(out):
    x = (i + 0.5) / scale - 0.5
    first = math.floor(x)
    for tap in range(-1, 3):
      matrix[i, min(max(first + tap, 0), size - 1)] += _cubic(abs(x - (first + tap)), -0.75)
  return matrix


def _corner_aligned(out: int, size: int) -> np.ndarray:
  """Linear, the corner places of both grids on top of each other: source x = i (size - 1) / (out - 1)."""
  x = np.linspace(0.0, size - 1.0, out)
  return np.maximum(0.0, 1.0 - np.abs(x[:, None] - np.arange(size)))


def _cubic(d: float, a: float) -> float:
  if d <= 1:
    return (a + 2) * d**3 - (a + 3) * d**2 + 1
  return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def _cubic_half(d: float) -> float:
  return _cubic(d, -0.5)


def _triangle(d: float) -> float:
  return max(0.0, 1.0 - d)


def _antialiased(out: int, size: int, kernel) -> np.ndarray:
  """The kernel stretched when shrinking, weights renormalized at the border."""
  scale = size / out
  stretch = max(scale, 1.0)
  matrix = np.array([[kernel(abs((i + 0.5) * scale - (j + 0.5)) / stretch) for j in range(size)] for i in range(out)])
  return matrix / matrix.sum(axis=1, keepdims=True)


def resample(
  table: np.ndarray,
  *,
  rule: str,
  grid: tuple[int, int],
  image: tuple[int, int],
  xp=np,
  table_shape: tuple[int, int] | None = None,
):
  """[N, D] learned patch positions to [h * w, D]; the result is float32 under jax.numpy."""
  source = table_grid(table.shape[0], table_shape, wanted=grid)
  matrices = resample_matrices(rule, table=source, grid=grid, image=image)
  if matrices is None:
    return table
  height, width = (xp.asarray(m, dtype=table.dtype) for m in matrices)
  square = table.reshape(*source, table.shape[-1])
  kwargs = {} if xp is np else {"precision": "highest"}
  return xp.einsum("ih,jw,hwd->ijd", height, width, square, **kwargs).reshape(-1, table.shape[-1])
