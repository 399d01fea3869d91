"""NaViT: images of native aspect and any resolution, several in one sequence, classified (arXiv 2307.06304).

Each crop keeps its aspect; its side R is drawn, small ones more often, part of its patches is dropped, and the crops of a
shard of the batch are packed into sequences (`core.packing.Packing`). One vector per image is pooled and classified:

  loss = 1/B sum_i cross-entropy(logits_i, label_i)      over images, not over sequences

The batch has a fixed number of images per step; how many tokens these are varies, and the rest is padding.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from big_ssl.augment import patches
from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD, ColorJitter
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, View
from big_ssl.core.packing import Packing
from big_ssl.core.types import Array, Extra, Metrics, Params, Size, UserError
from big_ssl.losses import classify
from big_ssl.methods.parts import center_view, check_channels, normalize
from big_ssl.models.encoder import Encoder, encode
from big_ssl.models.heads import Classifier
from big_ssl.models.navit import NaViT


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaViTClassification(Method):
  """Classification of `label` from packed images.

  Attributes:
    tokens, shard_size, sequences, max_images, max_grid: see `core.packing.Packing`, as the next eight.
    side, side_law, side_mean, side_std: of the drawn resolution.
    drop_law, drop_rate, drop_beta, drop_center, drop_width: of the dropped patches.
    label_smoothing: s; the target is 1 - s + s/K on the class and s/K elsewhere.
    scale, ratio: of the training crop, share of the area and width/height; color_strength: of the jitter, 0 is none.
    size: of the evaluation crop.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side kept in evaluation.
  """

  tokens: int = 256
  shard_size: int = 16
  sequences: int = 8
  max_images: int = 8
  max_grid: int = 0
  side: tuple[int, int] = (64, 256)
  side_law: Literal["normal", "uniform"] = "normal"
  side_mean: float = -0.5
  side_std: float = 1.0
  drop_law: Literal["constant", "beta", "resolution", "schedule"] = "constant"
  drop_rate: tuple[float, float] = (0.0, 0.0)
  drop_beta: tuple[float, float] = (1.0, 1.0)
  drop_center: float = 1e6
  drop_width: float = 1e5
  label_smoothing: float = 0.0
  scale: tuple[float, float] = (0.3, 1.0)
  ratio: tuple[float, float] = (0.5, 2.0)
  color_strength: float = 0.0
  size: Size = 224
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  accumulation_reason = "sequences hold images of a whole shard"

  def __post_init__(self):
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
    names = {f.name for f in dataclasses.fields(Packing)} - {"patch"}
    return Packing(patch=self.model.patch, **{name: getattr(self, name) for name in names})

  def inputs(self) -> Inputs:
    s, packing = self.color_strength, self.packing
    jitter = (ColorJitter(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8),) if s else ()
    view = View(
      name="crop",
      size=packing.grid_limit * packing.patch,
      scale=self.scale,
      ratio=self.ratio,
      augment=(*jitter, *normalize(self)),
      packing=packing,
    )
    return Inputs(views=(view,), keys=("label",))

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  @property
  def encoder(self) -> Encoder:
    return Encoder(backbone=self.model, head=Classifier(self.num_classes))

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    if self.num_classes < 2:
      raise UserError(f"config.method.name='navit': needs labels of at least 2 classes, the data has {self.num_classes}.")
    crop = batch["crop"][:, 0, : 2 * self.model.patch, : 2 * self.model.patch]
    return {"encoder": self.encoder.init(rng, crop, train=False)["params"]}, {}

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    plan = batch["crop_plan"]
    sequences = patches.pack_native(batch["crop"][:, 0], plan, patch=self.model.patch)
    out = encode(self.encoder, params["encoder"], {}, sequences, train=True, rng=rng).out
    logits, pooled = (patches.unpack_images(out[name], plan) for name in ("projection", "pooled"))  # [B, K], [B, D]
    loss = classify.cross_entropy(logits, labels=batch["label"], label_smoothing=self.label_smoothing)
    metrics = {"accuracy": classify.accuracy(logits, labels=batch["label"]), "padding": patches.padding(sequences.segment)}
    return loss, (extra, jax.lax.stop_gradient(metrics | health.embedding(pooled)))

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's pooled output of single crops, and the class logits."""
    del extra
    out = encode(self.encoder, params["encoder"], {}, batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "logits": out["projection"]}
