"""Supervised baseline: softmax cross-entropy on labels, the yardstick beside the self-supervised methods.

Recipe of the plain ViT baseline (arXiv 2205.01580): random resized crop, flip, cosine schedule; the classifier reads the
backbone's pooled output, and evaluation reads the same output as every other method does.
"""

from __future__ import annotations

import dataclasses

import jax

from big_ssl.augment import mixup
from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD, ColorJitter
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Size, UserError
from big_ssl.losses import classify
from big_ssl.methods.parts import center_view, check_channels, check_least, check_patches, normalize
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
    mixup: alpha of its Beta(alpha, alpha), 0 is none; one share per step (`augment.mixup`).
    sigmoid: sigmoid cross-entropy summed over the classes in place of softmax, and a classifier whose biases start at -10
      (big_vision's ImageNet-21k).
    size, scale: of the training crop; color_strength: of the jitter, 0 is none.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side kept in evaluation.
  """

  hidden_layers: int = 0
  zero_init: bool = False
  label_smoothing: float = 0.0
  mixup: float = 0.0
  sigmoid: bool = False
  size: Size = 224
  scale: tuple[float, float] = (0.08, 1.0)
  color_strength: float = 0.0
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  accumulation_reason = "config.method.mixup mixes the images of the whole batch with one share"

  def __post_init__(self):
    check_channels(self)
    check_least(self, mixup=0.0)
    if getattr(self.model, "patch_sizes", ()):
      check_patches(self, "size")

  @property
  def supports_accumulation(self) -> bool:
    return not self.mixup

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
    bias = -10.0 if self.sigmoid else 0.0
    head = Classifier(self.num_classes, hidden=hidden, zero_init=self.zero_init, bias_init=bias)
    return Encoder(backbone=self.model, head=head)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    if self.num_classes < 2:
      raise UserError(f"config.method.name='supervised': needs labels of at least 2 classes, the data has {self.num_classes}.")
    variables = self.encoder.init(rng, batch["crop"][:, 0], train=False)
    return {"encoder": variables["params"]}, {"batch_stats": variables.get("batch_stats", {})}

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    images = batch["crop"][:, 0]
    if self.mixup:
      rng, key = jax.random.split(rng)
      share = mixup.draw(key, alpha=self.mixup)
      images = mixup.mix(images, share=share)
    encoded = encode(self.encoder, params["encoder"], extra["batch_stats"], images, train=True, rng=rng)
    logits = encoded.out["projection"]  # [B, K]
    cross_entropy = classify.sigmoid_cross_entropy if self.sigmoid else classify.cross_entropy
    on = lambda labels: cross_entropy(logits, labels=labels, label_smoothing=self.label_smoothing)
    loss = mixup.mixed_loss(on, labels=batch["label"], share=share) if self.mixup else on(batch["label"])
    metrics = {"accuracy": classify.accuracy(logits, labels=batch["label"])} | health.embedding(encoded.out["pooled"])
    return loss, ({"batch_stats": encoded.batch_stats}, jax.lax.stop_gradient(metrics))

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's pooled output, and the class logits."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "logits": out["projection"]}
