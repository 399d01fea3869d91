"""Backbone and head as one module, so that student, teacher and EMA trees are the same tree."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_ssl.core.types import Array, Params, PyTree, UserError
from big_ssl.models import packed
from big_ssl.ops.sharded import over_devices


class Encoder(nn.Module):
  """`head(backbone(images)[output])`; parameters {"backbone": ..., "head": ...} and, where there is one, "predictor".

  Attributes:
    backbone: a `Backbone`.
    head: any module called as `head(features, train=...)`, or None.
    output: the backbone output that the head reads.
    predictor: a second head on top of the first (BYOL, MoCo v3), called alike; None in the teacher, whose tree is the rest.
  """

  backbone: nn.Module
  head: nn.Module | None = None
  output: str = "pooled"
  predictor: nn.Module | None = None

  def __call__(self, images: Array, *, train: bool, **kwargs: Any) -> dict[str, Array]:
    """Returns the backbone's outputs, "projection" of the head and "prediction" of the predictor. images: [N, H, W, C]."""
    out = self.backbone(images, train=train, **kwargs)
    if self.head is not None:
      out = out | {"projection": self.head(out[self.output], train=train)}
    if self.predictor is not None:
      out = out | {"prediction": self.predictor(out["projection"], train=train)}
    return out

  def crops(self, groups: Sequence[Array], *, train: bool, **kwargs: Any) -> dict[str, Array]:
    """One backbone batch per resolution, the head once over all rows; see `encode_crops`."""
    images, keys = groups[0].shape[0], dict.fromkeys(("pooled", self.output))
    split = lambda rows: rows.reshape(images, -1, *rows.shape[1:])  # [B*V, ...] -> [B, V, ...]
    outs = []
    for _, run in itertools.groupby(groups, key=lambda views: views.shape[2:]):
      views = jnp.concatenate(list(run), axis=1)
      flat = self.backbone(views.reshape(-1, *views.shape[2:]), train=train, **kwargs)
      outs.append({key: split(flat[key]) for key in keys})
    out = {key: jnp.concatenate([o[key] for o in outs], axis=1) for key in keys}
    if self.head is not None:
      rows = out[self.output]
      out["projection"] = split(self.head(rows.reshape(-1, *rows.shape[2:]), train=train))
    return {key: jnp.swapaxes(value, 0, 1) for key, value in out.items()}


def as_teacher(encoder: Encoder) -> Encoder:
  """The same encoder without predictor and stochastic depth, for the slow copy of BYOL and MoCo."""
  backbone = encoder.backbone
  if getattr(backbone, "drop_path", 0):
    backbone = backbone.clone(drop_path=0.0)
  return encoder.clone(backbone=backbone, predictor=None)


