"""What the methods on packed images share: views of native aspect, their sequences, one trunk over all of them.

Each crop keeps its aspect; its side R is drawn, small ones more often, part of its patches is dropped, and the crops of a
shard of the batch are packed into sequences (`core.packing.Packing`; NaViT, arXiv 2307.06304).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from big_ssl.augment import patches
from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD
from big_ssl.core.method import Augment, View
from big_ssl.core.packing import Packing, PackingFields
from big_ssl.core.types import Array, Params, Size, UserError
from big_ssl.methods.parts import center_view, check_channels, normalize
from big_ssl.models.encoder import encode
from big_ssl.models.navit import NaViT


@dataclasses.dataclass(frozen=True)
class Unpacked:
  """Outputs of packed views, a row per image.

  Attributes:
    views: "pooled" [B, D] and "projection" [B, K] of each view, images in the order of the batch.
    padding: share of the tokens that are of no image.
  """

  views: tuple[dict[str, Array], ...]
  padding: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedImages(PackingFields):
  """Packed views, the evaluation view and the trunk; to be mixed into a `Method` that has an `encoder`.

  Attributes, besides those of `core.packing.PackingFields`:
    scale, ratio: of the training crop, share of the area and width/height; color_strength: of the jitter, 0 is none.
    size: of the evaluation crop.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side kept in evaluation.
  """

  scale: tuple[float, float] = (0.3, 1.0)
  ratio: tuple[float, float] = (0.5, 2.0)
  color_strength: float = 0.0
  size: Size = 224
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  def __post_init__(self):
    super().__post_init__()
    check_channels(self)
    if not isinstance(self.model, NaViT):
      if self.model is not None:
        raise UserError(f"config.model.name: packed sequences need navit, found {type(self.model).__name__}.")
      return
    table = self.model.image_size // self.model.patch
    if self.model.pos_coordinates == "absolute" and self.packing.grid_limit > table:
      raise UserError(
        f"config.model.image_size={self.model.image_size}: positions of {table} patches per side, but images may have"
        f" {self.packing.grid_limit}; lower config.method.max_grid or take pos_coordinates='fractional'."
      )

  @property
  def packing(self) -> Packing:
    return Packing(patch=self.model.patch, **{f.name: getattr(self, f.name) for f in dataclasses.fields(PackingFields)})

  def packed_view(self, name: str, *operations: Augment) -> View:
    """Crops of native aspect that pass the photometric `operations` and are normalized; each name has its own draws."""
    packing = self.packing
    return View(
      name=name,
      size=packing.grid_limit * packing.patch,
      scale=self.scale,
      ratio=self.ratio,
      augment=(*operations, *normalize(self)),
      packing=packing,
    )

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  def init_encoder(self, rng: Array, crops: Array) -> Params:
    """crops: [B, 1, H, W, C], a packed view of any images."""
    corner = crops[:, 0, : 2 * self.model.patch, : 2 * self.model.patch]
    return self.encoder.init(rng, corner, train=False)["params"]

  def encode_packed(self, params: Params, batch: dict[str, Array], names: Sequence[str], *, rng: Array) -> Unpacked:
    """The encoder in training on the packed views `names`, all in one batch.

    The sequences of the views alternate, so that over a mesh every device keeps those of the images it has.
    """
    plans = [batch[f"{name}_plan"] for name in names]
    each = [patches.pack_native(batch[name][:, 0], plan, patch=self.model.patch) for name, plan in zip(names, plans, strict=True)]
    sequences = jax.tree.map(lambda *views: jnp.stack(views, axis=1).reshape(-1, *views[0].shape[1:]), *each)
    out = encode(self.encoder, params["encoder"], {}, sequences, train=True, rng=rng).out
    # [rows V, E, D] -> [rows, V, E, D]
    split = {key: out[key].reshape(-1, len(names), *out[key].shape[1:]) for key in ("pooled", "projection")}
    views = tuple({key: patches.unpack_images(x[:, v], plan) for key, x in split.items()} for v, plan in enumerate(plans))
    return Unpacked(views, patches.padding(sequences.segment))

  def encode_images(self, params: Params, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's pooled output of single evaluation crops, and the head's."""
    out = encode(self.encoder, params["encoder"], {}, batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "projection": out["projection"]}
