"""MoCo v1 and v2: momentum contrast (arXiv 1911.05722, 2003.04297).

A query encoder sees one view, a key encoder, its slow average, the other; the query must find its key among K keys of
earlier batches (Algorithm 1):

  theta_k <- m theta_k + (1 - m) theta_q                                   before the keys, from the last update's theta_q
  loss = mean_i -log exp(q_i . k_i / T) / (exp(q_i . k_i / T) + sum_j exp(q_i . queue_j / T))
  queue <- k, at the pointer                                               after the loss

v2 adds an MLP head, blur, a weaker hue and a cosine schedule. Batch statistics are not averaged: the key encoder
normalizes by its own batches. Where they are per group of the batch (config.model.bn_groups, one group per device in the
paper), the images of the key encoder are shuffled, so that a query cannot tell its key by its group (section 3.3).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD, ColorJitter, GaussianBlur, Grayscale
from big_ssl.core import health, schedules
from big_ssl.core.method import Inputs, Method, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Rule, Size, UserError
from big_ssl.losses.contrastive import InfoNCE, queue_nce
from big_ssl.methods.parts import center_view, check_channels, check_least, check_positive, check_shares, normalize
from big_ssl.models.encoder import Encoded, Encoder, as_teacher, copy_tree, encode
from big_ssl.models.heads import ProjectionHead
from big_ssl.ops import queue as queue_lib
from big_ssl.ops.ema import ema
from big_ssl.ops.normalize import l2_normalize


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCo(Method):
  """MoCo; defaults are v2 on ImageNet. v1: head_layers=1, temperature=0.07, hue=0.4, jitter=1, blur=0, gray_first=True.

  Attributes:
    queue_size: K, a multiple of the keys of a step: of the batch, or of two batches where symmetric; well below the number
      of images, else an image meets its own older keys as negatives.
    temperature: T; 0.07 in v1, 0.2 in v2.
    momentum, momentum_final: m, a cosine from the first to the second; the papers keep 0.999.
    head_layers: 1 is v1's linear map to `output_dim`; 2 is v2's MLP with one hidden layer of `hidden_dim`; no BN.
    symmetric: both views are query and key in turn, the two losses are added and all keys enter the queue (the official
      CIFAR demonstration; about twice the epochs in cost and effect).
    shuffle_bn: shuffles the images of the key encoder; changes nothing where BN is over the whole batch.
    size, scale: of both views.
    color_strength: of brightness, contrast and saturation; hue: its own; jitter: probability of the four.
    gray, blur: probabilities; gray_first: grayscale comes before the jitter (v1).
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the evaluation crop keeps (224 of 256).
  """

  queue_size: int = 65536
  temperature: float = 0.2
  momentum: float = 0.999
  momentum_final: float = 0.999
  head_layers: int = 2
  hidden_dim: int = 2048
  output_dim: int = 128
  symmetric: bool = False
  shuffle_bn: bool = True
  size: Size = 224
  scale: tuple[float, float] = (0.2, 1.0)
  color_strength: float = 0.4
  hue: float = 0.1
  jitter: float = 0.8
  gray: float = 0.2
  gray_first: bool = False
  blur: float = 0.5
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  accumulation_reason = "the key encoder and the queue move once per update, by a whole batch"

  def __post_init__(self):
    queue_lib.check_length(self.queue_size, batch_size=self.batch_size, path="config.method.queue_size")
    if self.symmetric and self.queue_size % (2 * self.batch_size):
      raise UserError(
        f"config.method.queue_size={self.queue_size}: with symmetric=True it must be a multiple of the keys of both views,"
        f" 2 x config.batch_size={self.batch_size}."
      )
    check_positive(self, "temperature")
    check_shares(self, "momentum", "momentum_final", "gray")
    check_least(self, head_layers=1, hidden_dim=1, output_dim=1)
    check_channels(self)

  # 1. Views

  def inputs(self) -> Inputs:
    s, gray = self.color_strength, Grayscale(p=self.gray)
    jitter = ColorJitter(brightness=s, contrast=s, saturation=s, hue=self.hue, p=self.jitter)
    color = (gray, jitter) if self.gray_first else (jitter, gray)
    augment = (*color, GaussianBlur(p=self.blur, sigma=(0.1, 2.0)), *normalize(self))
    return Inputs(views=(View(name="views", size=self.size, count=2, scale=self.scale, augment=augment),))

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  # 2. Networks

  @property
  def encoder(self) -> Encoder:
    hidden = (self.hidden_dim,) * (self.head_layers - 1)
    head = ProjectionHead(hidden=hidden, output=self.output_dim, activation="relu", batch_norm=False, init_std=None)
    return Encoder(backbone=self.model, head=head)

  @property
  def key_encoder(self) -> Encoder:
    return as_teacher(self.encoder)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    rng_encoder, rng_queue = jax.random.split(rng)
    variables = self.encoder.init(rng_encoder, batch["views"][:, 0], train=False)
    stats = variables.get("batch_stats", {})
    queue = queue_lib.ring(l2_normalize(jax.random.normal(rng_queue, (self.queue_size, self.output_dim))))
    extra = {"teacher": copy_tree(variables["params"]), "batch_stats": stats, "teacher_batch_stats": copy_tree(stats)}
    return {"encoder": variables["params"]}, extra | {"queue": queue.rows, "queue_pointer": queue.pointer}

  # 3. Loss

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    queue = queue_lib.Ring(rows=extra["queue"], pointer=extra["queue_pointer"])  # [K, D]

    # 3.1 The key encoder follows the weights that the last update left.
    teacher = ema(extra["teacher"], jax.lax.stop_gradient(params["encoder"]), self.ema_momentum(step))
    extra = extra | {"teacher": teacher}

    # 3.2 Queries and keys [B, D], and the loss on the queue from before them.
    keys, outs, q = [], [], None
    for i in range(2 if self.symmetric else 1):
      rng_query, rng_key = jax.random.split(jax.random.fold_in(rng, i))
      query = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["views"][:, i], train=True, rng=rng_query)
      key = self.encode_keys(extra, batch["views"][:, 1 - i], rng_key)
      q, k = query.out["projection"], jax.lax.stop_gradient(l2_normalize(key.out["projection"]))
      outs.append(queue_nce(q, k, queue=queue.rows, temperature=self.temperature))
      keys.append(k)
      extra = extra | {"batch_stats": query.batch_stats, "teacher_batch_stats": key.batch_stats}

    # 3.3 The keys replace the oldest ones.
    queue = queue_lib.write(queue, jnp.concatenate(keys[::-1]))  # first the keys of view 0, then of view 1
    extra = extra | {"queue": queue.rows, "queue_pointer": queue.pointer}
    return sum(out.loss for out in outs), (extra, jax.lax.stop_gradient(self._metrics(outs, q, keys[-1], step)))

  def encode_keys(self, extra: Extra, images: Array, rng: Array) -> Encoded:
    """Key encoder in train mode; with `shuffle_bn` on shuffled images, the keys brought back into their order."""
    if not self.shuffle_bn:
      return encode(self.key_encoder, extra["teacher"], extra["teacher_batch_stats"], images, train=True)
    order = jax.random.permutation(rng, images.shape[0])
    shuffled = encode(self.key_encoder, extra["teacher"], extra["teacher_batch_stats"], jnp.take(images, order, axis=0), train=True)
    keys = jnp.take(shuffled.out["projection"], jnp.argsort(order), axis=0)
    return Encoded({"projection": keys}, shuffled.batch_stats)

  def _metrics(self, outs: list[InfoNCE], q: Array, k: Array, step: Array) -> Metrics:
    accuracy = sum(out.accuracy for out in outs) / len(outs)
    metrics = {"contrastive_accuracy": accuracy, "agreement": health.agreement(q, k), "momentum": self.ema_momentum(step)}
    return metrics | health.embedding(q)

  def ema_momentum(self, step: Array) -> Array:
    return schedules.cosine(step, start=self.momentum, final=self.momentum_final, total=self.total_steps)

  # 4. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The query trunk's output ("pooled") and the projection."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "projection": out["projection"]}

  def param_rules(self) -> tuple[Rule, ...]:
    """Weight decay is on everything, biases and norms included; these have no trust ratio under LARS."""
    return (Rule(pattern=r"(bias|scale)$", trust_ratio=False), Rule(pattern=r".*"))
