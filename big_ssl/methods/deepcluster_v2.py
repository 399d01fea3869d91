"""DeepCluster-v2: DeepCluster with the ingredients of SwAV (arXiv 2006.09882, appendix D.2).

Spherical k-means on the memory of the last epoch, once per epoch and head; the centroids ARE the prototypes, and no
gradient ever changes them, so that there is no classifier to re-learn after each clustering. It is swapping across
epochs: a crop predicts the cluster of a crop of the epoch before (see `cluster_memory`).
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from big_ssl.core.method import Method
from big_ssl.core.types import Array, Extra, Params, Rule, TrainState
from big_ssl.methods.cluster_memory import Clustering, ClusterMemory
from big_ssl.methods.multicrop import init_prototypes
from big_ssl.methods.parts import check_least
from big_ssl.ops.kmeans import current_mesh, memory, spherical_kmeans


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepClusterV2(ClusterMemory, Method):
  """DeepCluster-v2; defaults are the 800-epoch ImageNet recipe. Views and head: see `MultiCrop`; heads: `ClusterMemory`.

  Attributes:
    kmeans_iterations: of each clustering, from random rows.
  """

  kmeans_iterations: int = 10

  def __post_init__(self):
    super().__post_init__()
    check_least(self, kmeans_iterations=1)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    rng_encoder, rng_prototypes = jax.random.split(rng)
    params, extra = self.init_encoder(rng_encoder, batch)
    prototypes = init_prototypes(rng_prototypes, self.num_prototypes, dim=self.output_dim)
    return params, extra | self.init_memory() | {"prototypes": prototypes}

  def prototypes(self, params: Params, extra: Extra) -> dict[str, Array]:
    """The centroids; they belong to no optimizer."""
    del params
    return jax.lax.stop_gradient(extra["prototypes"])

  def cluster(self, state: TrainState, z: np.ndarray, *, head: int, rng: np.random.Generator) -> Clustering:
    """From K rows drawn anew; an empty cluster keeps its centroid, and the last step assigns."""
    del state
    start = z[rng.choice(len(z), self.num_prototypes[head], replace=False)]
    found = spherical_kmeans(z, centroids=start, iterations=self.kmeans_iterations, mesh=current_mesh())
    return Clustering(found.assignments, found.centroids, {"mean_cosine": float(found.objective[-1]) / len(z)})

  def refresh_memory(self) -> dict[str, int]:
    size = dict(rows=max(self.num_examples, 1), dim=self.output_dim, clusters=max(self.num_prototypes), devices=jax.device_count())
    return super().refresh_memory() | {"k-means on each device": memory(**size)}

  def param_rules(self) -> tuple[Rule, ...]:
    """One group: biases and BN are adapted and decayed as all else."""
    return (Rule(pattern=r".*"),)
