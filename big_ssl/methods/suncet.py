"""SuNCEt, contrastive learning from labels alone (arXiv 2006.10803), as PAWS is fine-tuned on CIFAR-10 (arXiv 2104.13963, App. C).

  p_i = softmax_{j != i}(cos(z_i, z_j) / tau) Y        over the class-balanced batch of labeled images
  loss = -1/N sum_i sum_c Y_ic log p_ic

The network, its trees of parameters and statistics and the stream of labeled images are those of `methods.paws`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from big_ssl.augment.photometric import CIFAR_MEAN, CIFAR_STD
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, Trunk, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Rule, Size, UserError
from big_ssl.losses import semi
from big_ssl.methods import paws
from big_ssl.methods.parts import center_view
from big_ssl.models.encoder import crop_major


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuNCEt(Method):
  """Supervised noise-contrastive estimation; defaults are the released fine-tuning on CIFAR-10.

  Attributes:
    classes_per_step, images_per_class, labels_per_class, labels_seed, labels_file: as of PAWS; config.batch_size should be
      the product of the first two, since epochs are counted by it.
    support_views: flipped views of each image.
    output_dim, hidden_dim, prediction_head: of the heads, as of PAWS.
    temperature: tau.
    label_smoothing: s of the labels; the release fine-tunes without.
    fixed_statistics: BN normalizes by its running statistics, which stay: the release fine-tunes so. From fresh weights
      these say nothing; then use False.
    size: of the center crop.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the crop keeps.
  """

  classes_per_step: int = 10
  images_per_class: int = 64
  support_views: int = 2
  labels_per_class: int = 400
  labels_seed: int = 0
  labels_file: str = ""
  output_dim: int = 128
  hidden_dim: int = 0
  prediction_head: bool = False
  temperature: float = 0.1
  label_smoothing: float = 0.0
  fixed_statistics: bool = True
  size: Size = 32
  mean: tuple[float, ...] = CIFAR_MEAN
  std: tuple[float, ...] = CIFAR_STD
  eval_fraction: float = 1.0

  accumulation_reason = "every image is compared with all others of the batch"

  def __post_init__(self):
    paws.check_support(self)
    if self.images_per_class * self.support_views < 2:
      raise UserError(f"config.method.images_per_class={self.images_per_class}: one image in one view has none of its class to go to.")

  def inputs(self) -> Inputs:
    view = dataclasses.replace(self.eval_view(), name="big", count=self.support_views, flip=0.5)
    return Inputs(views=(view,), keys=("label",), sampler=paws.support_sampler(self))

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    return paws.init_networks(self, rng, batch["big"][:, 0])

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    images = crop_major(batch["big"])  # [V*S, H, W, C]
    out, stats = paws.embed(self, params, extra["batch_stats"], images, train=not self.fixed_statistics, rng=rng)
    columns = jnp.unique(batch["label"], size=self.classes_per_step, fill_value=-1)
    y = semi.label_matrix(jnp.tile(batch["label"], self.support_views), columns=columns, smoothing=self.label_smoothing)
    z = out["prediction"]
    found = semi.suncet_loss(z, labels=y, temperature=self.temperature)
    metrics = {"accuracy": found.accuracy} | health.embedding(z)
    return found.loss, ({"batch_stats": stats}, jax.lax.stop_gradient(metrics))

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """As of PAWS: "pooled", "projection" and "prediction"."""
    return paws.embed(self, params, extra["batch_stats"], batch["image"][:, 0], train=False)[0]

  def trunk(self, params: Params, extra: Extra) -> Trunk:
    return self.trunk_of(params["encoder"], extra["batch_stats"]["encoder"])

  def param_rules(self) -> tuple[Rule, ...]:
    return paws.paws_rules()
