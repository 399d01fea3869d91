"""DINO: self-distillation with no labels (arXiv 2104.14294).

A student sees V crops of an image, its EMA teacher only the large ones; each crop of the student predicts the teacher's
softmax output on every other crop (section 3.1):

  P_t = softmax((t - c) / tau_t)     no gradient, i = 1 ... G
  log P_s = log_softmax(s / tau_s)   v = 1 ... V
  loss = 1/(G (V-1)) sum_i sum_{v != i} -<P_t[i], log P_s[v]>      (eq. 3; mean over images)
  c <- m_c c + (1 - m_c) mean t,   after the loss                  (eq. 4)
  teacher <- m teacher + (1 - m) student,   after the update

Centering alone collapses to the uniform output, sharpening (tau_t < tau_s) alone to one dimension; together they balance.
Details are those of the public code: crops of one size are one backbone batch, the head runs once over all of them, and
the teacher is in train mode, so that its BN uses this batch; its running statistics are its own, not averaged ones.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD, ColorJitter, GaussianBlur, Grayscale, Solarize
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, Trunk, View
from big_ssl.core.schedules import cosine
from big_ssl.core.types import Array, Extra, Interval, Metrics, Params, Rule, Size, UserError
from big_ssl.losses import distill
from big_ssl.losses.regularizers import entropy
from big_ssl.methods.parts import (
  center_view,
  check_channels,
  check_least,
  check_patches,
  check_positive,
  check_shares,
  normalize,
)
from big_ssl.models.encoder import Encoder, as_teacher, copy_tree, encode, encode_crops
from big_ssl.models.heads import DINOHead
from big_ssl.ops.ema import ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINO(Method):
  """DINO; defaults are the public code's, for ViT-S/16 and 100 epochs.

  Attributes:
    num_prototypes: K, outputs of the head.
    hidden_dim, bottleneck_dim, head_layers: of the head's MLP.
    head_batch_norm: BN after its hidden layers, for convolutional networks.
    fix_scale: the prototypes' norms g stay 1: stable, and a little worse on ViT-S.
    freeze_epochs: epochs before the prototypes are updated at all.
    student_temperature: tau_s.
    teacher_temperature, teacher_temperature_start, teacher_warmup_epochs: tau_t per epoch, from the start to the final one
      in a line that includes both ends.
    center_momentum: m_c; 0.999 does not train (Table 15).
    momentum, momentum_final: m, a cosine over the training; raise the first for batches below 512.
    global_views, local_views: crops that the teacher sees too, and that only the student sees.
    global_size, local_size, global_scale, local_scale: sides in pixels, and ranges of the share of the image's area.
    blur: probabilities for the first global view, the other global views, the local views.
    solarize: probability for the global views but the first.
    jitter: strengths of brightness, contrast, saturation and hue, with probability 0.8.
    gray: probability of grayscale.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the evaluation crop keeps (224 of 256).
    pack_crops: the crops of so many images share sequences of the student's ViT, see `models.packed`; 0 does not pack.
  """

  num_prototypes: int = 65536
  hidden_dim: int = 2048
  bottleneck_dim: int = 256
  head_layers: int = 3
  head_batch_norm: bool = False
  fix_scale: bool = True
  freeze_epochs: int = 1
  student_temperature: float = 0.1
  teacher_temperature: float = 0.04
  teacher_temperature_start: float = 0.04
  teacher_warmup_epochs: int = 0
  center_momentum: float = 0.9
  momentum: float = 0.996
  momentum_final: float = 1.0
  global_views: int = 2
  local_views: int = 8
  global_size: Size = 224
  local_size: Size = 96
  global_scale: tuple[float, float] = (0.4, 1.0)
  local_scale: tuple[float, float] = (0.05, 0.4)
  blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
  solarize: float = 0.2
  jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
  gray: float = 0.2
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256
  pack_crops: int = 0

  accumulation_reason = "the center is the mean of the teacher's outputs over the whole batch"

  def __post_init__(self):
    check_least(self, num_prototypes=2, hidden_dim=1, bottleneck_dim=1, head_layers=1, freeze_epochs=0, teacher_warmup_epochs=0, pack_crops=0)
    check_positive(self, "student_temperature", "teacher_temperature", "teacher_temperature_start")
    check_shares(self, "center_momentum", "momentum", "momentum_final", "solarize", "gray")
    self._check_views()
    epochs = self.total_steps / self.steps_per_epoch if self.num_examples else float("inf")
    if self.teacher_warmup_epochs > max(epochs, 1):
      found = f"config.method.teacher_warmup_epochs={self.teacher_warmup_epochs}"
      raise UserError(f"{found}: longer than the training, {epochs:g} epochs; shorten it or raise config.total.")

  def _check_views(self) -> None:
    if self.global_views < 1 or self.local_views < 0 or self.global_views + self.local_views < 2:
      raise UserError(
        f"config.method.global_views={self.global_views}, local_views={self.local_views}: at least one global and two in all are needed."
      )
    check_channels(self)
    check_patches(self, *("global_size", "local_size")[: 2 if self.local_views else 1])

  # 1. Views

  def inputs(self) -> Inputs:
    brightness, contrast, saturation, hue = self.jitter

    def view(name: str, count: int, *, blur: float, solarize: float = 0.0) -> View:
      local = name == "local"
      augment = (
        ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, p=0.8),
        Grayscale(p=self.gray),
        GaussianBlur(p=blur, sigma=(0.1, 2.0)),
        *((Solarize(p=solarize),) if solarize else ()),
        *normalize(self),
      )
      size, scale = (self.local_size, self.local_scale) if local else (self.global_size, self.global_scale)
      return View(name=name, size=size, count=count, scale=scale, interpolation="bicubic", augment=augment)

    views = (
      view("global1", 1, blur=self.blur[0]),
      view("global2", self.global_views - 1, blur=self.blur[1], solarize=self.solarize),
      view("local", self.local_views, blur=self.blur[2]),
    )
    return Inputs(views=tuple(v for v in views if v.count))

  def eval_view(self) -> View:
    return center_view(self, size=self.global_size, interpolation="bicubic")

  # 2. Networks

  @property
  def encoder(self) -> Encoder:
    head = DINOHead(
      self.num_prototypes,
      hidden=self.hidden_dim,
      bottleneck=self.bottleneck_dim,
      layers=self.head_layers,
      batch_norm=self.head_batch_norm,
      fix_scale=self.fix_scale,
      dtype=getattr(self.model, "dtype", "float32"),
    )
    return Encoder(backbone=self.model, head=head)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    variables = self.encoder.init(rng, batch["global1"][:, 0], train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})
    extra = {
      "teacher": copy_tree(params),
      "batch_stats": stats,
      "teacher_batch_stats": copy_tree(stats),
      "center": jnp.zeros((self.num_prototypes,), jnp.float32),
    }
    return {"encoder": params}, extra

  # 3. Loss

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    # 3.1 Crops [B, V_g, H, W, C]: the large ones, then the small ones.
    groups = [batch[view.name] for view in self.inputs().views]
    large = groups[: 1 if self.global_views == 1 else 2]

    # 3.2 Teacher on the large crops, student on all: logits t [G, B, K] and s [V, B, K].
    teacher = encode_crops(as_teacher(self.encoder), extra["teacher"], extra["teacher_batch_stats"], large, train=True)
    student = encode_crops(self.encoder, params["encoder"], extra["batch_stats"], groups, train=True, rng=rng, pack=self.pack_crops)
    t, s = jax.lax.stop_gradient(teacher.out["projection"]), student.out["projection"]

    # 3.3 Cross-entropy with the center from before this batch; then the center moves.
    tau = self.temperature(step)
    total = distill.dino_loss(s, t, center=extra["center"], student_temperature=self.student_temperature, teacher_temperature=tau)
    center = distill.update_center(extra["center"], teacher=t, momentum=self.center_momentum)

    metrics = self._health(s, t, center=extra["center"], tau=tau, total=total)
    pooled = student.out["pooled"][: len(t)]
    metrics |= health.embedding(pooled.reshape(-1, pooled.shape[-1]))
    metrics |= {"padding": student.out["padding"]} if "padding" in student.out else {}
    stats = {"batch_stats": student.batch_stats, "teacher_batch_stats": teacher.batch_stats, "center": center}
    return total, (extra | stats, jax.lax.stop_gradient(metrics))

  def _health(self, s: Array, t: Array, *, center: Array, tau: Array, total: Array) -> Metrics:
    """Assignments of the large crops; the loss is the targets' entropy plus "kl", whose fall to 0 is a collapse (section 5.3)."""
    s, flat = (x.reshape(-1, self.num_prototypes) for x in (s[: t.shape[0]], t))
    targets, predictions = jax.nn.softmax((flat - center) / tau), jax.nn.softmax(s / self.student_temperature)
    nats = jnp.mean(entropy(targets))
    metrics = health.distribution(targets, name="target") | health.distribution(predictions, name="prediction")
    return metrics | {
      "target_nats": nats,
      "kl": total - nats,
      "center_norm": jnp.linalg.norm(center),
      "teacher_temperature": tau,
    }

  # 4. Schedules and the teacher's update

  def temperature(self, step: Array) -> Array:
    """tau_t of the epoch that `step` is in: linspace(start, final, warm-up epochs), then final."""
    count = self.teacher_warmup_epochs
    values = np.append(np.linspace(self.teacher_temperature_start, self.teacher_temperature, count), self.teacher_temperature)
    ends = [self._epochs(e + 1) for e in range(count)]
    return jnp.asarray(values, jnp.float32)[sum((jnp.asarray(step >= e, jnp.int32) for e in ends), jnp.int32(0))]

  def _epochs(self, number: int) -> int:
    return Interval(number, "epochs").steps(batch_size=self.batch_size, examples=self.num_examples)

  def ema_momentum(self, step: Array) -> Array:
    return cosine(step, start=self.momentum, final=self.momentum_final, total=self.total_steps)

  def post_update(self, params: Params, extra: Extra, step: Array) -> Extra:
    return extra | {"teacher": ema(extra["teacher"], params["encoder"], self.ema_momentum(step))}

  # 5. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The teacher's trunk: "pooled" is CLS after the final norm, or a convolutional network's mean; the head is not used.

    Where the backbone is a ViT also "cls_layers_normed" [B, L, D], each block's CLS after the final norm: the linear probe
    of ViT-S reads the last four, concatenated (App. F).
    """
    del params
    trunk = Encoder(backbone=as_teacher(self.encoder).backbone)
    stats = {k: v for k, v in extra["teacher_batch_stats"].items() if k == "backbone"}
    out = encode(trunk, {"backbone": extra["teacher"]["backbone"]}, stats, batch["image"][:, 0], train=False).out
    return {k: out[k] for k in ("pooled", "cls_layers", "cls_layers_normed") if k in out}

  def assignments(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array:
    """The teacher's centered logits."""
    del params
    encoded = encode(as_teacher(self.encoder), extra["teacher"], extra["teacher_batch_stats"], batch["image"][:, 0], train=False)
    return encoded.out["projection"] - extra["center"]

  def trunk(self, params: Params, extra: Extra) -> Trunk:
    del params
    return self.trunk_of(extra["teacher"], extra["teacher_batch_stats"])

  def param_rules(self) -> tuple[Rule, ...]:
    """Biases and all other 1-D tensors have no decay; CLS, positions, prototypes v and a trained g have it."""
    freeze = Interval(self.freeze_epochs, "epochs")
    return (
      *((Rule(pattern=r"head/last_layer/g$", lr_mult=0.0, clip=False),) if self.fix_scale else ()),
      Rule(pattern=r"head/last_layer/", freeze_until=freeze),
      Rule(pattern=r"(bias|scale)$", weight_decay=0.0, trust_ratio=False),
      Rule(pattern=r".*"),
    )
