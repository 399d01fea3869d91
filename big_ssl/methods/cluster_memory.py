"""What DeepCluster-v2 and SeLa-v2 share: labels per image and head, fixed for an epoch, from a memory of the last one.

Once per epoch the embeddings that the images had when they were last seen are clustered, head h from large crop h mod A;
then every crop of an image predicts the image's cluster (arXiv 2006.09882, appendix D; public code main_deepclusterv2.py):

  loss = mean_h CE(z C_h^T / tau, label_h)      over all crops, also the one the label came from

The memory is a table by image index, filled as training goes and emptied by each clustering, at the step nearest to the
start of an epoch; an image without a row (of the batch that two epochs share) has label -100 and does not count. Before
the first epoch it is filled by one pass with the untrained network in training mode, whose running statistics stay
(own choice). Labels are the same for any number of devices.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core import health
from big_ssl.core.method import Extract
from big_ssl.core.types import Array, Extra, Interval, Metrics, Params, TrainState, UserError
from big_ssl.losses import cluster
from big_ssl.methods.multicrop import MultiCrop, check_prototypes, scores
from big_ssl.methods.parts import check_positive
from big_ssl.models.encoder import encode
from big_ssl.ops.clustering_scores import normalized_mutual_information, size_entropy
from big_ssl.ops.host import gather
from big_ssl.ops.kmeans import first_nonfinite_row
from big_ssl.ops.normalize import l2_normalize


@dataclasses.dataclass(frozen=True)
class Clustering:
  """Labels [n] of the rows that were clustered, the new state's prototypes where they are replaced, numbers to log."""

  labels: np.ndarray
  prototypes: np.ndarray | None = None
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterMemory(MultiCrop, abc.ABC):
  """To be mixed into a `Method`, which says how to cluster and which prototypes predict.

  Attributes:
    num_prototypes: K of each head; the heads differ by their draw, and by the crop that they cluster.
    temperature: tau.
    cluster_every: how often the images are clustered anew.
  """

  num_prototypes: tuple[int, ...] = (3000, 3000, 3000)
  temperature: float = 0.1
  cluster_every: Interval = Interval(1, "epochs")

  row_sharded = ("bank", "assignments")
  accumulation_reason = "batch normalization needs the whole batch"

  def __post_init__(self):
    super().__post_init__()
    check_prototypes(self.num_prototypes)
    check_positive(self, "temperature")

  # 1. State

  def init_memory(self) -> Extra:
    """The empty memory [N, A, D] and no labels [N, H]; both split over the devices."""
    images = max(self.num_examples, 1)
    return {
      "bank": jnp.zeros((images, self.large_crops, self.output_dim)),
      "assignments": jnp.full((images, len(self.num_prototypes)), cluster.IGNORE, jnp.int32),
    }

  # 2. Loss

  @abc.abstractmethod
  def prototypes(self, params: Params, extra: Extra) -> dict[str, Array]:
    """[K, D] per head, as the scores take them."""

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    embedded = self.embed(params, extra, batch, rng)
    z, index = embedded.z, batch["index"]
    labels = extra["assignments"][index]  # [B, H]
    loss = 0.0
    every = self.prototypes(params, extra)
    for h in range(len(self.num_prototypes)):
      prototypes = every[f"head{h}"]
      logits = scores(z, prototypes) / self.temperature  # [V, B, K]
      loss += cluster.labeled_cross_entropy(logits, labels=jnp.broadcast_to(labels[:, h], logits.shape[:2])) / len(self.num_prototypes)
      if h == 0:
        # An image without a label says nothing about collapse: it counts as spread over all.
        uniform, known = 1.0 / prototypes.shape[0], labels[:, :1] != cluster.IGNORE
        targets = jnp.where(known, jax.nn.one_hot(labels[:, 0], prototypes.shape[0]), uniform)
        predictions = jax.nn.softmax(logits).reshape(-1, prototypes.shape[0])
        metrics = health.distribution(targets, name="target") | health.distribution(predictions, name="prediction")
    rows = jax.lax.stop_gradient(z[: self.large_crops])  # [A, B, D]
    metrics |= health.embedding(rows[0]) | {"labeled": jnp.mean(labels[:, 0] != cluster.IGNORE, dtype=jnp.float32)}
    if self.large_crops > 1:
      metrics["agreement"] = health.agreement(rows[0], rows[1])
    bank = extra["bank"].at[index].set(rows.swapaxes(0, 1))
    return loss, (extra | {"batch_stats": embedded.batch_stats, "bank": bank}, jax.lax.stop_gradient(metrics))

  # 3. Clustering, once per epoch

  def assignments(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array:
    prototypes = self.prototypes(self.project(params), extra)["head0"]
    return scores(self.features(params, extra, batch)["projection"], prototypes)

  @abc.abstractmethod
  def cluster(self, state: TrainState, z: np.ndarray, *, head: int, rng: np.random.Generator) -> Clustering:
    """Labels of the rows z [n, D] for one head; the mesh is the one in use."""

  def refresh_steps(self) -> Sequence[int]:
    return self.steps_every(self.cluster_every)

  def refresh(self, state: TrainState, extract: Extract, rng: Array) -> tuple[TrainState, dict[str, float]]:
    self._check_sizes()
    bank, before = gather(state.extra["bank"]), gather(state.extra["assignments"])
    if not bank.any():
      bank = extract(state, self._first_embeddings, views=self.inputs().views[:1], rng=rng)
    bad = first_nonfinite_row(bank.reshape(len(bank), -1))
    if bad is not None:
      raise UserError(f"clustering at step {int(state.step)}: the embedding of image {bad} is not finite; lower config.optim.lr.")
    seen = np.flatnonzero(bank.any(axis=(1, 2)))
    self._check_seen(len(seen))
    generator = np.random.default_rng(np.asarray(jax.random.key_data(rng)))
    labels, metrics, replaced = np.full_like(before, cluster.IGNORE), {}, {}
    for h, count in enumerate(self.num_prototypes):
      z = np.ascontiguousarray(bank[seen, h % self.large_crops])
      found = self.cluster(state, z, head=h, rng=generator)
      labels[seen, h] = found.labels
      if found.prototypes is not None:
        replaced[f"head{h}"] = found.prototypes
      sizes = np.bincount(found.labels, minlength=count)
      metrics |= {f"head{h}/empty_clusters": float(np.sum(sizes == 0)), f"head{h}/size_entropy": size_entropy(sizes)}
      metrics |= {f"head{h}/{k}": v for k, v in found.metrics.items()}
      if np.any((before[:, h] >= 0) & (labels[:, h] >= 0)):
        metrics[f"head{h}/nmi_to_last"] = normalized_mutual_information(before[:, h], labels[:, h])
    extra = state.extra | {"assignments": labels, "bank": np.zeros_like(bank)} | ({"prototypes": replaced} if replaced else {})
    return state.replace(extra=extra), metrics | {"labeled": len(seen) / len(bank)}

  def _check_sizes(self) -> None:
    """What a clustering would refuse, before it starts."""
    if max(self.num_prototypes) > self.num_examples:
      raise UserError(f"config.method.num_prototypes={self.num_prototypes}: more clusters than the {self.num_examples} training images.")
    if len(steps := self.refresh_steps()) > 1:
      self._check_seen(min(self.num_examples, int(np.diff(steps).min()) * self.batch_size))

  def _check_seen(self, images: int) -> None:
    if images < max(self.num_prototypes):
      raise UserError(
        f"config.method.num_prototypes={self.num_prototypes}: only {images} images are seen from one clustering to the next;"
        f" use fewer, or a longer config.method.cluster_every={self.cluster_every}."
      )

  def refresh_memory(self) -> dict[str, int]:
    """Printed before the start, so that a data set too small is refused there."""
    self._check_sizes()
    rows = 4 * max(self.num_examples, 1) * self.output_dim
    return {"the memory on the host": rows * self.large_crops, "the rows that are clustered": rows}

  def _first_embeddings(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array:
    """[B, A, D] with this batch's BN statistics, each crop a pass of its own; the running ones stay."""
    rng = jax.random.key(0)  # of stochastic depth
    views: Any = [batch["large"][:, a] for a in range(self.large_crops)]
    passes = [encode(self.encoder, params["encoder"], extra["batch_stats"], v, train=True, rng=rng).out["projection"] for v in views]
    return l2_normalize(jnp.stack(passes, axis=1))
