"""Supervised semantic segmentation: a linear or mask-transformer decoder on patches, and the backbone with it or frozen.

Segmenter (arXiv 2105.05633) trains all of the network; LOCA (arXiv 2212.02400) is evaluated so, with the linear decoder.
decoder="probe" with frozen=True is the linear protocol of DINOv3 (public code). A run starts from a self-supervised one by
config.init_from.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from big_ssl.augment.distortion import PhotometricDistortion
from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD
from big_ssl.core import health
from big_ssl.core.method import Inputs, Method, Trunk, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Rule, Size
from big_ssl.losses import classify
from big_ssl.methods.parts import center_view, check_channels, check_least, normalize
from big_ssl.models.encoder import encode
from big_ssl.models.segmentation_heads import LinearDecoder, MaskDecoder, ProbeHead, SegmentationNetwork
from big_ssl.ops.segmentation import to_classes


@dataclasses.dataclass(frozen=True)
class SegmentationTrunk(Trunk):
  """A backbone with the decoder that was trained on it.

  Attributes:
    network: both.
    all_variables: its.
  """

  network: SegmentationNetwork
  all_variables: dict[str, Any]

  def segment(self, images: Array) -> Array:
    """Logits [N, h, w, classes] of the patches of [N, H, W, C], which are padded to whole patches."""
    return self.network.apply(self.all_variables, images, train=False)["logit_map"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation(Method):
  """Classification of every pixel of `mask`, by cross-entropy at the size of the crop.

  Crops are those of mmsegmentation: the image resized by a random factor, a crop at a random place, flipped, distorted in
  color, normalized and only then padded with 0, where the mask counts for nothing. Its limit on the share of one class in
  a crop is left out, as crops are drawn before masks are read.

  Attributes:
    classes: number of classes.
    ignore: label, as in the masks, that counts for nothing; also 255, which is around the images.
    drop_first: neither does label 0, and label 1 is the first class (ADE20K).
    decoder: "linear" or "mask" of Segmenter; "probe": dropout of channels, BN, linear layer.
    decoder_layers, dropout: blocks of "mask"; rate of "mask" and "probe".
    layers: how many of the last blocks or stages are read, concatenated.
    frozen: the backbone stays as it is.
    size: of the crop.
    short_side: of the image before the factor in `scale`, in pixels.
    scale: range of that factor.
    distortion: strength of the photometric distortion, 0 is none.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side kept in the evaluation of pooled features.
  """

  classes: int = 2
  ignore: int = 255
  drop_first: bool = False
  decoder: Literal["linear", "mask", "probe"] = "mask"
  decoder_layers: int = 2
  dropout: float = 0.1
  layers: int = 1
  frozen: bool = False
  size: Size = 512
  short_side: int = 512
  scale: tuple[float, float] = (0.5, 2.0)
  distortion: float = 1.0
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 1.0

  accumulation_reason = "its mean is over the pixels of the batch that count, and each microbatch has others"

  def __post_init__(self):
    check_channels(self)
    check_least(self, classes=2, layers=1, decoder_layers=1, short_side=1, dropout=0.0, distortion=0.0)

  def inputs(self) -> Inputs:
    distort = (PhotometricDistortion(strength=self.distortion),) if self.distortion else ()
    view = View(
      name="crop",
      size=self.size,
      crop="scaled",
      scale=self.scale,
      return_box=True,
      augment=(*distort, *normalize(self)),
    )
    fraction = min(view.shape) / self.short_side
    labels = {*range(self.classes + self.drop_first), self.ignore}
    return Inputs(
      views=(dataclasses.replace(view, center_fraction=fraction),), keys=("mask",), mask_labels=tuple(sorted(labels))
    )

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  @property
  def network(self) -> SegmentationNetwork:
    head = {
      "linear": LinearDecoder(self.classes),
      "mask": MaskDecoder(self.classes, layers=self.decoder_layers, dropout=self.dropout),
      "probe": ProbeHead(self.classes, dropout=self.dropout),
    }[self.decoder]
    return SegmentationNetwork(self.model, head, layers=self.layers, frozen=self.frozen)

  def trunk(self, params: Params, extra: Extra) -> SegmentationTrunk:
    plain = super().trunk(params, extra)
    everything = {"params": params["encoder"], "batch_stats": extra["batch_stats"]}
    return SegmentationTrunk(plain.module, plain.variables, self.network, everything)

  def param_rules(self) -> tuple[Rule, ...]:
    frozen = (Rule(pattern=r"^encoder/backbone/", lr_mult=0.0),) if self.frozen else ()
    return (*frozen, *super().param_rules())

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    variables = self.network.init(rng, batch["crop"][:, 0], train=False)
    return {"encoder": variables["params"]}, {"batch_stats": variables.get("batch_stats", {})}

  def loss(
    self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array
  ) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    labels, inside = self.targets(batch)  # [B, H, W] each
    images = jnp.where(inside[..., None], batch["crop"][:, 0], 0.0)
    encoder = params["encoder"]
    if self.frozen:
      encoder = encoder | {"backbone": jax.lax.stop_gradient(encoder["backbone"])}
    encoded = encode(self.network, encoder, extra["batch_stats"], images, train=True, rng=rng)
    logits = encoded.out["logits"].reshape(-1, self.classes)  # [B H W, K]
    loss = classify.cross_entropy(logits, labels=labels.ravel())
    pooled = jnp.mean(encoded.out["map"], axis=(1, 2))
    metrics = {
      "pixel_accuracy": classify.accuracy(logits, labels=labels.ravel()),
      "labeled_share": jnp.mean(labels >= 0),
    }
    stats = extra["batch_stats"] | encoded.batch_stats
    return loss, ({"batch_stats": stats}, jax.lax.stop_gradient(metrics | health.embedding(pooled)))

  def targets(self, batch: dict[str, Array]) -> tuple[Array, Array]:
    """Classes of the pixels of the crop, -1 where they do not count, and whether they are in the image; [B, H, W] each.

    The pixel of the mask under the center of each.
    """
    box, size = batch["crop_box"][:, 0], batch["size"].astype(jnp.int32)  # [B, 4] shares, [B, 2] pixels
    height, width = batch["crop"].shape[2:4]
    share = lambda count: (jnp.arange(count) + 0.5) / count
    across = jnp.where(batch["crop_flip"], 1 - share(width), share(width))  # [B, W]
    y, inside_y = _pixels(box[:, 0], box[:, 2], share(height)[None], size[:, 0])
    x, inside_x = _pixels(box[:, 1], box[:, 3], across, size[:, 1])
    inside = inside_y[:, :, None] & inside_x[:, None, :]
    mask = jax.vmap(lambda m, rows, columns: m[rows[:, None], columns])(batch["mask"], y, x)
    labels = jnp.where(mask == 255, -1, to_classes(mask, ignore=self.ignore, drop_first=self.drop_first))
    return jnp.where(inside, labels, -1), inside

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's pooled output."""
    return {"pooled": self.trunk(params, extra)(batch["image"][:, 0])["pooled"]}


def _pixels(start: Array, stop: Array, share: Array, count: Array) -> tuple[Array, Array]:
  """Pixel numbers [B, n] at shares of a box, and whether they are in an image of `count` [B] pixels."""
  place = jnp.floor((start[:, None] + share * (stop - start)[:, None]) * count[:, None]).astype(jnp.int32)
  return jnp.clip(place, 0, count[:, None] - 1), (place >= 0) & (place < count[:, None])
