"""SeLa-v2: self-labeling (arXiv 1911.05371) with the ingredients of SwAV (arXiv 2006.09882, appendix D).

As DeepCluster-v2, with two changes: the labels of an epoch are an equal partition of the WHOLE data set by optimal
transport instead of k-means, and the prototypes are trained by gradient, of unit length before every forward pass:

  Q = argmin <Q, -Z C^T> - epsilon H(Q)   with rows 1/N and columns 1/K;   label_i = argmax_k Q_ik

No code was released. Own choices: epsilon .05, solved in logarithms until an image's factor moves by 1e-3 or less, on
average, or for 50 sweeps, head h from large crop h mod A, prototypes frozen at the start as in SwAV.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from big_ssl.core.method import Method
from big_ssl.core.types import Array, Extra, Interval, Params, Rule, TrainState
from big_ssl.methods.cluster_memory import Clustering, ClusterMemory
from big_ssl.methods.multicrop import init_prototypes, scores, unit_prototypes
from big_ssl.methods.parts import check_positive
from big_ssl.ops.transport import equipartition, memory, place_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeLaV2(ClusterMemory, Method):
  """SeLa-v2; defaults are DeepCluster-v2's recipe. Views and head: see `MultiCrop`; heads: `ClusterMemory`.

  Attributes:
    epsilon: of the transport.
    tolerance: mean relative change of an image's factor below which the transport is solved.
    max_sweeps: after which labels are taken as they are.
    freeze_prototypes: how long the prototypes are not trained, though still projected.
  """

  epsilon: float = 0.05
  tolerance: float = 1e-3
  max_sweeps: int = 50
  freeze_prototypes: Interval = Interval(313, "steps")

  def __post_init__(self):
    super().__post_init__()
    check_positive(self, "epsilon", "tolerance", "max_sweeps")

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    rng_encoder, rng_prototypes = jax.random.split(rng)
    params, extra = self.init_encoder(rng_encoder, batch)
    params["prototypes"] = init_prototypes(rng_prototypes, self.num_prototypes, dim=self.output_dim)
    return params, extra | self.init_memory()

  def project(self, params: Params) -> Params:
    return unit_prototypes(params)

  def prototypes(self, params: Params, extra: Extra) -> dict[str, Array]:
    del extra
    return params["prototypes"]

  def cluster(self, state: TrainState, z: np.ndarray, *, head: int, rng: np.random.Generator) -> Clustering:
    """The equal partition under the current prototypes; the scores [n, K] are split over the devices by image."""
    del rng
    prototypes = self.project(state.params)["prototypes"][f"head{head}"]
    count = len(z)
    log_p = jax.jit(scores)(place_rows(z), prototypes)
    found = equipartition(log_p, power=1 / self.epsilon, tolerance=self.tolerance * count, max_iterations=self.max_sweeps, num_rows=count)
    return Clustering(found.labels, metrics={"sweeps": float(found.iterations), "transport_error": found.error / count})

  def refresh_memory(self) -> dict[str, int]:
    size = memory(rows=max(self.num_examples, 1), clusters=max(self.num_prototypes))
    return super().refresh_memory() | {"the transport of a head, over all devices": size}

  def param_rules(self) -> tuple[Rule, ...]:
    """One group, as SwAV."""
    return (Rule(pattern=r"^prototypes/", freeze_until=self.freeze_prototypes), Rule(pattern=r".*"))
