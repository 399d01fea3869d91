"""Supervised baseline: softmax cross-entropy on labels, the yardstick beside the self-supervised methods.

Recipe of the plain ViT baseline (arXiv 2205.01580): random resized crop, flip, cosine schedule; the classifier reads the
backbone's pooled output, and evaluation reads the same output as every other method does.
"""

from __future__ import annotations

import dataclasses

import jax

from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD, ColorJitter
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Size, UserError
from big_ssl.losses import classify
from big_ssl.methods.parts import center_view, check_channels, normalize
from big_ssl.models.encoder import Encoder, encode
from big_ssl.models.heads import Classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(Method):
  """Classification of `label`.

  Attributes:
    hidden_layers: layers as wide as the trunk, with BN and ReLU, between it and the classifier. With 1 a run that starts
      from PAWS keeps the first layer of its projection head, as its fine-tuning does (arXiv 2104.13963, released code).
    zero_init: the classifier starts at 0.
    label_smoothing: s; the target is 1 - s + s/K on the class and s/K elsewhere.
    size, scale: of the training crop; color_strength: of the jitter, 0 is none.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side kept in evaluation.
  """

  hidden_layers: int = 0
  zero_init: bool = False
  label_smoothing: float = 0.0
  size: Size = 224
  scale: tuple[float, float] = (0.08, 1.0)
  color_strength: float = 0.0
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  supports_accumulation = True

  def __post_init__(self):
    check_channels(self)

  def inputs(self) -> Inputs:
    s = self.color_strength
    jitter = (ColorJitter(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8),) if s else ()
    view = View(name="crop", size=self.size, scale=self.scale, augment=(*jitter, *normalize(self)))
    return Inputs(views=(view,), keys=("label",))

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  @property
  def encoder(self) -> Encoder:
    hidden = (0,) * self.hidden_layers
    return Encoder(backbone=self.model, head=Classifier(self.num_classes, hidden=hidden, zero_init=self.zero_init))

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    if self.num_classes < 2:
      raise UserError(f"config.method.name='supervised': needs labels of at least 2 classes, the data has {self.num_classes}.")
    variables = self.encoder.init(rng, batch["crop"][:, 0], train=False)
    return {"encoder": variables["params"]}, {"batch_stats": variables.get("batch_stats", {})}

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    encoded = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["crop"][:, 0], train=True, rng=rng)
    logits = encoded.out["projection"]  # [B, K]
    loss = classify.cross_entropy(logits, labels=batch["label"], label_smoothing=self.label_smoothing)
    metrics = {"accuracy": classify.accuracy(logits, labels=batch["label"])} | health.embedding(encoded.out["pooled"])
    return loss, ({"batch_stats": encoded.batch_stats}, jax.lax.stop_gradient(metrics))

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's pooled output, and the class logits."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "logits": out["projection"]}
