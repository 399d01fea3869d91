"""MoCo v3: self-supervised vision transformers (arXiv 2104.02057).

Two views of each image; queries of an encoder with projector and predictor, keys of its slow average without predictor;
the key of an image must be found among the keys of the global batch, both ways round (Algorithm 1):

  ctr(q, k) = 2 T mean_i -log exp(q_i . k_i / T) / sum_j exp(q_i . k_j / T)
  loss = ctr(q_1, k_2) + ctr(q_2, k_1)

There is no queue. As in the released code the key encoder is averaged before the keys are computed, with the weights of
the last update, and the views pass one after the other, so that BN statistics are per view, over the global batch. For
ViTs the patch projection stays as it was drawn (section 4.2), positions are fixed, and AdamW decays every parameter.
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
from big_ssl.core.types import Array, Extra, Metrics, Params, Rule, Size
from big_ssl.losses.contrastive import batch_nce
from big_ssl.methods.parts import center_view, check_channels, check_least, check_positive, check_shares, normalize
from big_ssl.models.encoder import Encoder, as_teacher, copy_tree, encode, teacher_tree
from big_ssl.models.heads import ProjectionHead
from big_ssl.ops.ema import ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoV3(Method):
  """MoCo v3; defaults are the ViT recipe. ResNet-50: temperature=1, projector_layers=2, predictor_norm=False,
  freeze_patches=False, decay_all=False, scale=(0.2, 1).

  Attributes:
    temperature: T.
    momentum, momentum_final: m, a cosine from the first to the second over training.
    projector_layers, predictor_layers: linear layers without bias, BN and ReLU between; 0 is no predictor (one point less).
    hidden_dim, output_dim: of both; the projector ends in BN without scale and bias.
    predictor_norm: so does the predictor.
    freeze_patches: the random patch projection of a ViT is never trained.
    decay_all: weight decay is on biases, norms and CLS too (the AdamW recipe); False is for LARS.
    size, scale: of both views.
    color_strength: factor on the jitter 0.4, 0.4, 0.2, 0.1 (brightness, contrast, saturation, hue).
    gray: probability of grayscale.
    blur, solarize: probabilities for view 1 and view 2.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the evaluation crop keeps (224 of 256).
  """

  temperature: float = 0.2
  momentum: float = 0.99
  momentum_final: float = 1.0
  projector_layers: int = 3
  predictor_layers: int = 2
  hidden_dim: int = 4096
  output_dim: int = 256
  predictor_norm: bool = True
  freeze_patches: bool = True
  decay_all: bool = True
  size: Size = 224
  scale: tuple[float, float] = (0.08, 1.0)
  color_strength: float = 1.0
  gray: float = 0.2
  blur: tuple[float, float] = (1.0, 0.1)
  solarize: tuple[float, float] = (0.0, 0.2)
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  accumulation_reason = "the keys of the whole batch are each other's negatives"

  def __post_init__(self):
    check_positive(self, "temperature")
    check_shares(self, "momentum", "momentum_final", "gray")
    check_least(self, projector_layers=1, predictor_layers=0, hidden_dim=1, output_dim=1)
    check_channels(self)

  # 1. Views

  def inputs(self) -> Inputs:
    return Inputs(views=(self._view("view1", self.blur[0], self.solarize[0]), self._view("view2", self.blur[1], self.solarize[1])))

  def _view(self, name: str, blur: float, solarize: float) -> View:
    s = self.color_strength
    augment = (
      ColorJitter(brightness=0.4 * s, contrast=0.4 * s, saturation=0.2 * s, hue=0.1 * s, p=0.8),
      Grayscale(p=self.gray),
      GaussianBlur(p=blur, sigma=(0.1, 2.0)),
      Solarize(p=solarize),
      *normalize(self),
    )
    return View(name=name, size=self.size, scale=self.scale, augment=augment)

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  # 2. Networks

  def _mlp(self, layers: int, norm: bool) -> ProjectionHead:
    return ProjectionHead(
      hidden=(self.hidden_dim,) * (layers - 1),
      output=self.output_dim,
      activation="relu",
      use_bias=False,
      final_batch_norm=norm,
      final_scale=False,
      init_std=None,
    )

  @property
  def encoder(self) -> Encoder:
    predictor = self._mlp(self.predictor_layers, self.predictor_norm) if self.predictor_layers else None
    return Encoder(backbone=self.model, head=self._mlp(self.projector_layers, True), predictor=predictor)

  @property
  def key_encoder(self) -> Encoder:
    return as_teacher(self.encoder)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    variables = self.encoder.init(rng, batch["view1"][:, 0], train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    copy = lambda tree: copy_tree(teacher_tree(tree))
    return {"encoder": params}, {"teacher": copy(params), "batch_stats": stats, "teacher_batch_stats": copy(stats)}

  # 3. Loss

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    view1, view2 = batch["view1"][:, 0], batch["view2"][:, 0]  # [B, H, W, C]
    rng1, rng2 = jax.random.split(rng)

    # 3.1 Queries [B, D], each view its own BN batch.
    query1 = encode(self.encoder, params["encoder"], extra["batch_stats"], view1, train=True, rng=rng1)
    query2 = encode(self.encoder, params["encoder"], query1.batch_stats, view2, train=True, rng=rng2)
    z = query1.out["projection"]
    q1, q2 = query1.out.get("prediction", z), query2.out.get("prediction", query2.out["projection"])

    # 3.2 The key encoder follows the weights that the last update left; keys [B, D].
    teacher = ema(extra["teacher"], jax.lax.stop_gradient(teacher_tree(params["encoder"])), self.ema_momentum(step))
    key1 = encode(self.key_encoder, teacher, extra["teacher_batch_stats"], view1, train=True)
    key2 = encode(self.key_encoder, teacher, key1.batch_stats, view2, train=True)
    k1, k2 = key1.out["projection"], key2.out["projection"]

    # 3.3 Each query finds the key of the other view in the global batch.
    scale = 2 * self.temperature
    first = batch_nce(q1, k2, temperature=self.temperature, loss_scale=scale)
    second = batch_nce(q2, k1, temperature=self.temperature, loss_scale=scale)
    metrics = {"contrastive_accuracy": (first.accuracy + second.accuracy) / 2, "momentum": self.ema_momentum(step)}
    metrics |= {"agreement": health.agreement(q1, k2)} | health.embedding(z)
    extra = extra | {"teacher": teacher, "batch_stats": query2.batch_stats, "teacher_batch_stats": key2.batch_stats}
    return first.loss + second.loss, (extra, jax.lax.stop_gradient(metrics))

  def ema_momentum(self, step: Array) -> Array:
    """m = 1 - (1 - m_0) (1 + cos(pi epoch / epochs)) / 2, the epoch with its fraction."""
    return schedules.cosine(step, start=self.momentum, final=self.momentum_final, total=self.total_steps)

  # 4. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The query trunk's output ("pooled", CLS after the final norm for ViTs) and the projection."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "projection": out["projection"]}

  def param_rules(self) -> tuple[Rule, ...]:
    frozen = (Rule(pattern=r"^encoder/backbone/patch_embed/conv/", lr_mult=0.0, clip=False),) if self.freeze_patches else ()
    return (*frozen, Rule(pattern=r"(bias|scale)$", weight_decay=float(self.decay_all), trust_ratio=False), Rule(pattern=r".*"))
