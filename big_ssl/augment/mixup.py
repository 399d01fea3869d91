"""Mixup and cutmix: one draw per step, partners are neighbors in the batch.

  x'_i = a x_i + (1 - a) x_{i-1},   a = max(b, 1 - b),   b ~ Beta(alpha, alpha)      mixup (arXiv 1710.09412)
  x'_i = m x_i + (1 - m) x_{i-1},   m = 0 in a box, 1 elsewhere                      cutmix (arXiv 1905.04899)

Mixup as in big_vision's recipes, cutmix as in timm's: the box is drawn for an area of 1 - b and clipped by the image, and a is
then the exact mean of m. Targets are mixed alike. A loss that is linear in its targets, as all cross-entropies are, is then the same mixture of the
loss on the labels and that on the rolled labels, which needs no soft labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array


def draw(key: Array, *, alpha: float) -> Array:
  """The share a of an image in its mixture: a float32 scalar in [0.5, 1], the same for the whole batch.

  Args:
    key: of this step.
    alpha: positive; 1 draws evenly, less keeps most images nearly whole.
  """
  beta = jax.random.beta(key, alpha, alpha)
  return jnp.maximum(beta, 1.0 - beta)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """How the images of a step are mixed: `mask` [H, W, 1] is an image's own part of every pixel, `share` that of its label."""

  mask: Array
  share: Array


def draw_mixture(key: Array, *, mixup: float, cutmix: float, switch: float, size: tuple[int, int]) -> Mixture:
  """A mixup or a cutmix, the latter with probability `switch` where both have an alpha.

  Args:
    key: of this step.
    mixup, cutmix: alphas; 0 is none, one at least is positive.
    switch: in [0, 1].
    size: H, W.
  """
  keys = jax.random.split(key, 3)
  if cutmix:
    mask = cut_mask(keys[1], alpha=cutmix, size=size)
    cut = Mixture(mask, jnp.mean(mask))
    if not mixup:
      return cut
  share = draw(keys[0], alpha=mixup)
  even = Mixture(jnp.full((*size, 1), share), share)
  if not cutmix:
    return even
  use_cut = jax.random.uniform(keys[2]) < switch
  return Mixture(jnp.where(use_cut, cut.mask, even.mask), jnp.where(use_cut, cut.share, even.share))


def cut_mask(key: Array, *, alpha: float, size: tuple[int, int]) -> Array:
  """[H, W, 1] float32: 0 in a box about a random pixel, 1 outside of it.

  Its sides are the image's times sqrt(1 - b), b ~ Beta(alpha, alpha), in whole pixels, and what lies outside of the image
  is lost (timm).
  """
  beta_key, center_key = jax.random.split(key)
  side = jnp.sqrt(1.0 - jax.random.beta(beta_key, alpha, alpha))
  along = []
  for n, draw_center in zip(size, jax.random.uniform(center_key, (2,)), strict=True):
    center = jnp.minimum((draw_center * n).astype(jnp.int32), n - 1)
    half = (n * side).astype(jnp.int32) // 2
    pixels = jnp.arange(n)
    along.append((pixels >= center - half) & (pixels < center + half))
  return 1.0 - (along[0][:, None] & along[1]).astype(jnp.float32)[..., None]


def mix(x: Array, *, share: Array) -> Array:
  """share x_i + (1 - share) x_{i-1} over the rows of x [B, ...]; row 0 is mixed with the last one.

  `share` is a scalar, or broadcasts against a row, such as `Mixture.mask`.
  """
  return share * x + (1.0 - share) * jnp.roll(x, 1, axis=0)


def mixed_loss(loss: Callable[[Array], Array], *, labels: Array, share: Array) -> Array:
  """The loss on mixed targets: share loss(labels) + (1 - share) loss(the partners' labels).

  Args:
    loss: of integer labels [B], linear in the one-hot targets they stand for; rows without a label (-1) are its affair.
    labels: [B].
    share: as for `mix`.
  """
  return share * loss(labels) + (1.0 - share) * loss(jnp.roll(labels, 1))
