"""Runs the photometric operations of all views of a batch; every image has its own key, wherever it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array


def augment_views(views: Sequence[Any], cut: Mapping[str, Array], key: Array, *, row: Array) -> dict[str, Array]:
  """Augments the cut views.

  Row r of copy c of view v has the key fold_in(fold_in(fold_in(key, v), c), r), split among its operations: the numbers
  depend neither on the sharding nor on how the batch is split.

  Args:
    views: the `View`s of an `Inputs`, in its order.
    cut: view.name -> [B, count, H, W, C] float32 in [0, 1].
    key: of this step.
    row: [B] rows of the global batch.

  Returns:
    view.name -> [B, count, H, W, C] float32.
  """
  result = {}
  for number, view in enumerate(views):
    images = cut[view.name].astype(jnp.float32)
    if view.augment:
      keys = _keys(jax.random.fold_in(key, number), row, images.shape[1])
      images = jax.vmap(jax.vmap(lambda k, image, view=view: _augment(view, k, image)))(keys, images)
    result[view.name] = images
  return result


def validate(views: Sequence[Any], channels: int) -> None:
  """Raises `UserError`, naming view and operation, when images of `channels` channels cannot pass `views`."""
  for view in views:
    for operation in view.augment:
      check = getattr(operation, "validate", None)
      if check is not None:
        check(channels, view=view.name)


def _keys(key: Array, row: Array, count: int) -> Array:
  """[B, count] keys."""
  copies = jax.vmap(lambda copy: jax.random.fold_in(key, copy))(jnp.arange(count))
  return jax.vmap(lambda r: jax.vmap(lambda copy: jax.random.fold_in(copy, r))(copies))(row)


def _augment(view: Any, key: Array, image: Array) -> Array:
  for operation, one in zip(view.augment, jax.random.split(key, len(view.augment))):
    image = operation(one, image)
  return image