def teacher_tree(tree: PyTree) -> PyTree:
  """The part of an encoder's parameters or batch statistics that `as_teacher` has."""
  return {name: branch for name, branch in tree.items() if name != "predictor"}


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Outputs of an encoder, and its batch statistics afterwards."""

  out: dict[str, Any]
  batch_stats: PyTree


def encode(
  encoder: Encoder,
  params: Params,
  batch_stats: PyTree,
  images: Array,
  *,
  train: bool,
  rng: Array | None = None,
  **kwargs: Any,
) -> Encoded:
  """Applies an encoder as a pure function; in training the batch statistics move, otherwise they are used as they are.

  Args:
    images: [N, H, W, C].
    rng: key of stochastic depth and dropout; needed only where the backbone has some.
    **kwargs: passed to the backbone, such as keep=indices.
  """
  return _apply(encoder, params, batch_stats, images, train=train, rng=rng, **kwargs)


def encode_crops(
  encoder: Encoder,
  params: Params,
  batch_stats: PyTree,
  groups: Sequence[Array],
  *,
  train: bool,
  rng: Array | None = None,
  pack: int = 0,
  **kwargs: Any,
) -> Encoded:
  """The multi-crop forward pass of SwAV and DINO (arXiv 2006.09882, 2104.14294; public code).

  Consecutive groups of one size are one backbone batch, and the batch statistics pass through the batches in order. The
  head sees all crops at once: its BN normalizes over every crop of every resolution. Inside a batch the crops of an image
  are neighbors, so that over a mesh each device works on the images it holds, and none is moved.

  Args:
    groups: [B, V_g, H_g, W_g, C], one per kind of crop.
    rng: key of stochastic depth; the backbone batches draw independently.
    pack: crops of so many images share sequences, see `encode_packed`; 0 does not pack.
    **kwargs: passed to the backbone for every batch.

  Returns:
    "pooled", the output that the head reads and "projection", [V, B, ...]: the crops in the order of the groups. Packed
    also "padding", the share of tokens that belong to no crop.
  """
  if pack and len({views.shape[2:] for views in groups}) > 1:
    return encode_packed(encoder, params, batch_stats, groups, pack=pack, train=train, rng=rng, **kwargs)
  return _apply(encoder, params, batch_stats, tuple(groups), train=train, rng=rng, method=Encoder.crops, **kwargs)


def encode_packed(
  encoder: Encoder,
  params: Params,
  batch_stats: PyTree,
  groups: Sequence[Array],
  *,
  pack: int,
  train: bool,
  rng: Array | None = None,
  keeps: Sequence[Array | None] | None = None,
  head_per_group: bool = False,
  **kwargs: Any,
) -> Encoded:
  """`encode_crops` with the crops of `pack` images in common sequences of a ViT (`models.packed`); the same results.

  Args:
    keeps: per group the patches that stay, for rows [B * V_g] image by image; None keeps all.
    head_per_group: the head sees each group as a batch of its own, in order, instead of all crops at once.

  Raises:
    UserError: a backbone other than a ViT, or a head that reads an output that packing does not give.
  """
  rngs = _rngs(rng)
  run = packed.run_groups(
    encoder.backbone, params["backbone"], groups, images=pack, train=train, rngs=rngs, keeps=keeps, **kwargs
  )
  images, heads = groups[0].shape[0], batch_stats.get("head", {})
  split = lambda rows: rows.reshape(images, -1, *rows.shape[1:])  # [B*V, ...] -> [B, V, ...]
  keys = dict.fromkeys(("pooled", encoder.output))
  if encoder.output not in run.groups[0]:
    raise UserError(f"config.method.pack_crops={pack}: packed crops have no '{encoder.output}'; use 0.")
  out = {key: jnp.concatenate([split(o[key]) for o in run.groups], axis=1) for key in keys}
  if encoder.head is not None:
    rows = [split(o[encoder.output]) for o in run.groups] if head_per_group else [out[encoder.output]]
    projected = []
    for views in rows:
      variables = {"params": params["head"], "batch_stats": heads}
      flat = views.reshape(-1, *views.shape[2:])
      y, updated = encoder.head.apply(variables, flat, train=train, rngs=rngs, mutable=["batch_stats"] if train else [])
      heads = updated.get("batch_stats", heads)
      projected.append(split(y))
    out["projection"] = jnp.concatenate(projected, axis=1)
  out = {key: jnp.swapaxes(value, 0, 1) for key, value in out.items()} | {"padding": jnp.float32(run.padding)}
  return Encoded(out, batch_stats | {"head": heads} if heads else batch_stats)


def crop_major(views: Array) -> Array:
  """[B, V, ...] -> [V*B, ...]: all images of view 0, then of view 1; over a mesh the rows stay spread evenly."""
  return over_devices(jnp.swapaxes(over_devices(views), 0, 1).reshape(-1, *views.shape[2:]))


def copy_tree(tree: PyTree) -> PyTree:
  """Own buffers for a teacher that starts as its student: two entries of a donated state must not share one."""
  return jax.tree.map(jnp.copy, tree)


def _rngs(rng: Array | None) -> dict[str, Array]:
  return {} if rng is None else {"drop_path": rng, "dropout": jax.random.fold_in(rng, 1)}


def _apply(
  encoder: Encoder, params: Params, batch_stats: PyTree, inputs: Any, *, train: bool, rng: Array | None, **kwargs: Any
) -> Encoded:
  rngs = _rngs(rng)
  variables = {"params": params, "batch_stats": batch_stats}
  if not train:
    return Encoded(encoder.apply(variables, inputs, train=False, rngs=rngs, **kwargs), batch_stats)
  out, updated = encoder.apply(variables, inputs, train=True, rngs=rngs, mutable=["batch_stats"], **kwargs)
  return Encoded(out, updated.get("batch_stats", {}))
