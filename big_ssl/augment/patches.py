"""Images as patches, and patches of many images in common sequences: one gather there, one back, on the device."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError


@flax.struct.dataclass
class Sequences:
  """Packed patches, as `models.navit.NaViT` reads them.

  Attributes:
    patches: [B, T, P] pixels of a patch in the order (row, column, channel).
    segment: [B, T] int32, number of the image in its sequence, below E; -1 is padding.
    y, x: [B, T] int32, row and column of the patch in its image.
    grid: [B, E, 2] int32, patches (height, width) of each image, dropped ones counted; 1 where there is none.
  """

  patches: Array
  segment: Array
  y: Array
  x: Array
  grid: Array


def check(sequences: Sequences) -> None:
  """Raises `UserError` for arrays whose shapes do not belong together."""
  shape = sequences.patches.shape[:2]
  for name in ("segment", "y", "x"):
    value = getattr(sequences, name)
    if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.integer):
      raise UserError(f"packed sequences: {name} is {value.dtype} {list(value.shape)}, the patches need integers {list(shape)}.")
  if sequences.grid.ndim != 3 or (sequences.grid.shape[0], sequences.grid.shape[2]) != (shape[0], 2):
    raise UserError(f"packed sequences: grid is {list(sequences.grid.shape)}, expected [{shape[0]}, images of a sequence, 2].")


def patchify(images: Array, patch: int) -> Array:
  """[..., H, W, C] -> [..., H // p, W // p, p * p * C], values in the order (row, column, channel); a remainder is cut off."""
  *batch, height, width, channels = images.shape
  h, w = height // patch, width // patch
  if not (h and w):
    raise UserError(f"config.model.patch={patch}: the images are {height}x{width}, smaller than one patch.")
  cut = images[..., : h * patch, : w * patch, :].reshape(*batch, h, patch, w, patch, channels)
  return jnp.swapaxes(cut, -4, -3).reshape(*batch, h, w, patch * patch * channels)


def unpatchify(patches: Array, patch: int) -> Array:
  """The inverse of `patchify`: [..., h, w, p * p * C] -> [..., h p, w p, C]."""
  *batch, h, w, values = patches.shape
  cut = patches.reshape(*batch, h, w, patch, patch, values // patch**2)
  return jnp.swapaxes(cut, -4, -3).reshape(*batch, h * patch, w * patch, values // patch**2)


def of_images(images: Array, patch: int) -> Sequences:
  """Images [N, H, W, C] as N sequences of one image each, without padding."""
  patches = patchify(images, patch)
  count, height, width, values = patches.shape
  y, x = jnp.divmod(jnp.arange(height * width, dtype=jnp.int32), width)
  spread = lambda v: jnp.broadcast_to(v, (count, height * width))
  return Sequences(
    patches=patches.reshape(count, -1, values),
    segment=jnp.zeros((count, height * width), jnp.int32),
    y=spread(y),
    x=spread(x),
    grid=jnp.broadcast_to(jnp.array([height, width], jnp.int32), (count, 1, 2)),
  )


def pack_native(images: Array, plan: dict[str, Array], *, patch: int) -> Sequences:
  """Images of native aspect, each in the top left of its canvas, as packed sequences.

  The shards of a batch (see `core.packing.Packing`) are packed each from its own images, so that over a mesh nothing
  moves between devices as long as each holds whole shards.

  Args:
    images: [G n, H, W, C], shard by shard.
    plan: `data.packing.as_batch`: "image", "segment", "y", "x" [G R, T], "grid" [G R, E, 2], "row", "slot" [G n].

  Returns:
    G R sequences; the patches of padding are 0.
  """
  shards = _shards(plan, len(images))
  patches = patchify(images, patch)  # [G n, h, w, P]
  height, width, values = patches.shape[1:]
  patches = patches.reshape(shards, -1, values)
  image, y, x = (plan[name].reshape(shards, -1) for name in ("image", "y", "x"))
  index = (jnp.maximum(image, 0) * height + y) * width + x
  packed = jnp.take_along_axis(patches, index[..., None], axis=1, mode="fill", fill_value=jnp.nan)
  packed = jnp.where((image >= 0)[..., None], packed, 0.0)
  arrays = {name: plan[name] for name in ("segment", "y", "x", "grid")}
  return Sequences(patches=packed.reshape(*plan["image"].shape, values), **arrays)


def unpack_images(features: Array, plan: dict[str, Array]) -> Array:
  """Features per sequence and segment [G R, E, D], back to one row per image, [G n, D], in the order of the batch."""
  count = plan["row"].shape[0]
  shards = _shards(plan, count)
  slots, width = features.shape[1:]
  index = plan["row"] * slots + plan["slot"]
  flat = features.reshape(shards, -1, width)
  taken = jnp.take_along_axis(flat, index.reshape(shards, -1)[..., None], axis=1, mode="fill", fill_value=jnp.nan)
  return taken.reshape(count, width)


def _shards(plan: dict[str, Array], images: int) -> int:
  """G: the plan carries it as the number of rows of "shard"."""
  shards = plan["shard"].shape[0]
  if images != plan["row"].shape[0] or images % shards or plan["image"].shape[0] % shards:
    raise UserError(
      f"packed sequences: a plan of {plan['row'].shape[0]} images in {plan['image'].shape[0]} sequences and {shards} shards"
      f" does not fit {images} images."
    )
  return shards


def padding(segment: Array) -> Array:
  """Share of the tokens [B, T] that are of no image."""
  return jnp.mean(segment < 0, dtype=jnp.float32)
