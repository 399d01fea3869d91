"""All crops of a few images in common sequences of a ViT, so that crops of every size are one batch.

The base is Patch n' Pack (NaViT, arXiv 2307.06304): the tokens of a crop, its CLS and registers included, are one segment
of a sequence, and attention is masked to segments. Sizes of crops are static, so the plan is made while the step is
traced. Embedding before the blocks, and norm and pooling after them, are the model's own, crop size by crop size; the
results are those of separate batches within rounding. Stochastic depth is drawn per sequence, not per crop.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from big_ssl.core.packing import PADDING, first_fit
from big_ssl.core.types import Array, Params, UserError
from big_ssl.models.attention import segment_mask
from big_ssl.models.vit import ViT, _Layers
from big_ssl.ops.sharded import batch_devices


@dataclasses.dataclass(frozen=True)
class CropPlan:
  """Where the S tokens of a set of images go.

  Attributes:
    token: [R, T] int32, number of the token in the set; -1 is padding.
    segment: [R, T] int32, number of the crop in its sequence; -1 is padding.
    place: [S] int32, where a token is in the R T places.
  """

  token: np.ndarray
  segment: np.ndarray
  place: np.ndarray

  @property
  def padding(self) -> float:
    """Share of the places that no token has."""
    return float(np.mean(self.token < 0))


@functools.lru_cache(maxsize=64)
def plan_crops(crops: tuple[tuple[int, int], ...], *, images: int) -> CropPlan:
  """Packs all crops of `images` images into sequences as long as the longest crop, the longest ones first.

  Args:
    crops: (number per image, tokens) of each kind. The tokens of a set are in the order of kind, image, crop, token.
  """
  lengths = np.repeat([length for _, length in crops], [count * images for count, _ in crops])
  starts = np.cumsum(lengths) - lengths
  order = np.argsort(-lengths, kind="stable")
  capacity = int(lengths.max())
  placed = first_fit(lengths[order], capacity=capacity)
  token, segment = np.full((2, int(placed.row.max()) + 1, capacity), PADDING, np.int32)
  for crop, row, slot, start in zip(order, placed.row, placed.slot, placed.start, strict=True):
    where = slice(start, start + lengths[crop])
    token[row, where] = starts[crop] + np.arange(lengths[crop])
    segment[row, where] = slot
  place = np.empty(int(lengths.sum()), np.int32)
  place[token[token >= 0]] = np.flatnonzero(token >= 0)
  return CropPlan(token, segment, place)


@dataclasses.dataclass(frozen=True)
class GroupOutputs:
  """The model's outputs for every group of crops, rows [B * V_g] image by image; and the share of padding."""

  groups: list[dict[str, Any]]
  padding: float


def run_groups(
  model: Any,
  params: Params,
  groups: Sequence[Array],
  *,
  images: int,
  train: bool,
  rngs: dict[str, Array] | None = None,
  keeps: Sequence[Array | None] | None = None,
  **kwargs: Any,
) -> GroupOutputs:
  """Runs a ViT on groups of crops, all in common sequences.

  Args:
    model, params: a `ViT` with the linear patch embedding, and its parameters.
    groups: [B, V_g, H_g, W_g, C].
    images: whose crops share sequences; divides the images of each device.
    keeps: per group the patches that stay, see `ViT`; rows of a [B * V_g, K] image by image.
    **kwargs: passed to the model for every group.

  Returns:
    What `model` returns for each group, but for "cls_layers" and attention, which are only right without packing.

  Raises:
    UserError: another backbone, a convolutional stem, or images that do not divide.
  """
  batch, devices = groups[0].shape[0], batch_devices()
  _check(model, images=images, batch=batch, devices=devices)
  keeps = [None] * len(groups) if keeps is None else keeps
  shell = functools.partial(_Shell, **{f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("parent", "name")})
  flat = [g.reshape(-1, *g.shape[2:]) for g in groups]  # [B * V, H, W, C], image by image

  def around(given: Array | None, rows: Array, keep: Array | None) -> dict[str, Any]:
    extra = {} if keep is None else {"keep": keep}
    return shell(given=given).apply({"params": params}, rows, train=train, token_layers=(0,), **extra, **kwargs)

  # 1. Tokens of every crop, [B * V, L, D], and of every set of images, [B / images, S, D].
  tokens = [around(None, rows, keep)["token_layers"][0] for rows, keep in zip(flat, keeps, strict=True)]
  plan = plan_crops(tuple((g.shape[1], t.shape[1]) for g, t in zip(groups, tokens, strict=True)), images=images)
  width, sets = tokens[0].shape[-1], batch // images
  together = jnp.concatenate([t.reshape(sets, -1, width) for t in tokens], axis=1)

  # 2. One gather into sequences, the blocks, one gather back.
  sequences, length = plan.token.shape
  x = jnp.where(plan.token.reshape(-1, 1) >= 0, jnp.take(together, np.maximum(plan.token, 0).reshape(-1), axis=1), 0)
  x = x.reshape(sets * sequences, length, width)
  segments = jnp.broadcast_to(plan.segment, (sets, sequences, length)).reshape(-1, length)
  x = model.apply(
    {"params": params},
    x,
    train=train,
    mask=segment_mask(segments),
    attention_layers=(),
    token_layers=(),
    method=ViT._blocks,
    rngs=rngs,
  ).last
  together = jnp.take(x.reshape(sets, sequences * length, width), plan.place, axis=1)

  # 3. What the model does after its blocks, group by group.
  ends = np.cumsum([t.shape[0] // sets * t.shape[1] for t in tokens])[:-1]
  parts = [part.reshape(t.shape) for part, t in zip(jnp.split(together, ends, axis=1), tokens, strict=True)]
  outs = [around(part, rows, keep) for part, rows, keep in zip(parts, flat, keeps, strict=True)]
  for out in outs:
    for name in ("cls_layers", "cls_layers_normed", "token_layers", "token_layers_normed"):
      out.pop(name, None)
  return GroupOutputs(outs, plan.padding)


def _check(model: Any, *, images: int, batch: int, devices: int) -> None:
  if not isinstance(model, ViT) or model.stem_channels:
    found = type(model).__name__ + (" with stem_channels" if isinstance(model, ViT) else "")
    raise UserError(f"config.method.pack_crops={images}: needs a ViT with the linear patch embedding, found {found}; use 0.")
  if images < 1 or batch % (images * devices):
    raise UserError(
      f"config.method.pack_crops={images}: must divide config.batch_size={batch}"
      + (f" on each of {devices} devices." if devices > 1 else ".")
    )


class _Shell(ViT):
  """The model without its blocks: their result is `given`, or the embedded tokens themselves."""

  given: Any = None

  def _blocks(self, x: Array, **_: Any) -> _Layers:
    last = x if self.given is None else self.given
    return _Layers(last, last[:, :1], {0: last}, {})
