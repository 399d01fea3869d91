"""LOCA: location-aware self-supervised transformers for semantic segmentation (arXiv 2212.02400).

Queries, one large and several focal, are cut from the same image as a reference. For every query patch i that lies inside
the reference, at its patch y_i:

  L_pos = mean_i CE(softmax(W g(x_i, visible reference tokens)), y_i)     g: one cross-attention block
  L_clu = mean_i CE(softmax(cos(h(x_i), c) / tau), t[y_i])                t = Sinkhorn(softmax(cos(teacher, c) / tau'))
  loss  = L_pos + L_clu + lambda sum_k q_k log q_k                        q: mean prediction of all query patches

The EMA teacher encodes the whole reference; only a run of its tokens is shown to the queries, which makes finding a
place a matter of what is there, not of matching pixels. `cluster_loss=False` is the location-only variant.

Facts where paper and public code differ follow the code. One run of visible tokens and one set of kept query tokens serve
the global batch (the reference: one per device). Own choices: crops are torchvision's random resized ones, with the
logarithm of the aspect uniform where TensorFlow draws the aspect itself; large images are shrunk into the canvas first.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from big_ssl.augment.correspondence import patch_positions, pixel_boxes
from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD, ColorJitter, GaussianBlur, Grayscale, Solarize
from big_ssl.core import health, schedules
from big_ssl.core.method import Inputs, Method, Trunk, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Rule, Size, UserError, sides
from big_ssl.losses import location
from big_ssl.methods import parts
from big_ssl.models.encoder import Encoder, as_teacher, copy_tree, encode
from big_ssl.models.loca_heads import ClusterHead, PositionHead
from big_ssl.models.vit import ViT
from big_ssl.ops.ema import ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class LOCA(Method):
  """LOCA; defaults are the released ViT-B/16 recipe. The backbone is a ViT, best without a class token.

  Attributes:
    num_prototypes: K.
    output_dim, hidden_dim: of the cluster head, d -> hidden -> hidden -> output.
    temperature, sharpen: tau of the student, tau' of the teacher.
    sinkhorn_iterations: of the balancing of the targets over the global batch.
    memax_weight: lambda.
    cluster_loss: False is the location-only variant: the student encodes the reference itself, already cut to the visible
      tokens, and the queries have no positions.
    loss_groups: 1 divides the loss by the valid patches of the global batch; N by those of each N-th of it, then averages,
      as N devices of the released code do.
    momentum, momentum_final: of the teacher, a cosine over the training.
    teacher_drop_path: stochastic depth in the teacher too, as released.
    reference_size, query_size, focal_size: of the views.
    focal_queries: number of focal queries; there is one large query besides.
    reference_seqlen: consecutive tokens of the reference that the queries see.
    query_seqlen: random tokens of the large query that stay; focal queries keep all.
    query_scale, focal_scale: share of the image area; the reference has that of the query.
    color_strength, gray, solarize: of the jitter; probabilities, solarization of the large query only.
    blur: True blurs as intended (reference always, query .1, focal .5); the released code's blur has a kernel of 1 pixel.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the evaluation crop keeps (224 of 256).
  """

  num_prototypes: int = 4096
  output_dim: int = 256
  hidden_dim: int = 2048
  temperature: float = 0.1
  sharpen: float = 0.05
  sinkhorn_iterations: int = 3
  memax_weight: float = 1.0
  cluster_loss: bool = True
  loss_groups: int = 1
  momentum: float = 0.996
  momentum_final: float = 1.0
  teacher_drop_path: bool = True
  reference_size: Size = 224
  query_size: Size = 224
  focal_size: Size = 96
  focal_queries: int = 9
  reference_seqlen: int = 39
  query_seqlen: int = 70
  query_scale: tuple[float, float] = (0.32, 1.0)
  focal_scale: tuple[float, float] = (0.05, 0.32)
  color_strength: float = 1.0
  gray: float = 0.2
  solarize: float = 0.2
  blur: bool = False
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  accumulation_reason = "me-max and Sinkhorn need the whole batch, and the losses are means over its valid patches"

  def __post_init__(self):
    parts.check_least(self, focal_queries=1, focal_size=1, num_prototypes=2, output_dim=1, hidden_dim=1, sinkhorn_iterations=1)
    parts.check_positive(self, "temperature", "sharpen")
    parts.check_shares(self, "momentum", "momentum_final")
    if self.loss_groups < 1 or (self.model is not None and self.batch_size % self.loss_groups):
      raise UserError(f"config.method.loss_groups={self.loss_groups}: must divide config.batch_size={self.batch_size}.")
    parts.check_channels(self)
    if self.model is not None:
      self._check_patches()

  def _check_patches(self) -> None:
    if not isinstance(self.model, ViT) or self.model.stem_channels:
      raise UserError(f"config.model: LOCA needs a ViT with a linear patch embedding; {type(self.model).__name__} as configured is none.")
    if self.model.patch_sizes:
      raise UserError(f"config.model.patch_sizes={self.model.patch_sizes}: LOCA's positions are patches, of one size in training; use ().")
    parts.check_patches(self, "reference_size", "query_size", "focal_size")
    for name, size in (("reference_seqlen", self.reference_size), ("query_seqlen", self.query_size)):
      positions = self.patches(size)
      if not 1 <= getattr(self, name) <= positions:
        raise UserError(f"config.method.{name}={getattr(self, name)}: from 1 to the {positions} patches of a view of {size} pixels.")

  def grid(self, size: Size) -> tuple[int, int]:
    """Patches down and across a view."""
    height, width = sides(size)
    return height // self.model.patch, width // self.model.patch

  def patches(self, size: Size) -> int:
    return math.prod(self.grid(size))

  # 1. Views

  def inputs(self) -> Inputs:
    s = self.color_strength
    jitter = ColorJitter(brightness=0.4 * s, contrast=0.4 * s, saturation=0.2 * s, hue=0.1 * s, p=0.8, style="byol")

    def view(name: str, size: Size, count: int, scale: tuple[float, float], flip: float, blur: float, solarize: float) -> View:
      augment = (
        jitter,
        Grayscale(p=self.gray, luma="byol"),
        GaussianBlur(p=blur if self.blur else 0.0, sigma=(0.1, 2.0), taps="tenth", edge="zero"),
        Solarize(p=solarize),
        *parts.normalize(self),
      )
      return View(name=name, size=size, count=count, scale=scale, flip=flip, antialias=False, return_box=True, augment=augment)

    reference = view("reference", self.reference_size, 1, self.query_scale, 0.0, 1.0, 0.0)
    query = view("query", self.query_size, 1, self.query_scale, 0.5, 0.1, self.solarize)
    focal = view("focal", self.focal_size, self.focal_queries, self.focal_scale, 0.5, 0.5, 0.0)
    return Inputs(views=(reference, query, focal))

  def eval_view(self) -> View:
    return parts.center_view(self, size=self.reference_size)

  def query_positions(self, batch: dict[str, Array], name: str) -> Array:
    """The reference patch under each patch of the views `name`, [B, V * T] int32, row-major, -1 outside."""
    reference, query = (pixel_boxes(batch[f"{n}_box"], sides=batch["size"][:, None]) for n in ("reference", name))
    grid, size = self.grid(self.reference_size), batch[name].shape[2:4]
    found = patch_positions(reference[:, 0], query, batch[f"{name}_flip"], grid=grid, size=size, patch=self.model.patch)
    return found.reshape(found.shape[0], -1)

  # 2. Networks

  @property
  def encoder(self) -> Encoder:
    head = ClusterHead(prototypes=self.num_prototypes, hidden=(self.hidden_dim,) * 2, output=self.output_dim)
    return Encoder(backbone=self.model, head=head if self.cluster_loss else None, output="tokens")

  @property
  def teacher_encoder(self) -> Encoder:
    return self.encoder if self.teacher_drop_path else as_teacher(self.encoder)

  @property
  def position_head(self) -> PositionHead:
    vit, size = self.model, self.model.size()
    return PositionHead(positions=self.patches(self.reference_size), heads=size.heads, mlp_dim=size.mlp_dim, epsilon=vit.layernorm_eps, dtype=vit.dtype)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    rng_encoder, rng_head = jax.random.split(rng)
    encoder = self.encoder.init(rng_encoder, batch["reference"][:, 0], train=False)["params"]
    tokens = jnp.zeros((1, 1, self.model.size().width))
    params = {"encoder": encoder, "position_head": self.position_head.init(rng_head, tokens, tokens)["params"]}
    return params, {"teacher": copy_tree(params)}

  # 3. Loss

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    rng_run, rng_keep, rng_reference, rng_query, rng_focal = jax.random.split(rng, 5)
    run, keep = self.visible_run(rng_run), self.kept_tokens(rng_keep)

    # 3.1 The reference: the teacher sees all of it, the queries a run of its tokens.
    images = batch["reference"][:, 0]
    if self.cluster_loss:
      reference = encode(self.teacher_encoder, extra["teacher"]["encoder"], {}, images, train=True, rng=rng_reference).out
      reference = jax.lax.stop_gradient(reference)
      visible = jnp.take(reference["tokens"], run, axis=1)  # [B, R, D]
    else:
      reference = encode(self.encoder, params["encoder"], {}, images, train=True, rng=rng_reference, keep=run).out
      visible = reference["tokens"]

    # 3.2 The queries: tokens x [B, M, D] of all of them side by side, and their places y [B, M] in the reference.
    rows, student = images.shape[0], {"train": True, "add_positions": self.cluster_loss}
    query = encode(self.encoder, params["encoder"], {}, batch["query"][:, 0], rng=rng_query, keep=keep, **student).out
    focal_images = batch["focal"].reshape(-1, *batch["focal"].shape[2:])  # image-major, as the batch is sharded
    focal = encode(self.encoder, params["encoder"], {}, focal_images, rng=rng_focal, **student).out
    both = lambda key: jnp.concatenate([query[key], focal[key].reshape(rows, -1, focal[key].shape[-1])], axis=1)
    x = both("tokens")
    y = jnp.concatenate([jnp.take(self.query_positions(batch, "query"), keep, axis=1), self.query_positions(batch, "focal")], axis=1)

    # 3.3 Position prediction.
    logits = self.position_head.apply({"params": params["position_head"]}, x, visible)
    place = location.position_loss(logits, y, groups=self.loss_groups)
    metrics = {"position_loss": place.loss, "position_accuracy": place.accuracy, "valid_fraction": place.valid}
    metrics |= health.embedding(x.reshape(-1, x.shape[-1])) | {"momentum": self.ema_momentum(step)}
    if not self.cluster_loss:
      return place.loss, (extra, jax.lax.stop_gradient(metrics))

    # 3.4 Patch-cluster prediction and me-max.
    out = location.patch_cluster_loss(
      both("projection"),
      reference["projection"],
      y,
      temperature=self.temperature,
      sharpen=self.sharpen,
      sinkhorn_iterations=self.sinkhorn_iterations,
      groups=self.loss_groups,
    )
    flat = lambda p: p.reshape(-1, p.shape[-1])
    metrics |= {"cluster_ce": out.ce, "memax": out.memax}
    metrics |= health.distribution(flat(out.targets), name="target") | health.distribution(flat(out.probabilities), name="prediction")
    total = place.loss + out.ce + self.memax_weight * out.memax
    return total, (extra, jax.lax.stop_gradient(metrics))

  def visible_run(self, rng: Array) -> Array:
    """Consecutive tokens, row-major, one offset for the batch; [reference_seqlen] int32."""
    return jax.random.randint(rng, (), 0, self.patches(self.reference_size) - self.reference_seqlen + 1) + jnp.arange(self.reference_seqlen)

  def kept_tokens(self, rng: Array) -> Array:
    """Tokens of the large query that stay, one random set for the batch; [query_seqlen] int32."""
    return jax.random.permutation(rng, self.patches(self.query_size))[: self.query_seqlen]

  # 4. The teacher's update

  def ema_momentum(self, step: Array) -> Array:
    return schedules.cosine(step, start=self.momentum, final=self.momentum_final, total=self.total_steps)

  def post_update(self, params: Params, extra: Extra, step: Array) -> Extra:
    return extra | {"teacher": ema(extra["teacher"], params, self.ema_momentum(step))}

  # 5. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """ "pooled": the mean of the teacher's patch tokens after the final norm (own choice); "student": the same of the student."""
    of = lambda tree: encode(self.encoder, tree["encoder"], {}, batch["image"][:, 0], train=False).out["tokens"]
    mean = lambda tree: jnp.mean(of(tree).astype(jnp.float32), axis=1)
    return {"pooled": mean(extra["teacher"]), "student": mean(params)}

  def trunk(self, params: Params, extra: Extra) -> Trunk:
    del params
    return self.trunk_of(extra["teacher"]["encoder"], {})

  def param_rules(self) -> tuple[Rule, ...]:
    """Decay on every parameter whose rank is not 1: positions, prototypes, and the biases of query, key and value, one row per head."""
    return (
      Rule(pattern=r"/(query|key|value)/bias$"),
      Rule(pattern=r"(bias|scale)$", weight_decay=0.0, trust_ratio=False),
      Rule(pattern=r".*"),
    )
