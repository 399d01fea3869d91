"""PAWS, predicting view assignments with support samples (arXiv 2104.13963).

Two streams: unlabeled images, and a class-balanced support batch of labeled ones. A representation is classified by its
similarity to the support, without any classifier layer (section 3):

  p = softmax(cos(z, z_S) / tau) Y        anchors, after the prediction head where there is one
  t = rho(softmax(cos(h, h_S) / tau) Y)   targets, before it, no gradient; rho sharpens with T
  loss = mean H(t of the other big view, or their mean for small views, p) - lambda H(mean rho(p))

Y has one column per class of the draw, smoothed. Facts follow the released code: supports are augmented as the big views
are and share their batch in every BN; the small views are a BN batch of their own, unless they have the size of the big
ones. Sizes of the support are those of the GLOBAL batch: the reference's 15 classes on each of 64 GPUs are 960 here, on any number of devices.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from big_ssl.augment.photometric import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  ColorJitter,
  Equalize,
  GaussianBlur,
  Grayscale,
  Solarize,
)
from big_ssl.core import health
from big_ssl.core.method import ClassBalanced, Inputs, Method, Trunk, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Rule, Size, UserError, sides
from big_ssl.losses import semi
from big_ssl.methods.parts import center_view, check_channels, check_least, check_positive, check_shares, normalize
from big_ssl.models.encoder import Encoder, crop_major, encode
from big_ssl.models.heads import BottleneckPredictor, ProjectionHead
from big_ssl.ops.sharded import over_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class PAWS(Method):
  """Semi-supervised pretraining; defaults are the released ResNet-50 recipe with 10 % of the labels.

  Attributes:
    classes_per_step, images_per_class: of the support, over all devices together; 960 x 7 in the paper. More classes with
      fewer images beat the converse (Table 4).
    support_views: augmented views of each support image.
    labels_per_class: labeled images of each class; 0 takes every labeled image.
    labels_seed: of the draw of these, beside the run's seed: the labeled set stays while seeds vary.
    labels_file: instead, a text file with the name, or the number, of one labeled image per line.
    output_dim: of the projection.
    hidden_dim: of its two hidden layers; 0 is the width of the trunk.
    prediction_head: the bottleneck head on top of it (ImageNet yes, CIFAR-10 no).
    temperature: tau.
    sharpen: T of the targets, and of the predictions inside me-max.
    target_floor: target entries below it become 0.
    memax_weight: lambda; lower it where the classes of the unlabeled images are not in equal shares.
    label_smoothing: s of the support labels.
    small_views: crops beside the two big ones.
    big_size, small_size, big_scale, small_scale: of the crops.
    color_strength: s of the jitter (.8 s, .8 s, .8 s, .2 s).
    gray, blur, solarize, equalize: probabilities; the threshold of the solarization is drawn.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the evaluation crop keeps (224 of 256).
  """

  classes_per_step: int = 960
  images_per_class: int = 7
  support_views: int = 1
  labels_per_class: int = 128
  labels_seed: int = 0
  labels_file: str = ""
  output_dim: int = 2048
  hidden_dim: int = 0
  prediction_head: bool = True
  temperature: float = 0.1
  sharpen: float = 0.25
  target_floor: float = 1e-4
  memax_weight: float = 1.0
  label_smoothing: float = 0.1
  small_views: int = 6
  big_size: Size = 224
  small_size: Size = 96
  big_scale: tuple[float, float] = (0.14, 1.0)
  small_scale: tuple[float, float] = (0.05, 0.14)
  color_strength: float = 1.0
  gray: float = 0.2
  blur: float = 0.5
  solarize: float = 0.0
  equalize: float = 0.0
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  accumulation_reason = "me-max and batch normalization need the whole batch, and all anchors one support"

  def __post_init__(self):
    check_support(self)
    if self.label_smoothing == 0 and self.temperature < 0.02:
      field = f"config.method.temperature={self.temperature}"
      raise UserError(f"{field}: without config.method.label_smoothing probabilities underflow; use 0.02 or more.")
    check_positive(self, "sharpen")
    check_shares(self, "target_floor")
    check_least(self, small_views=0, memax_weight=0)

  # 1. Streams and views

  def inputs(self) -> dict[str, Inputs]:
    s = self.color_strength
    augment = (
      ColorJitter(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8),
      Grayscale(p=self.gray),
      GaussianBlur(p=self.blur, sigma=(0.1, 2.0)),
      Solarize(p=self.solarize, threshold=(0.0, 1.0)),
      Equalize(p=self.equalize),
      *normalize(self),
    )
    big = lambda count: View(name="big", size=self.big_size, count=count, scale=self.big_scale, augment=augment)
    small = View(name="small", size=self.small_size, count=self.small_views, scale=self.small_scale, augment=augment)
    return {
      "unlabeled": Inputs(views=(big(2), small) if self.small_views else (big(2),)),
      "support": Inputs(views=(big(self.support_views),), keys=("label",), sampler=support_sampler(self)),
    }

  def eval_view(self) -> View:
    return center_view(self, size=self.big_size)

  # 2. Networks

  def init(self, rng: Array, batch: dict[str, dict[str, Array]]) -> tuple[Params, Extra]:
    return init_networks(self, rng, batch["support"]["big"][:, 0])

  # 3. Loss

  def loss(
    self, params: Params, extra: Extra, batch: dict[str, dict[str, Array]], rng: Array, step: Array
  ) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    # 3.1 Supports and big views are one batch, small views another: h before the prediction head, z after it.
    unlabeled, support = batch["unlabeled"], batch["support"]
    rng_big, rng_small = jax.random.split(rng)
    one_batch = self.small_views and sides(self.small_size) == sides(self.big_size)  # a batch per size, as released
    views = [support["big"], unlabeled["big"], *([unlabeled["small"]] if one_batch else [])]
    images = jnp.concatenate([crop_major(v) for v in views])  # [V*S + 2*B, H, W, C]
    big, stats = embed(self, params, extra["batch_stats"], over_devices(images), train=True, rng=rng_big)
    supports, count = support["label"].shape[0] * self.support_views, unlabeled["index"].shape[0]
    z, h = big["prediction"], big["projection"]
    z_support, h_support, z, h = z[:supports], h[:supports], z[supports:], h[supports : supports + 2 * count]
    if self.small_views and not one_batch:
      images = over_devices(crop_major(unlabeled["small"]))  # [M*B, h, w, C]
      small, stats = embed(self, params, stats, images, train=True, rng=rng_small)
      z = jnp.concatenate([z, small["prediction"]])  # [(2+M)*B, D]

    # 3.2 The columns of Y are the classes of this draw.
    labels = jnp.tile(support["label"], self.support_views)  # [V*S], view-major as the images
    columns = jnp.unique(support["label"], size=self.classes_per_step, fill_value=-1)
    y = semi.label_matrix(labels, columns=columns, smoothing=self.label_smoothing)

    # 3.3 Cross-entropy with the swapped targets, and me-max.
    out = semi.paws_loss(
      z,
      z_support,
      h,
      h_support,
      labels=y,
      temperature=self.temperature,
      sharpen=self.sharpen,
      memax_weight=self.memax_weight,
      floor=self.target_floor,
    )
    metrics = {"ce": out.ce, "memax": out.memax, "agreement": health.agreement(h[:count], h[count:])}
    metrics |= health.distribution(out.targets, name="target") | health.distribution(out.probabilities, name="prediction")
    metrics |= health.embedding(h)
    return out.total, ({"batch_stats": stats}, jax.lax.stop_gradient(metrics))

  # 4. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk ("pooled"), after the projection, and after the prediction head where there is one ("prediction")."""
    return embed(self, params, extra["batch_stats"], batch["image"][:, 0], train=False)[0]

  def trunk(self, params: Params, extra: Extra) -> Trunk:
    return self.trunk_of(params["encoder"], extra["batch_stats"]["encoder"])

  def param_rules(self) -> tuple[Rule, ...]:
    return paws_rules()


