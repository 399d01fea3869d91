"""Backbone outputs as maps: what segmentation, label propagation and the pictures read, at any image size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, UserError, sides
from big_ssl.models.vit import ViT


def stride(module: object) -> tuple[int, int]:
  """Pixels per token, vertically and horizontally; (1, 1) for a network that takes any size."""
  return sides(getattr(module, "patch", None) or 1)


def pad_to_stride(images: Array, *, module: object) -> Array:
  """Zeros at the bottom and right of [N, H, W, C], up to whole patches (Segmenter, arXiv 2105.05633, public code)."""
  rows, columns = stride(module)
  return jnp.pad(images, ((0, 0), (0, -images.shape[1] % rows), (0, -images.shape[2] % columns), (0, 0)))


def patch_map(trunk, images: Array, *, layers: int = 1) -> Array:
  """[N, h, w, D] float32 features of the patches, without CLS and registers; images [N, H, W, C] are padded to whole patches.

  Args:
    trunk: a `core.method.Trunk`.
    layers: 1 is the backbone's "tokens", normed, or its last stage where it has none. L > 1 concatenates the normed
      tokens of the last L blocks of a ViT, or the last L stages, enlarged to the first of them by nearest neighbors.

  Raises:
    UserError: fewer layers than asked for.
  """
  images = pad_to_stride(images, module=trunk.module)
  if layers > 1 and isinstance(trunk.module, ViT):
    return _block_maps(trunk, images, layers)
  out = trunk(images)
  if layers > 1 or "tokens" not in out:
    return _stage_maps(out["stages"], layers)
  patch = getattr(trunk.module, "patch", None)
  grid = _grid(images, trunk.module) if patch else out["stages"][-1].shape[1:3]
  return out["tokens"].reshape(len(images), *grid, -1).astype(jnp.float32)


def _grid(images: Array, module: object) -> tuple[int, int]:
  return tuple(side // step for side, step in zip(images.shape[1:3], stride(module), strict=True))


def _block_maps(trunk, images: Array, layers: int) -> Array:
  depth, grid = trunk.module.size().depth, _grid(images, trunk.module)
  if layers > depth:
    raise UserError(f"config.evals: the last {layers} blocks asked for, config.model has {depth}.")
  chosen = tuple(range(depth - layers, depth))
  tokens = trunk(images, token_layers=chosen)["token_layers_normed"]
  joined = jnp.concatenate([tokens[i][:, -grid[0] * grid[1] :] for i in chosen], axis=-1)
  return joined.reshape(len(images), *grid, -1).astype(jnp.float32)


def _stage_maps(stages: tuple[Array, ...], layers: int) -> Array:
  if layers > len(stages):
    raise UserError(f"config.evals: the last {layers} stages asked for, config.model has {len(stages)}.")
  maps = [x.astype(jnp.float32) for x in stages[-layers:]]
  enlarge = lambda x: jax.image.resize(x, (*maps[0].shape[:3], x.shape[-1]), "nearest")
  return jnp.concatenate([enlarge(x) for x in maps], axis=-1)


def class_attention(trunk, images: Array, *, layer: int = -1) -> Array:
  """[N, heads, h, w] float32 attention of CLS to the patches in a block; the mean over queries without a CLS.

  Registers and CLS take their share, so that the sum over the patches is below 1.

  Raises:
    UserError: a backbone other than a ViT, or a block that it does not have.
  """
  module = trunk.module
  if not isinstance(module, ViT):
    raise UserError(f"config.model.name: {type(module).__name__} has no attention of CLS to patches in every block; vit has.")
  images, depth = pad_to_stride(images, module=module), module.size().depth
  if not -depth <= layer < depth:
    raise UserError(f"attention of block {layer}: config.model has {depth}.")
  attention = trunk(images, attention_layers=(layer % depth,))["attention"][layer % depth].astype(jnp.float32)
  from_cls = attention[:, :, 0] if module.class_token else attention.mean(axis=2)  # [N, heads, T]
  grid = _grid(images, module)
  return from_cls[..., -grid[0] * grid[1] :].reshape(*from_cls.shape[:2], *grid)
