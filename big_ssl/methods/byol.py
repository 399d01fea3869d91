"""BYOL: bootstrap your own latent (arXiv 2006.07733).

An online network with encoder f, projector g and predictor q predicts, from one view, the projection that a slowly moving
target network gives to the other view; there are no negatives (section 3.1, eq. 2):

  L = mean_b |n(q(z_1)) - n(z'_2)|^2 + |n(q(z_2)) - n(z'_1)|^2,   n(x) = x / |x|,   xi <- tau xi + (1 - tau) theta

Facts where paper and released code differ follow the code: the two terms are added; the target starts from weights of its
own; its batch normalization uses the statistics of its own batch, and running statistics are never averaged. The views
pass one after the other, so that BN statistics are per view, over the global batch. Crops are resized as tf.image.resize
does by default, without antialiasing. The backbones are torchvision's: where Haiku pads SAME, they pad symmetrically.
"""

from __future__ import annotations

import dataclasses

import jax

from big_ssl.augment.photometric import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  ColorJitter,
  GaussianBlur,
  Grayscale,
  Solarize,
)
from big_ssl.core import health, schedules
from big_ssl.core.method import Inputs, Method, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Size, UserError
from big_ssl.losses import classify
from big_ssl.losses.regression import normalized_mse
from big_ssl.methods.parts import center_view, check_channels, check_least, check_shares, normalize
from big_ssl.models.encoder import Encoder, as_teacher, copy_tree, encode, teacher_tree
from big_ssl.models.heads import Linear, ProjectionHead
from big_ssl.ops.ema import ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class BYOL(Method):
  """BYOL; defaults are the released 1000-epoch ResNet-50 recipe.

  Attributes:
    hidden_dim, output_dim: of projector and predictor, Linear - BN - ReLU - Linear without bias.
    projector_layers, predictor_layers: linear layers; 0 predictor layers is the ablation that collapses.
    head_norm: BN without scale and bias after the projector, as in MoCo v3 (arXiv 2104.02057); for backbones without BN.
    momentum, momentum_final: tau, a cosine from the first to the second over training, without warm-up.
    own_target_init: the target starts from its own random weights; False copies the online ones.
    online_classifier: a linear classifier of the pooled features of view 1, which get no gradient from it, is trained
      alongside by the same optimizer: a free metric where there are labels; images without one are left out of it.
    size, scale: of both views; width and height of a crop are clipped to the image.
    color_strength: factor on the jitter 0.4, 0.4, 0.2, 0.1 (brightness, contrast, saturation, hue).
    gray: probability of grayscale.
    blur, solarize: probabilities for view 1 and view 2.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the evaluation crop keeps (224 of 256).
  """

  hidden_dim: int = 4096
  output_dim: int = 256
  projector_layers: int = 2
  predictor_layers: int = 2
  head_norm: bool = False
  momentum: float = 0.996
  momentum_final: float = 1.0
  own_target_init: bool = True
  online_classifier: bool = False
  size: Size = 224
  scale: tuple[float, float] = (0.08, 1.0)
  color_strength: float = 1.0
  gray: float = 0.2
  blur: tuple[float, float] = (1.0, 0.1)
  solarize: tuple[float, float] = (0.0, 0.2)
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  supports_accumulation = True  # as the paper does for its small batches (section 5); BN is then per microbatch

  def __post_init__(self):
    check_shares(self, "momentum", "momentum_final", "gray")
    check_least(self, projector_layers=1, predictor_layers=0, hidden_dim=1, output_dim=1)
    check_channels(self)

  # 1. Views

  def inputs(self) -> Inputs:
    if self.online_classifier and self.num_classes < 2:
      raise UserError(
        f"config.method.online_classifier=True: needs labels of at least 2 classes, the data has {self.num_classes}; set it to False."
      )
    views = (self._view("view1", self.blur[0], self.solarize[0]), self._view("view2", self.blur[1], self.solarize[1]))
    return Inputs(views=views, keys=("label",) if self.online_classifier else ())

  def _view(self, name: str, blur: float, solarize: float) -> View:
    s = self.color_strength
    augment = (
      ColorJitter(brightness=0.4 * s, contrast=0.4 * s, saturation=0.2 * s, hue=0.1 * s, p=0.8, style="byol"),
      Grayscale(p=self.gray, luma="byol"),
      GaussianBlur(p=blur, sigma=(0.1, 2.0), taps="tenth", edge="zero"),
      Solarize(p=solarize),
      *normalize(self),
    )
    options = dict(crop="clipped", scale=self.scale, interpolation="bicubic", antialias=False)
    return View(name=name, size=self.size, augment=augment, **options)

  def eval_view(self) -> View:
    return dataclasses.replace(center_view(self, size=self.size, interpolation="bicubic"), antialias=False)

  # 2. Networks

  def _mlp(self, layers: int, *, norm: bool = False) -> ProjectionHead:
    options = dict(activation="relu", final_bias=False, init_std="lecun", final_batch_norm=norm, final_scale=False)
    return ProjectionHead(hidden=(self.hidden_dim,) * (layers - 1), output=self.output_dim, **options)

  @property
  def encoder(self) -> Encoder:
    predictor = self._mlp(self.predictor_layers) if self.predictor_layers else None
    return Encoder(backbone=self.model, head=self._mlp(self.projector_layers, norm=self.head_norm), predictor=predictor)

  @property
  def target_encoder(self) -> Encoder:
    return as_teacher(self.encoder)

  @property
  def classifier(self) -> Linear:
    return Linear(output=self.num_classes)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    rng_online, rng_target, rng_classifier = jax.random.split(rng, 3)
    images = batch["view1"][:, 0]
    variables = self.encoder.init(rng_online, images, train=False)
    params, stats = {"encoder": variables["params"]}, variables.get("batch_stats", {})
    if self.own_target_init:
      target = self.target_encoder.init(rng_target, images, train=False)["params"]
    else:
      target = copy_tree(teacher_tree(params["encoder"]))
    if self.online_classifier:
      pooled = encode(self.encoder, params["encoder"], stats, images, train=False).out["pooled"]
      params["classifier"] = self.classifier.init(rng_classifier, pooled, train=False)["params"]
    return params, {"teacher": target, "batch_stats": stats, "teacher_batch_stats": copy_tree(teacher_tree(stats))}

  # 3. Loss

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    view1, view2 = batch["view1"][:, 0], batch["view2"][:, 0]  # [B, H, W, C]
    rng1, rng2 = jax.random.split(rng)

    # 3.1 Online network, each view its own BN batch: predictions q [B, D].
    online1 = encode(self.encoder, params["encoder"], extra["batch_stats"], view1, train=True, rng=rng1)
    online2 = encode(self.encoder, params["encoder"], online1.batch_stats, view2, train=True, rng=rng2)
    z = online1.out["projection"]
    q1, q2 = online1.out.get("prediction", z), online2.out.get("prediction", online2.out["projection"])

    # 3.2 Target network, in train mode: projections z' [B, D], no gradient.
    target1 = encode(self.target_encoder, extra["teacher"], extra["teacher_batch_stats"], view1, train=True)
    target2 = encode(self.target_encoder, extra["teacher"], target1.batch_stats, view2, train=True)
    t1, t2 = jax.lax.stop_gradient((target1.out["projection"], target2.out["projection"]))

    # 3.3 Each view predicts the other (eq. 2); the two terms are added.
    regression = normalized_mse(q1, targets=t2) + normalized_mse(q2, targets=t1)
    metrics = {"regression": regression, "agreement": health.agreement(q1, t2), "momentum": self.ema_momentum(step)}
    metrics |= health.embedding(z)
    loss = regression
    if self.online_classifier:
      logits = self.classifier.apply({"params": params["classifier"]}, jax.lax.stop_gradient(online1.out["pooled"]), train=True)
      classification = classify.cross_entropy(logits, labels=batch["label"])
      metrics |= {"classifier_loss": classification, "online_accuracy": classify.accuracy(logits, labels=batch["label"])}
      loss = regression + classification
    extra = extra | {"batch_stats": online2.batch_stats, "teacher_batch_stats": target2.batch_stats}
    return loss, (extra, jax.lax.stop_gradient(metrics))

  # 4. The target's update

  def ema_momentum(self, step: Array) -> Array:
    """tau = 1 - (1 - tau_0) (1 + cos(pi step / steps)) / 2 (section 3.2)."""
    return schedules.cosine(step, start=self.momentum, final=self.momentum_final, total=self.total_steps)

  def post_update(self, params: Params, extra: Extra, step: Array) -> Extra:
    return extra | {"teacher": ema(extra["teacher"], teacher_tree(params["encoder"]), self.ema_momentum(step))}

  # 5. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The online trunk's output ("pooled") and the projection."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "projection": out["projection"]}