# Shared with the fine-tuning on labels, `methods.suncet`.


def check_support(method: Method) -> None:
  """Raises `UserError` for fields of the support, the temperature and the pixels that cannot be."""
  name = "config.method"
  if method.classes_per_step < 2:
    raise UserError(f"{name}.classes_per_step={method.classes_per_step}: the support needs at least 2 classes, one says nothing.")
  if method.num_classes and method.classes_per_step > method.num_classes:
    raise UserError(f"{name}.classes_per_step={method.classes_per_step}: the training data has {method.num_classes} classes.")
  check_least(method, images_per_class=1, support_views=1, output_dim=1, hidden_dim=0)
  check_positive(method, "temperature")
  check_channels(method)
  if not 0 <= method.label_smoothing < 1:
    raise UserError(f"{name}.label_smoothing={method.label_smoothing}: expected a share in [0, 1).")
  if method.prediction_head and method.output_dim % 4:
    raise UserError(f"{name}.output_dim={method.output_dim}: the prediction head needs a multiple of 4.")


def support_sampler(method: Method) -> ClassBalanced:
  names = [f.name for f in dataclasses.fields(ClassBalanced)]
  return ClassBalanced(**{n: getattr(method, n) for n in names})


def paws_encoder(method: Method) -> Encoder:
  head = ProjectionHead(hidden=(method.hidden_dim,) * 2, output=method.output_dim, activation="relu", init_std=None)
  return Encoder(backbone=method.model, head=head)


def init_networks(method: Method, rng: Array, images: Array) -> tuple[Params, Extra]:
  """{"encoder", "predictor"} and their batch statistics; the predictor is empty where there is none."""
  rng_encoder, rng_predictor = jax.random.split(rng)
  trees = {"encoder": paws_encoder(method).init(rng_encoder, images, train=False), "predictor": {}}
  if method.prediction_head:
    trees["predictor"] = BottleneckPredictor().init(rng_predictor, jnp.zeros((1, method.output_dim)), train=False)
  params, stats = ({k: v.get(name, {}) for k, v in trees.items()} for name in ("params", "batch_stats"))
  return params, {"batch_stats": stats}


def embed(
  method: Method, params: Params, batch_stats: Extra, images: Array, *, train: bool, rng: Array | None = None
) -> tuple[dict[str, Array], Extra]:
  """One BN batch through trunk and heads: "pooled", "projection" h and "prediction" z; and the batch statistics afterwards."""
  encoded = encode(paws_encoder(method), params["encoder"], batch_stats["encoder"], images, train=train, rng=rng)
  out = {k: encoded.out[k] for k in ("pooled", "projection")}
  stats = {"encoder": encoded.batch_stats, "predictor": {}}
  out["prediction"] = out["projection"]
  if method.prediction_head:
    variables = {"params": params["predictor"], "batch_stats": batch_stats["predictor"]}
    out["prediction"], updated = BottleneckPredictor().apply(variables, out["projection"], train=train, mutable=["batch_stats"])
    stats["predictor"] = updated["batch_stats"]
  return out, stats


def paws_rules() -> tuple[Rule, ...]:
  """Neither decay nor trust ratio for names with "bias" or "bn"; the released shortcut BN, "downsample.1.weight", has both."""
  return (
    Rule(pattern=r"downsample_bn/scale$"),
    Rule(pattern=r"(bias|scale)$", weight_decay=0.0, trust_ratio=False),
    Rule(pattern=r".*"),
  )
