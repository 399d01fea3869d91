"""Contrastive pretraining on packed images of native aspect.

Two crops of every image, each with its own draws of box, side, dropped patches and colors, are packed with the crops of
other images into sequences of a NaViT; one vector per crop is pooled and projected. Row i of the one view must be found
among the rows of the other, over the global batch (`losses.contrastive.pair_loss`):

  l_ij = exp(s) cos(z_i, z'_j) + b
  softmax: mean_i (logsumexp_j l_ij + logsumexp_j l_ji) / 2 - l_ii        s learned
  sigmoid: mean_i sum_j -log sigmoid(y_ij l_ij),  y = 1 for i = j, else -1    s and b learned

Packing, sampled resolutions, token dropping and the loss in chunks of columns, which never holds the [B, B] logits, are
NaViT's (arXiv 2307.06304, sections 2.1 and 2.2), whose contrastive training is on pairs of image and text. Two views of
one image in their place are our own choice, with the colors of SimCLR (arXiv 2002.05709); the head has no BN, as NaViT
has none.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from big_ssl.augment.photometric import ColorJitter, GaussianBlur, Grayscale
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method
from big_ssl.core.types import Array, Extra, Metrics, Params, UserError, nearest
from big_ssl.losses.contrastive import pair_loss
from big_ssl.methods.packed import PackedImages
from big_ssl.methods.parts import check_least, check_shares
from big_ssl.models.encoder import Encoder
from big_ssl.models.heads import ProjectionHead

VIEWS = ("crop1", "crop2")
KINDS = ("softmax", "sigmoid")
MAX_SCALE = 100.0  # of the learned scale (CLIP, arXiv 2103.00020, section 2.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaViTContrastive(PackedImages, Method):
  """Contrastive pretraining of a NaViT; views and packing: see `PackedImages`.

  Attributes:
    kind: "softmax", every row among all of the other view (CLIP, arXiv 2103.00020); "sigmoid", each pair by itself
      (SigLIP, arXiv 2303.15343), whose bias starts at -log(B - 1), where a pair is a positive with probability 1/B; the
      paper's -10 is that of 22 thousand images.
    temperature: 1 / exp(s) at the start; it is learned, and 1/100 at least.
    chunk: columns of the logits at a time; 0 is all.
    hidden_dim, output_dim, head_layers: of the projection head, ReLU between.
    gray, blur: probabilities.
  """

  kind: Literal["softmax", "sigmoid"] = "softmax"
  temperature: float = 0.1
  chunk: int = 0
  hidden_dim: int = 2048
  output_dim: int = 128
  head_layers: int = 2
  gray: float = 0.2
  blur: float = 0.5

  accumulation_reason = "every image is a negative of every other in the batch"

  def __post_init__(self):
    super().__post_init__()
    if self.kind not in KINDS:
      raise UserError(f"config.method.kind={self.kind!r}: expected one of {', '.join(KINDS)}.{nearest(self.kind, KINDS)}")
    check_least(self, chunk=0, hidden_dim=1, output_dim=1, head_layers=1, temperature=1 / MAX_SCALE)
    check_shares(self, "gray", "blur")

  # 1. Views

  def inputs(self) -> Inputs:
    s = self.color_strength
    operations = (
      ColorJitter(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8, style="simclr"),
      Grayscale(p=self.gray),
      GaussianBlur(p=self.blur, sigma=(0.1, 2.0)),
    )
    return Inputs(views=tuple(self.packed_view(name, *operations) for name in VIEWS))

  # 2. Networks

  @property
  def encoder(self) -> Encoder:
    hidden = (self.hidden_dim,) * (self.head_layers - 1)
    head = ProjectionHead(hidden=hidden, output=self.output_dim, activation="relu", batch_norm=False, init_std=None)
    return Encoder(backbone=self.model, head=head)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    if self.batch_size < 2:
      raise UserError(f"config.batch_size={self.batch_size}: a contrastive loss needs at least 2 images, for negatives.")
    learned = {"log_scale": -math.log(self.temperature)} | ({"bias": -math.log(self.batch_size - 1)} if self.kind == "sigmoid" else {})
    scalars = {name: jnp.full((), value, jnp.float32) for name, value in learned.items()}
    return {"encoder": self.init_encoder(rng, batch[VIEWS[0]])} | scalars, {}

  def project(self, params: Params) -> Params:
    """Keeps the scale below `MAX_SCALE`."""
    return params | {"log_scale": jnp.minimum(params["log_scale"], math.log(MAX_SCALE))}

  # 3. Loss

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    encoded = self.encode_packed(params, batch, VIEWS, rng=rng)
    first, second = (view["projection"] for view in encoded.views)  # [B, K] each
    scale, bias = jnp.exp(params["log_scale"]), params.get("bias", 0.0)
    out = pair_loss(first, second, scale=scale, bias=bias, kind=self.kind, chunk=self.chunk)
    metrics = {"contrastive_accuracy": out.accuracy, "agreement": health.agreement(first, second), "temperature": 1 / scale}
    metrics |= {"padding": encoded.padding} | ({"bias": bias} if self.kind == "sigmoid" else {})
    return out.loss, (extra, jax.lax.stop_gradient(metrics | health.embedding(first)))

  # 4. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's pooled output of single crops, and the projection."""
    del extra
    return self.encode_images(params, batch)
