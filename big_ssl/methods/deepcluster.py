"""DeepCluster: deep clustering for unsupervised learning of visual features (arXiv 1807.05520).

Every epoch begins with k-means on the features of the whole training set, and goes on as ordinary classification with
the clusters as labels (eq. 1, 2):

  min_{C, y} sum_n |f(x_n) - C y_n|^2                     clustering, with theta fixed
  min_{theta, W} sum_n CE(W f_theta(t(x_n)), y_n)         classification of augmented crops, with y fixed

Cluster numbers mean nothing in the next epoch, so that W is drawn anew, with an optimizer state of zeros and no momentum.
Two things forbid the trivial solutions (section 3): empty clusters take half of another, and images are sampled
uniformly over the clusters. Features are those of plain center crops, in evaluation mode, before the last ReLU; PCA,
whitening and division by the norm come before k-means. BN statistics are over the global batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD
from big_ssl.core import health
from big_ssl.core.method import Extract, Inputs, Method, View
from big_ssl.core.types import Array, Extra, Interval, Metrics, Params, Rule, Size, TrainState, UserError, sides
from big_ssl.losses import classify, cluster
from big_ssl.methods.parts import center_view, check_channels, check_least, normalize
from big_ssl.models.alexnet import AlexNet
from big_ssl.models.conv_probe import ALEXNET_POOLS, VGG_POOLS, probe_features
from big_ssl.models.encoder import Encoder, encode
from big_ssl.models.heads import Linear
from big_ssl.models.vgg import VGG
from big_ssl.ops import kmeans, pca, power_iteration
from big_ssl.ops.cluster_sampling import quotas, uniform_over_clusters
from big_ssl.ops.clustering_scores import normalized_mutual_information, size_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepCluster(Method):
  """DeepCluster; defaults are the ImageNet recipe.

  Attributes:
    num_clusters: K, and the outputs of the classifier; take ten times the classes or more.
    clustering: "kmeans", or "pic", power iteration clustering, which finds their number itself: beyond the K largest
      clusters images have no label (own choice; the reference makes a classifier of another size each time).
    iterations: of k-means (20) or of the power method (200).
    pca_dim: dimensions after PCA.
    reassign: from one clustering to the next.
    max_repeats: how often one image may come in an epoch; 0 is without limit, as published.
    relu: the classifier reads ReLU of the clustered features, as AlexNet and VGG go on.
    size: of the crops; scale: their share of the image area.
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the crop for clustering and evaluation keeps (224 of 256).
  """

  num_clusters: int = 10000
  clustering: Literal["kmeans", "pic"] = "kmeans"
  iterations: int = 20
  pca_dim: int = 256
  reassign: Interval = Interval(1, "epochs")
  max_repeats: int = 0
  relu: bool = True
  size: Size = 224
  scale: tuple[float, float] = (0.08, 1.0)
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  supports_accumulation = True

  def __post_init__(self):
    check_least(self, num_clusters=2, pca_dim=1, iterations=1, max_repeats=0)
    check_channels(self)

  # 1. Views: crop and flip, no color; the clustered view is the evaluation's

  def inputs(self) -> Inputs:
    return Inputs(views=(View(name="crop", size=self.size, scale=self.scale, augment=normalize(self)),))

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  # 2. Networks

  @property
  def encoder(self) -> Encoder:
    return Encoder(backbone=self.model)

  @property
  def feature_dim(self) -> int:
    images = jax.ShapeDtypeStruct((1, *sides(self.size), self.image_channels), jnp.float32)
    return jax.eval_shape(lambda x: self.encoder.init_with_output(jax.random.key(0), x, train=False)[0]["pooled"], images).shape[1]

  def new_head(self, rng: Array, features: int) -> Params:
    """W ~ N(0, 0.01), no bias yet."""
    return Linear(output=self.num_clusters).init(rng, jnp.zeros((1, features)), train=False)["params"]

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    rng_encoder, rng_head = jax.random.split(rng)
    out, variables = self.encoder.init_with_output(rng_encoder, batch["crop"][:, 0], train=False)
    params = {"encoder": variables["params"], "head": self.new_head(rng_head, out["pooled"].shape[1])}
    extra = {
      "batch_stats": variables.get("batch_stats", {}),
      "assignments": jnp.full(self.num_examples, cluster.IGNORE, jnp.int32),  # y
      "sizes": jnp.zeros(self.num_clusters, jnp.int32),
    }
    return params, extra

  # 3. Loss

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    labels = extra["assignments"][batch["index"]]  # [B]
    encoded = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["crop"][:, 0], train=True, rng=rng)
    features = encoded.out["pooled"]  # [B, D]
    read = jax.nn.relu(features) if self.relu else features
    logits = Linear(output=self.num_clusters).apply({"params": params["head"]}, read, train=True)
    loss = cluster.labeled_cross_entropy(logits, labels=labels)
    metrics = {"accuracy": classify.accuracy(logits, labels=labels)} | health.embedding(features)
    metrics |= health.distribution(jax.nn.softmax(logits), name="prediction") | self._spread(extra["sizes"])
    return loss, (extra | {"batch_stats": encoded.batch_stats}, jax.lax.stop_gradient(metrics))

  def _spread(self, sizes: Array) -> Metrics:
    """How the whole training set, not the balanced batch, is spread over the clusters; one that takes all is a collapse."""
    spread = health.distribution(sizes[None] / jnp.maximum(jnp.sum(sizes), 1), name="target")
    return {"target_mean_entropy": spread["target_mean_entropy"], "target_use": jnp.mean(sizes > 0, dtype=jnp.float32)}

  # 4. Clustering, at the start of an epoch

  def refresh_steps(self) -> Sequence[int]:
    return self.steps_every(self.reassign)

  def clustered_features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array:
    return encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out["pooled"]

  def refresh(self, state: TrainState, extract: Extract, rng: Array) -> tuple[TrainState, dict[str, float]]:
    self._check_sizes()
    rng_head, rng_clusters = jax.random.split(rng)
    features = extract(state, self.clustered_features)  # [N, D]
    bad = kmeans.first_nonfinite_row(features)
    if bad is not None:
      raise UserError(f"clustering at step {int(state.step)}: the features of image {bad} are not finite; lower config.optim.lr.")
    # 4.1 PCA, whitening, unit norm, and the clusters
    x = pca.whiten(features, whitening=pca.fit_whitening(features, dim=self.pca_dim))  # [N, d]
    width = features.shape[1]
    del features
    found, metrics = self.find_clusters(x, np.random.default_rng(np.asarray(jax.random.key_data(rng_clusters))))
    labels = contiguous(found, most=self.num_clusters)
    # 4.2 A new classifier, and nothing that the optimizer remembers of the old one
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    opt_state = {slot: tree | {"head": zeros(tree["head"])} for slot, tree in state.opt_state.items()}
    sizes = np.bincount(labels[labels >= 0], minlength=self.num_clusters).astype(np.int32)
    previous = np.asarray(state.extra["assignments"])
    metrics |= self._scores(labels, sizes, previous)
    params = state.params | {"head": self.new_head(rng_head, width)}
    return state.replace(params=params, opt_state=opt_state, extra=state.extra | {"assignments": labels, "sizes": sizes}), metrics

  def find_clusters(self, x: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, float]]:
    """Clusters of x [N, d], [N], and what is to be said about them; k-means starts from other images each time."""
    mesh = kmeans.current_mesh()
    if self.clustering == "pic":
      return power_iteration.power_iteration_clustering(x, iterations=self.iterations, mesh=mesh), {}
    result = kmeans.kmeans(x, clusters=self.num_clusters, rng=rng, iterations=self.iterations, mesh=mesh)
    return result.assignments, {"objective": float(result.objective[-1]) / len(x), "repaired": result.repairs}

  def _scores(self, labels: np.ndarray, sizes: np.ndarray, previous: np.ndarray) -> dict[str, float]:
    draws = quotas(sizes, total=len(labels), max_repeats=self.max_repeats)
    metrics = {
      "clusters": np.count_nonzero(sizes),
      "size_entropy": size_entropy(sizes),
      "repeats": np.max(draws / np.maximum(sizes, 1)),  # of an image in the smallest cluster, in one epoch
      "unlabeled": np.mean(labels < 0),
    }
    if np.any((previous >= 0) & (labels >= 0)):
      metrics["nmi_previous"] = normalized_mutual_information(previous, labels)
    return metrics

  def plan(self, extra: Extra, epoch: int, seed: int) -> np.ndarray | None:
    """Uniform over the clusters; before the first clustering there are none."""
    assignments = np.asarray(extra["assignments"])
    if not np.any(assignments >= 0):
      return None
    return uniform_over_clusters(assignments, rng=np.random.default_rng([seed % 2**64, epoch]), max_repeats=self.max_repeats)

  def refresh_memory(self) -> dict[str, int]:
    self._check_sizes()
    rows, width = self.num_examples, self.feature_dim
    if self.clustering == "kmeans":
      devices = jax.device_count()
      name, size = "k-means on each device", kmeans.memory(rows=rows, dim=self.pca_dim, clusters=self.num_clusters, devices=devices)
    else:
      name, size = "the graph of neighbors in host memory", power_iteration.memory(rows=rows, dim=self.pca_dim)
    return {
      "features in host memory": 4 * rows * width,
      "PCA in host memory": pca.memory(rows=rows, width=width, dim=self.pca_dim),
      name: size,
    }

  def _check_sizes(self) -> None:
    """What clustering would refuse, before it starts."""
    if self.num_clusters > self.num_examples:
      raise UserError(f"config.method.num_clusters={self.num_clusters}: more than the {self.num_examples} training images.")
    most = min(self.feature_dim, self.num_examples - 1)
    if self.pca_dim > most:
      raise UserError(
        f"config.method.pca_dim={self.pca_dim}: at most {most} are possible with {self.feature_dim} features of {self.num_examples} images."
      )

  # 5. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """ "pooled" is what is clustered (AlexNet and VGG: fc7 before its ReLU), "relu" what the classifier goes on with; of
    AlexNet and VGG also the averaged maps "conv1", "conv2", ... for linear probes."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    pools = {AlexNet: ALEXNET_POOLS, VGG: VGG_POOLS}.get(type(self.model))
    probes = probe_features(out["stages"], pools=pools, kind="average") if pools else {}
    return {"pooled": out["pooled"], "relu": jax.nn.relu(out["pooled"])} | probes

  def assignments(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array:
    read = self.features(params, extra, batch)["relu" if self.relu else "pooled"]
    return Linear(output=self.num_clusters).apply({"params": params["head"]}, read, train=False)

  def param_rules(self) -> tuple[Rule, ...]:
    """Everything is decayed, biases and BN too; the classifier has no momentum."""
    return (Rule(pattern=r"^head/", momentum=0.0), Rule(pattern=r".*"))


def contiguous(assignments: np.ndarray, *, most: int) -> np.ndarray:
  """Numbers the clusters that have members 0, 1, ... in their order, [N] int32; all but the `most` largest become `IGNORE`."""
  names, inverse, sizes = np.unique(assignments, return_inverse=True, return_counts=True)
  kept = np.sort(np.argsort(-sizes, kind="stable")[:most])
  number = np.full(len(names), cluster.IGNORE, np.int32)
  number[kept] = np.arange(len(kept))
  return number[inverse]
