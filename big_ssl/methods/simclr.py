"""SimCLR: a simple framework for contrastive learning (arXiv 2002.05709; v2's deeper head 2006.10029).

Two views of each image pass through one encoder and a projection head g; NT-Xent makes them find each other among the
other 2B - 2 views of the batch (eq. 1):

  l_i = -log exp(sim(z_i, z_p(i)) / tau) / sum_{j != i} exp(sim(z_i, z_j) / tau)

Negatives and BN statistics are over the global batch, both views in one BN batch, as in the official code. The loss is
the mean over 2B anchors (Algorithm 1); the official code adds the means of the two views, `loss_scale=2`.
"""

from __future__ import annotations

import dataclasses

import jax

from big_ssl.augment.photometric import ColorJitter, GaussianBlur, Grayscale
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Rule, Size
from big_ssl.losses import contrastive
from big_ssl.methods.parts import center_view, check_channels, check_least, check_positive, check_shares, normalize
from big_ssl.models.encoder import Encoder, crop_major, encode
from big_ssl.models.heads import ProjectionHead


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimCLR(Method):
  """SimCLR; defaults are the ImageNet recipe.

  Attributes:
    temperature: tau; 0.1 for ImageNet, 0.5 for CIFAR-10.
    loss_scale: 1, the paper's mean over 2B anchors; 2, the official code's sum of two means.
    hidden_dim, output_dim, head_layers: of g; each layer has BN, the last one without bias; two layers in v1, three in v2.
    size: of the views; scale: their share of the image area.
    color_strength: s; 1 for ImageNet, 0.5 for CIFAR-10.
    jitter: "simclr" multiplies brightness and takes contrast per channel (v2 code); "pil" as torchvision.
    gray: probability of grayscale.
    blur: probability; 0 for CIFAR-10.
    mean, std: pixel normalization; () is none, as in the official code.
    eval_fraction: share of the shorter side kept in evaluation.
  """

  temperature: float = 0.1
  loss_scale: float = 1.0
  hidden_dim: int = 2048
  output_dim: int = 128
  head_layers: int = 2
  size: Size = 224
  scale: tuple[float, float] = (0.08, 1.0)
  color_strength: float = 1.0
  jitter: str = "simclr"
  gray: float = 0.2
  blur: float = 0.5
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()
  eval_fraction: float = 224 / 256

  accumulation_reason = "every view is a negative of every other in the batch"

  def __post_init__(self):
    check_positive(self, "temperature")
    check_least(self, head_layers=1)
    check_shares(self, "gray", "blur")
    check_channels(self)

  def inputs(self) -> Inputs:
    s = self.color_strength
    augment = (
      ColorJitter(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8, style=self.jitter),
      Grayscale(p=self.gray),
      GaussianBlur(p=self.blur, sigma=(0.1, 2.0), taps="tenth", edge="zero"),
      *normalize(self),
    )
    view = View(name="views", size=self.size, count=2, scale=self.scale, interpolation="bicubic", augment=augment)
    return Inputs(views=(view,))

  def eval_view(self) -> View:
    return center_view(self, size=self.size, interpolation="bicubic")

  @property
  def encoder(self) -> Encoder:
    hidden = (self.hidden_dim,) * (self.head_layers - 1)
    head = ProjectionHead(hidden=hidden, output=self.output_dim, activation="relu", final_batch_norm=True, use_bias=False, init_std=0.01)
    return Encoder(backbone=self.model, head=head)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    variables = self.encoder.init(rng, batch["views"][:, 0], train=False)
    return {"encoder": variables["params"]}, {"batch_stats": variables.get("batch_stats", {})}

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    images = crop_major(batch["views"])  # [2B, H, W, C]
    encoded = encode(self.encoder, params["encoder"], extra["batch_stats"], images, train=True, rng=rng)
    z = encoded.out["projection"]  # [2B, D]
    out = contrastive.nt_xent(z, temperature=self.temperature, loss_scale=self.loss_scale)
    first, second = z[: len(z) // 2], z[len(z) // 2 :]
    metrics = {"contrastive_accuracy": out.accuracy, "agreement": health.agreement(first, second)} | health.embedding(z)
    return out.loss, ({"batch_stats": encoded.batch_stats}, jax.lax.stop_gradient(metrics))

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's output before the head ("pooled"), and the projection."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "projection": out["projection"]}

  def param_rules(self) -> tuple[Rule, ...]:
    return (Rule(pattern=r"(bias|scale)$", weight_decay=0.0, trust_ratio=False), Rule(pattern=r".*"))
