"""Distillation of a classifier: the student learns a frozen teacher's class probabilities (FlexiViT, arXiv 2212.08013; 2106.05237).

  loss = T^2 / B sum_i KL(softmax(teacher(x'_i) / T) || softmax(student(x_i) / T))

x_i and x'_i are one crop of an image at the sizes of student and teacher, mixed with the same neighbor by the same share
(consistent teaching, arXiv 2106.05237, section 2). The teacher's weights come from `config.init_from`, an earlier run or
an imported file with a classifier, and so do the student's, PI-resized where its patches are others. Without
`config.init_from` the teacher is random and teaches nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.core
import jax
import jax.numpy as jnp

from big_ssl.augment import mixup
from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Size, UserError, nearest, sides
from big_ssl.losses import classify, distill
from big_ssl.methods.parts import center_view, check_channels, check_least, check_patches, check_positive, normalize
from big_ssl.models.encoder import Encoder, as_teacher, encode
from big_ssl.models.heads import Classifier

# Where the teacher does not say otherwise it is a plain network, whatever makes the student flexible.
_PLAIN = {"kernel_patch": 0, "pos_grid": 0, "patch_sizes": ()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Method):
  """A student learns the class probabilities of a frozen teacher; labels are for the logs only.

  Attributes:
    teacher: fields of the teacher's backbone that differ from the student's, such as image_size; its patch is that of
      the student's stored kernel, and kernel_patch, pos_grid and patch_sizes are unset, unless they are among these.
    temperature: T.
    mixup: alpha of its Beta(alpha, alpha), 0 is none; one share per step (`augment.mixup`).
    size, teacher_size: at which the two see the crop.
    scale: of the crop, its share of the area.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side kept in evaluation.
  """

  teacher: Mapping[str, Any] = flax.core.FrozenDict()
  temperature: float = 1.0
  mixup: float = 1.0
  size: Size = 224
  teacher_size: Size = 224
  scale: tuple[float, float] = (0.05, 1.0)
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  accumulation_reason = "mixup mixes the images of the whole batch with one share"

  def __post_init__(self):
    object.__setattr__(self, "teacher", flax.core.freeze(dict(self.teacher)))  # methods are hashed
    check_channels(self)
    check_least(self, mixup=0.0)
    check_positive(self, "temperature")
    check_patches(self, "size")
    if self.model is not None:
      self._check_teacher()

  def _check_teacher(self) -> None:
    names = sorted({f.name for f in dataclasses.fields(self.model)} - {"parent", "name"})
    for name, value in self.teacher.items():
      if name not in names:
        near = f"{nearest(name, names)} Accepted: {', '.join(names)}."
        raise UserError(f"config.method.teacher.{name}={value!r}: no field of config.model.name.{near}")
    patch = getattr(self.teacher_model, "patch", 1)
    if any(side % patch for side in sides(self.teacher_size) if isinstance(patch, int)):
      raise UserError(f"config.method.teacher_size={self.teacher_size}: must be a multiple of the teacher's patch {patch}.")

  @property
  def supports_accumulation(self) -> bool:
    return not self.mixup

  def inputs(self) -> Inputs:
    crop = View(name="crop", size=self.size, scale=self.scale, augment=normalize(self))
    same = View(name="teacher_crop", size=self.teacher_size, scale=self.scale, augment=normalize(self), like="crop")
    return Inputs(views=(crop, same), keys=("label",))

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  @property
  def encoder(self) -> Encoder:
    return Encoder(backbone=self.model, head=Classifier(self.num_classes))

  @property
  def teacher_model(self) -> Any:
    """The teacher's backbone, the same whatever patch size the student trains at."""
    fields = {f.name for f in dataclasses.fields(self.model)}
    plain = {name: value for name, value in _PLAIN.items() if name in fields}
    if getattr(self.model, "kernel_patch", 0):
      plain["patch"] = self.model.kernel_patch
    return self.model.clone(**plain | dict(self.teacher))

  @property
  def teacher_encoder(self) -> Encoder:
    return as_teacher(self.encoder.clone(backbone=self.teacher_model))

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    if self.num_classes < 2:
      raise UserError(f"config.method.name='distillation': needs labels of at least 2 classes, the data has {self.num_classes}.")
    rng, rng_teacher = jax.random.split(rng)
    student = self.encoder.init(rng, batch["crop"][:, 0], train=False)
    teacher = self.teacher_encoder.init(rng_teacher, batch["teacher_crop"][:, 0], train=False)
    statistics = {"batch_stats": student.get("batch_stats", {}), "teacher_batch_stats": teacher.get("batch_stats", {})}
    return {"encoder": student["params"]}, {"teacher": teacher["params"]} | statistics

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    # 1. One crop at two sizes, mixed alike.
    images, teacher_images = batch["crop"][:, 0], batch["teacher_crop"][:, 0]  # [B, H, W, C]
    if self.mixup:
      rng, key = jax.random.split(rng)
      share = mixup.draw(key, alpha=self.mixup)
      images, teacher_images = (mixup.mix(x, share=share) for x in (images, teacher_images))
    # 2. The teacher as in evaluation; nothing of it is trained or moved.
    frozen, frozen_statistics = jax.lax.stop_gradient((extra["teacher"], extra["teacher_batch_stats"]))
    target = encode(self.teacher_encoder, frozen, frozen_statistics, teacher_images, train=False).out["projection"]  # [B, K]
    # 3. The student, at the patch size of this step.
    encoded = encode(self.encoder, params["encoder"], extra["batch_stats"], images, train=True, rng=rng)
    logits = encoded.out["projection"]  # [B, K]
    loss = distill.kl_divergence(logits, teacher=target, temperature=self.temperature)
    metrics = {
      "top1_agreement": jnp.mean(jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1)),
      "accuracy": classify.accuracy(logits, labels=batch["label"]),
      "teacher_accuracy": classify.accuracy(target, labels=batch["label"]),
    }
    metrics |= health.distribution(jax.nn.softmax(logits), name="student") | health.distribution(jax.nn.softmax(target), name="teacher")
    metrics |= health.embedding(encoded.out["pooled"])
    return loss, (extra | {"batch_stats": encoded.batch_stats}, jax.lax.stop_gradient(metrics))

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The student's pooled output, and its class logits."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "logits": out["projection"]}
