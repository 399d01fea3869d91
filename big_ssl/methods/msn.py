"""Masked Siamese Networks for label-efficient learning (arXiv 2204.07141).

An anchor encoder sees a view with patches dropped, and small focal crops; an EMA target encoder sees another full view.
Both are softly assigned to K prototypes q by cosine (section 3):

  p_i = softmax(z_i . q / tau)          anchors, i = 1 ... M B
  p+  = sharpen(softmax(h . q / tau), T)  targets, no gradient; Sinkhorn on top where asked
  loss = 1/(M B) sum_i H(p+, p_i) + lambda (log K - H(pbar)),   pbar = mean_i p_i          (eq. 1)

Facts where paper and public code differ follow the code: batch normalization after the two hidden layers of the head
only; anchors of the two sizes and targets are separate BN batches; targets are augmented as anchors are. BN statistics,
Sinkhorn and me-max are over the global batch, and one mask serves the whole global batch (the reference: one per device).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from big_ssl.augment import masking
from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD, ColorJitter, GaussianBlur, Grayscale
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, Trunk, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Rule, Size, UserError, sides
from big_ssl.losses import distill
from big_ssl.methods.parts import center_view, check_channels, check_least, check_patches, normalize
from big_ssl.models.encoder import Encoded, Encoder, as_teacher, copy_tree, crop_major, encode, encode_packed
from big_ssl.models.heads import ProjectionHead
from big_ssl.ops.ema import ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSN(Method):
  """Masked Siamese Networks; defaults are the released ViT-S/16 recipe.

  Attributes:
    num_prototypes: K.
    output_dim, hidden_dim: of the projection head, d -> hidden -> hidden -> output.
    temperature: tau.
    sharpen, sharpen_final: T, linear over the stretched schedule.
    sinkhorn, sinkhorn_iterations: balance the sharpened targets over the global batch.
    memax_weight: lambda; 1 with Sinkhorn, 5 without (paper, footnote 1).
    entropy_weight: weight of the mean entropy of the anchors (0 in every recipe).
    label_smoothing: s of the prototype labels.
    momentum, momentum_final: of the target, linear over the stretched schedule.
    stretch: schedules are laid over stretch * total steps, so that training ends at 80 % of them.
    patch_drop: share of the patches dropped from the random views; focal views keep all.
    mask_per_image: an own mask per image instead of one for the batch.
    rand_views, focal_views, rand_size, focal_size, rand_scale, focal_scale: the anchors; the target is one more random view.
    color_strength, blur, gray: strength of the jitter, probabilities of blur and grayscale.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the evaluation crop keeps (224 of 256).
    pack_crops: the anchors of so many images share sequences of the ViT, see `models.packed`; 0 does not pack.
  """

  num_prototypes: int = 1024
  output_dim: int = 256
  hidden_dim: int = 2048
  temperature: float = 0.1
  sharpen: float = 0.25
  sharpen_final: float = 0.25
  sinkhorn: bool = True
  sinkhorn_iterations: int = 3
  memax_weight: float = 1.0
  entropy_weight: float = 0.0
  label_smoothing: float = 0.0
  momentum: float = 0.996
  momentum_final: float = 1.0
  stretch: float = 1.25
  patch_drop: float = 0.15
  mask_per_image: bool = False
  rand_views: int = 1
  focal_views: int = 10
  rand_size: Size = 224
  focal_size: Size = 96
  rand_scale: tuple[float, float] = (0.3, 1.0)
  focal_scale: tuple[float, float] = (0.05, 0.3)
  color_strength: float = 0.5
  blur: float = 0.5
  gray: float = 0.2
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256
  pack_crops: int = 0

  accumulation_reason = "me-max, Sinkhorn and batch normalization need the whole batch"

  def __post_init__(self):
    check_least(self, num_prototypes=2, pack_crops=0)
    if not 0 <= self.patch_drop < 1:
      raise UserError(f"config.method.patch_drop={self.patch_drop}: expected a share in [0, 1).")
    if self.rand_views + self.focal_views < 1:
      raise UserError("config.method.rand_views=0 and focal_views=0: at least one anchor view is needed.")
    check_channels(self)
    check_patches(self, "rand_size", "focal_size")

  # 1. Views

  def inputs(self) -> Inputs:
    s = self.color_strength
    augment = (
      ColorJitter(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8),
      Grayscale(p=self.gray),
      GaussianBlur(p=self.blur, sigma=(0.1, 2.0)),
      *normalize(self),
    )
    view = lambda name, size, count, scale: View(name=name, size=size, count=count, scale=scale, augment=augment)
    views = (
      view("target", self.rand_size, 1, self.rand_scale),
      view("rand", self.rand_size, self.rand_views, self.rand_scale),
      view("focal", self.focal_size, self.focal_views, self.focal_scale),
    )
    return Inputs(views=tuple(v for v in views if v.count))

  def eval_view(self) -> View:
    return center_view(self, size=self.rand_size)

  # 2. Networks

  @property
  def encoder(self) -> Encoder:
    return Encoder(backbone=self.model, head=ProjectionHead(hidden=(self.hidden_dim,) * 2, output=self.output_dim, activation="gelu"))

  @property
  def target_encoder(self) -> Encoder:
    return as_teacher(self.encoder)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    rng_encoder, rng_prototypes = jax.random.split(rng)
    variables = self.encoder.init(rng_encoder, batch["target"][:, 0], train=False)
    bound = self.output_dim**-0.5
    prototypes = jax.random.uniform(rng_prototypes, (self.num_prototypes, self.output_dim), minval=-bound, maxval=bound)
    params = {"encoder": variables["params"], "prototypes": prototypes}
    stats = variables.get("batch_stats", {})
    return params, {"teacher": copy_tree(variables["params"]), "batch_stats": stats, "teacher_batch_stats": copy_tree(stats)}

  # 3. Loss

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    # 3.1 Anchors, each resolution its own batch: z [M*B, D], view-major.
    anchors = (self._packed_anchors if self.pack_crops else self._anchors)(params["encoder"], extra["batch_stats"], batch, rng)
    z = anchors.out["projection"]

    # 3.2 Targets: the EMA encoder in train mode, so that its BN uses this batch.
    target = encode(self.target_encoder, extra["teacher"], extra["teacher_batch_stats"], batch["target"][:, 0], train=True)
    h = jax.lax.stop_gradient(target.out["projection"])  # [B, D]

    # 3.3 Assignments and their cross-entropy, and me-max.
    out = distill.msn_loss(
      z,
      h,
      params["prototypes"],
      num_views=self.rand_views + self.focal_views,
      temperature=self.temperature,
      sharpen=self.sharpening(step),
      sinkhorn=self.sinkhorn,
      sinkhorn_iterations=self.sinkhorn_iterations,
      memax_weight=self.memax_weight,
      entropy_weight=self.entropy_weight,
      label_smoothing=self.label_smoothing,
    )
    metrics = {"ce": out.ce, "memax": out.memax, "entropy": out.entropy, "max_target": out.max_target, "distinct_targets": out.distinct_targets}
    metrics |= health.distribution(out.targets, name="target") | health.distribution(out.probabilities, name="prediction")
    metrics |= {"padding": anchors.out["padding"]} if "padding" in anchors.out else {}
    metrics |= health.embedding(z) | {"agreement": health.agreement(z[: h.shape[0]], h), "sharpen": self.sharpening(step)}
    extra = extra | {"batch_stats": anchors.batch_stats, "teacher_batch_stats": target.batch_stats}
    return out.total, (extra, jax.lax.stop_gradient(metrics))

  def _anchors(self, params: Params, stats: Extra, batch: dict[str, Array], rng: Array) -> Encoded:
    """Random views with patches dropped, then focal views, each kind a batch of its own (but see `one_batch`)."""
    rng_mask, rng_rand, rng_focal = jax.random.split(rng, 3)
    groups = [batch[name] for name, count in (("rand", self.rand_views), ("focal", self.focal_views)) if count]
    if self.one_batch:
      groups = [jnp.concatenate(groups, axis=1)]
    z, keys = [], (rng_rand, rng_focal)[0 if self.rand_views else 1 :]
    for i, views in enumerate(groups):
      images = crop_major(views)  # [V*B, H, W, C]
      keep = self.keep_patches(rng_mask, images) if self.rand_views and i == 0 else None
      kwargs = {} if keep is None else {"keep": keep}
      encoded = encode(self.encoder, params, stats, images, train=True, rng=keys[i], **kwargs)
      stats = encoded.batch_stats
      z.append(encoded.out["projection"])
    return Encoded({"projection": jnp.concatenate(z)}, stats)

  @property
  def one_batch(self) -> bool:
    """Anchors of one size are one BN batch, as released; dropping patches from the random views alone keeps them apart (own choice)."""
    return bool(self.rand_views and self.focal_views) and not self.patch_drop and sides(self.rand_size) == sides(self.focal_size)

  def _packed_anchors(self, params: Params, stats: Extra, batch: dict[str, Array], rng: Array) -> Encoded:
    """The same of both kinds in common sequences; the head's BN still sees each kind by itself."""
    rng_mask, rng_drop, _ = jax.random.split(rng, 3)
    groups = [batch[name] for name, count in (("rand", self.rand_views), ("focal", self.focal_views)) if count]
    keeps: list[Array | None] = [None] * len(groups)
    if self.rand_views:
      keep = self.keep_patches(rng_mask, crop_major(groups[0]))
      if keep is not None and keep.ndim == 2:  # rows view by view -> image by image
        keep = keep.reshape(self.rand_views, -1, keep.shape[-1]).swapaxes(0, 1).reshape(keep.shape)
      keeps[0] = keep
    kwargs = {"pack": self.pack_crops, "keeps": keeps, "head_per_group": not self.one_batch}
    encoded = encode_packed(self.encoder, params, stats, groups, train=True, rng=rng_drop, **kwargs)
    z = encoded.out["projection"]  # [M, B, D]
    return Encoded({"projection": z.reshape(-1, z.shape[-1]), "padding": encoded.out["padding"]}, encoded.batch_stats)

  def keep_patches(self, rng: Array, images: Array) -> Array | None:
    """Indices of the kept patches: [K] for the batch, or [N, K] with `mask_per_image`; None keeps all."""
    if self.patch_drop == 0:
      return None
    patch = getattr(self.model, "patch", None)
    if patch is None:
      raise UserError(f"config.method.patch_drop={self.patch_drop}: {type(self.model).__name__} has no patches to drop; use 0.")
    tokens = (images.shape[1] // patch) * (images.shape[2] // patch)
    return masking.keep_indices(rng, tokens=tokens, ratio=self.patch_drop, batch=images.shape[0] if self.mask_per_image else None)

  # 4. Schedules and the target's update

  def progress(self, step: Array) -> Array:
    return jnp.asarray(step, jnp.float32) / (self.stretch * self.total_steps)

  def sharpening(self, step: Array) -> Array:
    return self.sharpen + (self.sharpen_final - self.sharpen) * self.progress(step)

  def ema_momentum(self, step: Array) -> Array:
    return self.momentum + (self.momentum_final - self.momentum) * self.progress(step)

  def post_update(self, params: Params, extra: Extra, step: Array) -> Extra:
    return extra | {"teacher": ema(extra["teacher"], params["encoder"], self.ema_momentum(step))}

  # 5. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The target's trunk: "pooled" is the CLS of the last block WITHOUT the final norm, as the paper's probes read it."""
    del params
    encoded = encode(self.target_encoder, extra["teacher"], extra["teacher_batch_stats"], batch["image"][:, 0], train=False)
    out = encoded.out
    pooled = out["cls_layers"][:, -1] if "cls_layers" in out else out["pooled"]
    return {"pooled": pooled, "normed": out["pooled"], "projection": out["projection"]}

  def assignments(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array:
    """Cosines of the target's projection and the prototypes."""
    z = self.features(params, extra, batch)["projection"]
    return distill.cosines(z, params["prototypes"])

  def trunk(self, params: Params, extra: Extra) -> Trunk:
    del params
    return self.trunk_of(extra["teacher"], extra["teacher_batch_stats"])

  def param_rules(self) -> tuple[Rule, ...]:
    """CLS and positions ARE decayed, biases and norms are not; prototypes have no decay and stay out of the clipping."""
    return (
      Rule(pattern=r"^prototypes$", weight_decay=0.0, clip=False),
      Rule(pattern=r"(bias|scale)$", weight_decay=0.0, trust_ratio=False),
      Rule(pattern=r".*"),
    )
