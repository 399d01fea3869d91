"""What SwAV, DeepCluster-v2 and SeLa-v2 share: multi-crop views, one trunk, one projection head, unit embeddings.

Two or more large crops, which are assigned to clusters, and small ones, which only predict (arXiv 2006.09882, section
3.2 and appendix A). All crops go through the same photometric pipeline.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from big_ssl.augment.photometric import IMAGENET_MEAN, ColorJitter, GaussianBlur, Grayscale
from big_ssl.core.method import Inputs, View
from big_ssl.core.types import Array, Extra, Params, PyTree, Size, UserError
from big_ssl.methods.parts import center_view, check_channels, check_patches, check_shares, normalize
from big_ssl.models.encoder import Encoder, encode, encode_crops
from big_ssl.models.heads import ProjectionHead
from big_ssl.ops.normalize import l2_normalize

SWAV_STD = (0.228, 0.224, 0.225)  # the first value is the released code's, in training and evaluation


@dataclasses.dataclass(frozen=True)
class Embedded:
  """z [V, B, D], l2-normalized, of all crops, the large ones first; and the batch statistics afterwards."""

  z: Array
  batch_stats: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiCrop:
  """Views, encoder and evaluation features; to be mixed into a `Method`.

  Attributes:
    large_crops, small_crops: how many; the large ones are assigned. 2 and 0 is the two-crop recipe.
    large_size, small_size: in pixels; multiples of the backbone's stride (32 for ResNets).
    large_scale, small_scale: share of the image area; two-crop recipes have (.08, 1).
    color_strength: of the jitter, 1 is brightness, contrast, saturation .8 and hue .2; blur, gray: probabilities.
    mean, std: pixel normalization.
    hidden_dim, output_dim: of the head, d -> hidden, BN, ReLU -> output; 8192 hidden for the wide networks.
    eval_fraction: share of the shorter side that the evaluation crop keeps (224 of 256).
  """

  large_crops: int = 2
  small_crops: int = 6
  large_size: Size = 224
  small_size: Size = 96
  large_scale: tuple[float, float] = (0.14, 1.0)
  small_scale: tuple[float, float] = (0.05, 0.14)
  color_strength: float = 1.0
  blur: float = 0.5
  gray: float = 0.2
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = SWAV_STD
  hidden_dim: int = 2048
  output_dim: int = 128
  eval_fraction: float = 224 / 256

  def __post_init__(self):
    if self.large_crops < 1 or self.small_crops < 0 or self.num_crops < 2:
      raise UserError(
        f"config.method.large_crops={self.large_crops}, small_crops={self.small_crops}: at least one large crop and two crops in all are needed."
      )
    check_shares(self, "blur", "gray")
    check_channels(self)
    check_patches(self, *("large_size", "small_size")[: 2 if self.small_crops else 1])

  @property
  def num_crops(self) -> int:
    return self.large_crops + self.small_crops

  def inputs(self) -> Inputs:
    s = self.color_strength
    augment = (
      ColorJitter(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, p=0.8),
      Grayscale(p=self.gray),
      GaussianBlur(p=self.blur, sigma=(0.1, 2.0)),
      *normalize(self),
    )
    large = View(name="large", size=self.large_size, count=self.large_crops, scale=self.large_scale, augment=augment)
    small = View(name="small", size=self.small_size, count=self.small_crops, scale=self.small_scale, augment=augment)
    return Inputs(views=(large, small) if self.small_crops else (large,))

  def eval_view(self) -> View:
    return center_view(self, size=self.large_size)

  @property
  def encoder(self) -> Encoder:
    head = ProjectionHead(hidden=(self.hidden_dim,), output=self.output_dim, activation="relu", init_std=None)
    return Encoder(backbone=self.model, head=head)

  def init_encoder(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    variables = self.encoder.init(rng, batch["large"][:, 0], train=False)
    return {"encoder": variables["params"]}, {"batch_stats": variables.get("batch_stats", {})}

  def embed(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array) -> Embedded:
    """All crops in training: a backbone batch per resolution, the head once over all of them."""
    groups = [batch[view.name] for view in self.inputs().views]
    encoded = encode_crops(self.encoder, params["encoder"], extra["batch_stats"], groups, train=True, rng=rng)
    return Embedded(l2_normalize(encoded.out["projection"]), encoded.batch_stats)

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """The trunk's output before the head ("pooled"), and the unit embedding ("projection")."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    return {"pooled": out["pooled"], "projection": l2_normalize(out["projection"])}


def init_prototypes(rng: Array, counts: tuple[int, ...], *, dim: int) -> dict[str, Array]:
  """Unit rows [K, D] per head, "head0", "head1", ...: torch's initialization of a linear layer, normalized."""
  bound = dim**-0.5
  draw = lambda i, count: jax.random.uniform(jax.random.fold_in(rng, i), (count, dim), minval=-bound, maxval=bound)
  return {f"head{i}": l2_normalize(draw(i, count)) for i, count in enumerate(counts)}


def unit_prototypes(params: Params) -> Params:
  """`params` with unit prototype rows: the projection of SwAV before every forward pass."""
  return params | {"prototypes": jax.tree.map(l2_normalize, params["prototypes"])}


def scores(z: Array, prototypes: Array) -> Array:
  """Inner products [..., K] of embeddings [..., D] and prototypes [K, D], in full float32 precision."""
  return jnp.matmul(z, prototypes.T, precision=jax.lax.Precision.HIGHEST)


def check_prototypes(counts: tuple[int, ...]) -> None:
  """Raises `UserError` unless there is a head, and each has two prototypes or more."""
  if not counts or min(counts) < 2:
    raise UserError(f"config.method.num_prototypes={counts}: expected one number per head, each at least 2, such as (3000,).")
