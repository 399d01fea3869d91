"""Positions of packed patches: each token has its row and column, and the grid of its image; NaViT's and NaFlex's rules."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError, nearest

KINDS = ("learned", "sincos", "fourier", "table")
COORDINATES = ("absolute", "fractional", "fractional_aspect")
COMBINE = ("sum", "product", "stack")


class TokenPositions(nn.Module):
  """Position embeddings of patches of any image (arXiv 2307.06304, section 2.1).

  Factorized: phi_y(row) and phi_x(column), combined. A coordinate is a number of the patch, or a share of the side of the
  image. A learned phi reads shares by linear interpolation between the entries of its table, at y n - 1/2 for a share
  y = (row + 1/2) / h, clamped at the ends (the paper does not say; as timm's factorized positions).

  Attributes:
    width: D.
    entries: of the tables (rows, columns).
    kind: of phi: "learned"; "sincos", sines of the number of the patch (or of its share times the entries); "fourier",
      [sin, cos](2 pi W y) with learned W ~ N(0, `sigma`), then an MLP (y is a share, or the number by the entries);
      "table", not factorized: a learned [rows, columns, D], resized to the grid of each image, linearly and antialiased
      (NaFlex, arXiv 2502.14786, public code).
    coordinates: "absolute"; "fractional"; "fractional_aspect", shares of the longer side on both axes.
    combine: "sum", "product", or "stack", half of the width each.
    dtype: of the result.
  """

  width: int
  entries: tuple[int, int]
  kind: str = "learned"
  coordinates: str = "fractional"
  combine: str = "sum"
  sigma: float = 1.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, y: Array, x: Array, grid: Array) -> Array:
    """y, x: [..., T] integers, grid: [..., T, 2] (height, width) of the token's image -> [..., T, D]."""
    self._check()
    if self.kind == "table":
      table = self.param("table", nn.initializers.normal(self.width**-0.5), (*self.entries, self.width), jnp.float32)
      rows, columns = (_resized(c, grid[..., i], n) for i, (c, n) in enumerate(zip((y, x), self.entries, strict=True)))
      weights = (rows[..., :, None] * columns[..., None, :]).reshape(*y.shape, -1)
      return _read(weights, table.reshape(-1, self.width)).astype(self.dtype)
    if self.coordinates == "fractional_aspect":
      grid = jnp.max(grid, axis=-1, keepdims=True).repeat(2, axis=-1)
    axes = [self._axis(name, c, grid[..., i], self.entries[i]) for i, (name, c) in enumerate((("y", y), ("x", x)))]
    if self.combine == "stack":
      return jnp.concatenate(axes, axis=-1).astype(self.dtype)
    return (axes[0] + axes[1] if self.combine == "sum" else axes[0] * axes[1]).astype(self.dtype)

  def _axis(self, name: str, coordinate: Array, side: Array, entries: int) -> Array:
    """[..., T] -> [..., T, D], or half of D where the axes are stacked."""
    width = self.width // 2 if self.combine == "stack" else self.width
    absolute = self.coordinates == "absolute"
    real = jnp.promote_types(jnp.float32, jnp.dtype(self.dtype))
    share = coordinate.astype(real) / entries if absolute else (coordinate + 0.5).astype(real) / side
    if self.kind == "fourier":
      frequency = self.param(f"{name}_frequency", nn.initializers.normal(self.sigma), (width // 2,), jnp.float32)
      angle = 2 * math.pi * share[..., None] * frequency
      waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
      hidden = nn.gelu(nn.Dense(width, name=f"{name}_fc1", dtype=real)(waves))
      return nn.Dense(width, name=f"{name}_fc2", dtype=real)(hidden)
    if self.kind == "sincos":
      frequency = 10_000.0 ** -(jnp.arange(width // 2, dtype=real) / (width // 2))
      angle = share[..., None] * entries * frequency
      return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    table = self.param(name, nn.initializers.normal(0.02), (entries, width), jnp.float32)
    if absolute:  # beyond the table there is no position, and no neighbor's is taken for it
      return jnp.take(table, coordinate, axis=0, mode="fill", fill_value=jnp.nan).astype(real)
    place = jnp.clip(share * entries - 0.5, 0, entries - 1)
    return _read(jnp.maximum(1 - jnp.abs(place[..., None] - jnp.arange(entries)), 0), table)

  def _check(self) -> None:
    for path, value, options in (
      ("pos_kind", self.kind, KINDS),
      ("pos_coordinates", self.coordinates, COORDINATES),
      ("pos_combine", self.combine, COMBINE),
    ):
      if value not in options:
        raise UserError(f"config.model.{path}={value!r}: expected one of {', '.join(options)}.{nearest(value, options)}")
    if self.width % 4:
      raise UserError(f"config.model.width={self.width}: positions need a multiple of 4.")


def _resized(coordinate: Array, side: Array, entries: int) -> Array:
  """Weights [..., n] of the entries of an axis that is resized to `side` samples: triangle, antialiased, normalized."""
  scale = entries / side.astype(jnp.float32)[..., None]
  place = (coordinate[..., None] + 0.5) * scale - 0.5
  weights = jnp.maximum(1 - jnp.abs(place - jnp.arange(entries)) / jnp.maximum(scale, 1), 0)
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _read(weights: Array, table: Array) -> Array:
  return jnp.matmul(weights, table.astype(weights.dtype), precision=jax.lax.Precision.HIGHEST)
