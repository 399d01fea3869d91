"""SwAV: unsupervised learning of visual features by contrasting cluster assignments (arXiv 2006.09882).

Each large crop of an image gets a code by optimal transport between the batch and K prototypes C; every other crop of
the image predicts it from its own scores (eq. 1, 2; multi-crop eq. 6):

  s = z C^T                                                   z and the rows of C of unit length
  Q = Diag(u) exp(S / epsilon) Diag(v)                        equal use of the prototypes; online, 3 iterations (eq. 5)
  loss = 1/A sum_a 1/(V-1) sum_{v != a} -q_a . log softmax(s_v / tau)

Rows of C are projected to unit length before every forward pass, in place: gradient, clipping and LARC see the unit
rows, the momentum is left as it is. Small batches bring a queue of earlier embeddings into the transport. Facts where
paper and public code differ follow the code. BN and transport are over the global batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from big_ssl.core import health
from big_ssl.core.method import Method
from big_ssl.core.types import Array, Extra, Interval, Metrics, Params, Rule
from big_ssl.losses import cluster
from big_ssl.methods.multicrop import MultiCrop, check_prototypes, init_prototypes, scores, unit_prototypes
from big_ssl.methods.parts import check_least, check_positive
from big_ssl.ops import queue as queue_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwAV(MultiCrop, Method):
  """SwAV; defaults are the 800-epoch ImageNet recipe. Views and head: see `MultiCrop`.

  Attributes:
    num_prototypes: K of each head; the loss is the mean over heads.
    temperature: tau of the predictions.
    epsilon: of the transport; .05, or .03 where training does not start.
    sinkhorn_iterations: of the transport.
    freeze_prototypes: how long the prototypes are not trained, though still projected.
    queue_size: embeddings per assigning crop that join the transport, a multiple of the batch; 0 is no queue.
    queue_start: when the queue begins to fill; it is used once full.
  """

  num_prototypes: tuple[int, ...] = (3000,)
  temperature: float = 0.1
  epsilon: float = 0.05
  sinkhorn_iterations: int = 3
  freeze_prototypes: Interval = Interval(313, "steps")
  queue_size: int = 0
  queue_start: Interval = Interval(15, "epochs")

  accumulation_reason = "codes are computed over the whole batch; a queue (config.method.queue_size) helps small ones"

  def __post_init__(self):
    super().__post_init__()
    check_prototypes(self.num_prototypes)
    check_positive(self, "temperature", "epsilon")
    check_least(self, sinkhorn_iterations=1)
    if self.queue_size:
      queue_lib.check_length(self.queue_size, batch_size=self.batch_size, path="config.method.queue_size")

  # 1. Parameters; `project` is run before every forward pass.

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    rng_encoder, rng_prototypes = jax.random.split(rng)
    params, extra = self.init_encoder(rng_encoder, batch)
    params["prototypes"] = init_prototypes(rng_prototypes, self.num_prototypes, dim=self.output_dim)
    if self.queue_size:
      extra["queue"] = jnp.zeros((self.large_crops, self.queue_size, self.output_dim))
    return params, extra

  def project(self, params: Params) -> Params:
    return unit_prototypes(params)

  # 2. Loss

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    # 2.1 Unit embeddings of all crops: z [V, B, D], the A assigning crops first.
    embedded = self.embed(params, extra, batch, rng)
    z = embedded.z
    assigning = jax.lax.stop_gradient(z[: self.large_crops])  # [A, B, D]

    # 2.2 The queue, with the current prototypes, once it is full.
    queue = extra.get("queue")
    use_queue = queue_lib.filled(queue[0]) if queue is not None else jnp.bool_(False)

    # 2.3 Swapped prediction, the mean over heads.
    outs, loss = [], 0.0
    for h in range(len(self.num_prototypes)):
      prototypes = params["prototypes"][f"head{h}"]
      s = scores(z, prototypes)  # [V, B, K]
      out = cluster.swapped_prediction(
        s.reshape(-1, s.shape[-1]),
        num_crops=self.num_crops,
        assign_crops=self.large_crops,
        epsilon=self.epsilon,
        iterations=self.sinkhorn_iterations,
        temperature=self.temperature,
        queue_scores=None if queue is None else scores(queue, prototypes),
        use_queue=use_queue,
      )
      loss += out.loss / len(self.num_prototypes)
      outs.append(out)

    # 2.4 The newest embeddings enter the queue.
    extra = extra | {"batch_stats": embedded.batch_stats}
    if queue is not None:
      started = step >= self.queue_start.steps(batch_size=self.batch_size, examples=self.num_examples)
      extra["queue"] = jnp.where(started, jax.vmap(queue_lib.push)(queue, assigning), queue)

    # 2.5 Health, of the first head. Scores of the last one beyond +-1: embeddings or prototypes are not of unit length.
    first = outs[0]
    metrics = health.distribution(first.codes.reshape(-1, first.codes.shape[-1]), name="target")
    metrics |= health.distribution(jnp.exp(first.predictions).reshape(-1, first.codes.shape[-1]), name="prediction")
    metrics |= health.embedding(assigning[0]) | {"score_min": jnp.min(s), "score_max": jnp.max(s), "queue_used": use_queue.astype(jnp.float32)}
    if self.large_crops > 1:
      metrics["agreement"] = health.agreement(assigning[0], assigning[1])
    return loss, (extra, jax.lax.stop_gradient(metrics))

  def assignments(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array:
    return scores(self.features(params, extra, batch)["projection"], self.project(params)["prototypes"]["head0"])

  # 3. Optimization: one group; biases and BN are adapted and decayed as all else.

  def param_rules(self) -> tuple[Rule, ...]:
    return (Rule(pattern=r"^prototypes/", freeze_until=self.freeze_prototypes), Rule(pattern=r".*"))
