"""Classification of labeled images: the supervised baseline, and with `config.init_from` the fine-tuning of any run.

As a baseline the recipe of the plain ViT (arXiv 2205.01580): random resized crop, flip, cosine schedule. The classifier
reads the backbone's pooled output, and evaluation reads the same output as every other method does. Fine-tuning recipes,
which are arguments of configs/finetune.py, add what follows below and in `config.optim`, `model.drop_path` and
`data.labels_share`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from big_ssl.augment import mixup
from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD, ColorJitter, GaussianBlur, Grayscale
from big_ssl.augment.rand_augment import RandAugment
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Size, UserError, sides
from big_ssl.losses import classify
from big_ssl.methods.parts import center_view, check_channels, check_least, check_patches, check_shares, normalize
from big_ssl.models.encoder import Encoder, encode
from big_ssl.models.heads import Classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised(Method):
  """Classification of `label`.

  Attributes:
    hidden_layers: with BN and ReLU, between the trunk and the classifier. With 1 a run that starts from PAWS or SimCLR v2,
      or from SwAV as SEER, keeps the first layer of its projection head (arXiv 2104.13963, 2006.10029, 2202.08360).
    hidden_dim: their width; 0 is that of the trunk.
    pre_logits: width of a linear layer with tanh before the classifier (big_vision's rep_size); 0 has none.
    zero_init: the classifier starts at 0.
    label_smoothing: s; the target is 1 - s + s/K on the class and s/K elsewhere.
    mixup, cutmix: alphas of their Beta(alpha, alpha), 0 is none; one draw per step (`augment.mixup`).
    switch_prob: share of steps with cutmix where both are on.
    sigmoid: sigmoid cross-entropy summed over the classes in place of softmax, and a classifier whose biases start at -10
      (big_vision's ImageNet-21k).
    size, scale, interpolation: of the training crop; evaluation has the same size and interpolation.
    antialias: of the training crop; False is TensorFlow's resize, and big_vision's.
    squash: whole images, squashed, in training (with a flip) and evaluation: for objects that a crop would lose.
    color_strength: of the jitter, 0 is none; grayscale, blur: probabilities, as in SwAV's and SEER's views.
    rand_augment: RandAugment, such as dict(layers=2, magnitude=9, std=0.5); what geometry leaves empty is `mean`, with
      style="tf" gray.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side kept in evaluation.
  """

  hidden_layers: int = 0
  hidden_dim: int = 0
  pre_logits: int = 0
  zero_init: bool = False
  label_smoothing: float = 0.0
  mixup: float = 0.0
  cutmix: float = 0.0
  switch_prob: float = 0.5
  sigmoid: bool = False
  size: Size = 224
  scale: tuple[float, float] = (0.08, 1.0)
  interpolation: Literal["bilinear", "bicubic"] = "bilinear"
  antialias: bool = True
  squash: bool = False
  color_strength: float = 0.0
  grayscale: float = 0.0
  blur: float = 0.0
  rand_augment: RandAugment | None = None
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  accumulation_reason = "config.method.mixup and cutmix mix the images of the whole batch by one draw"

  def __post_init__(self):
    check_channels(self)
    check_least(self, mixup=0.0, cutmix=0.0, hidden_layers=0, hidden_dim=0, pre_logits=0)
    check_shares(self, "switch_prob", "label_smoothing")
    if getattr(self.model, "patch_sizes", ()):
      check_patches(self, "size")

  @property
  def supports_accumulation(self) -> bool:
    return not (self.mixup or self.cutmix)

  def inputs(self) -> Inputs:
    s, rand_augment = self.color_strength, self.rand_augment
    if rand_augment and rand_augment.style == "timm":
      rand_augment = dataclasses.replace(rand_augment, fill=rand_augment.fill or self.mean)
    operations = (
      rand_augment,
      s and ColorJitter(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8),
      self.grayscale and Grayscale(p=self.grayscale),
      self.blur and GaussianBlur(p=self.blur),
    )
    augment = (*(o for o in operations if o), *normalize(self))
    resize = {"interpolation": self.interpolation, "antialias": self.antialias}
    view = View(name="crop", size=self.size, scale=self.scale, **resize, augment=augment)
    return Inputs(views=(dataclasses.replace(view, crop="none") if self.squash else view,), keys=("label",))

  def eval_view(self) -> View:
    view = center_view(self, size=self.size, interpolation=self.interpolation)
    return dataclasses.replace(view, crop="none", center_fraction=1.0) if self.squash else view

  @property
  def encoder(self) -> Encoder:
    hidden = (self.hidden_dim,) * self.hidden_layers
    bias = -10.0 if self.sigmoid else 0.0
    head = Classifier(self.num_classes, hidden=hidden, pre_logits=self.pre_logits, zero_init=self.zero_init, bias_init=bias)
    return Encoder(backbone=self.model, head=head)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    if self.num_classes < 2:
      raise UserError(f"config.method.name='supervised': needs labels of at least 2 classes, the data has {self.num_classes}.")
    variables = self.encoder.init(rng, batch["crop"][:, 0], train=False)
    return {"encoder": variables["params"]}, {"batch_stats": variables.get("batch_stats", {})}

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    images = batch["crop"][:, 0]
    mixture = None
    if self.mixup or self.cutmix:
      rng, key = jax.random.split(rng)
      alphas = {"mixup": self.mixup, "cutmix": self.cutmix, "switch": self.switch_prob}
      mixture = mixup.draw_mixture(key, **alphas, size=sides(self.size))
      images = mixup.mix(images, share=mixture.mask)
    encoded = encode(self.encoder, params["encoder"], extra["batch_stats"], images, train=True, rng=rng)
    logits = encoded.out["projection"]  # [B, K]
    cross_entropy = classify.sigmoid_cross_entropy if self.sigmoid else classify.cross_entropy
    on = lambda labels: cross_entropy(logits, labels=labels, label_smoothing=self.label_smoothing)
    loss = mixup.mixed_loss(on, labels=batch["label"], share=mixture.share) if mixture else on(batch["label"])
    metrics = {"accuracy": classify.accuracy(logits, labels=batch["label"])} | health.embedding(encoded.out["pooled"])
    return loss, ({"batch_stats": encoded.batch_stats}, jax.lax.stop_gradient(metrics))

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's pooled output, and the class logits."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "logits": out["projection"]}
