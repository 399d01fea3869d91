"""NaViT: images of native aspect and any resolution, several in one sequence, classified (arXiv 2307.06304).

Each crop keeps its aspect; its side R is drawn, small ones more often, part of its patches is dropped, and the crops of a
shard of the batch are packed into sequences (`core.packing.Packing`). One vector per image is pooled and classified:

  loss = 1/B sum_i cross-entropy(logits_i, label_i)      over images, not over sequences

The batch has a fixed number of images per step; how many tokens these are varies, and the rest is padding.
"""

from __future__ import annotations

import dataclasses

import jax

from big_ssl.augment.photometric import ColorJitter
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method
from big_ssl.core.types import Array, Extra, Metrics, Params, UserError
from big_ssl.losses import classify
from big_ssl.methods.packed import PackedImages
from big_ssl.models.encoder import Encoder
from big_ssl.models.heads import Classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaViTClassification(PackedImages, Method):
  """Classification of `label` from packed images; views and packing: see `PackedImages`.

  Attributes:
    label_smoothing: s; the target is 1 - s + s/K on the class and s/K elsewhere.
  """

  label_smoothing: float = 0.0

  accumulation_reason = "sequences hold images of a whole shard"

  def inputs(self) -> Inputs:
    s = self.color_strength
    jitter = (ColorJitter(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8),) if s else ()
    return Inputs(views=(self.packed_view("crop", *jitter),), keys=("label",))

  @property
  def encoder(self) -> Encoder:
    return Encoder(backbone=self.model, head=Classifier(self.num_classes))

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    if self.num_classes < 2:
      raise UserError(f"config.method.name='navit': needs labels of at least 2 classes, the data has {self.num_classes}.")
    return {"encoder": self.init_encoder(rng, batch["crop"])}, {}

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    encoded = self.encode_packed(params, batch, ("crop",), rng=rng)
    logits, pooled = (encoded.views[0][name] for name in ("projection", "pooled"))  # [B, K], [B, D]
    loss = classify.cross_entropy(logits, labels=batch["label"], label_smoothing=self.label_smoothing)
    metrics = {"accuracy": classify.accuracy(logits, labels=batch["label"]), "padding": encoded.padding}
    return loss, (extra, jax.lax.stop_gradient(metrics | health.embedding(pooled)))

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's pooled output of single crops, and the class logits."""
    del extra
    out = self.encode_images(params, batch)
    return {"pooled": out["pooled"], "logits": out["projection"]}
