"""SeLa: self-labeling by simultaneous clustering and representation learning (arXiv 1911.05371, code yukimasano/self-label).

One objective for the network and for the labels, which must use every one of K clusters equally often (eq. 6):

  min_{p, q}  -1/N sum_i sum_y q(y | x_i) log p(y | x_i)     with  sum_i q(y | x_i) = N / K,   q in {0, 1}

It is minimized in turn: by SGD for the network with fixed labels, and for the labels of ALL images by optimal transport,
a number of times that are dense at the start (section 3.2; `ops.transport`). H heads have labels of their own on one
network. Nothing is reset in between: neither heads nor momentum.

Labels are looked up by the image's index, and come from ONE random augmentation of each image, drawn as in training.
Where they are computed the network is in evaluation mode (own choice, `train_mode_labels` is the public code's training
mode; its running statistics, which also moved there, stay).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.augment.photometric import IMAGENET_MEAN, IMAGENET_STD, ColorJitter, GaussianBlur, Grayscale
from big_ssl.core import health
from big_ssl.core.method import Extract, Inputs, Method, View
from big_ssl.core.types import Array, Extra, Metrics, Params, Rule, Size, TrainState, UserError, sides
from big_ssl.losses import classify
from big_ssl.methods.parts import center_view, check_channels, check_least, check_positive, normalize
from big_ssl.models.alexnet import AlexNet
from big_ssl.models.conv_probe import ALEXNET_POOLS, probe_features
from big_ssl.models.encoder import Encoder, encode
from big_ssl.models.heads import Linear, LinearHeads
from big_ssl.models.vgg import VGG
from big_ssl.ops.clustering_scores import normalized_mutual_information
from big_ssl.ops.host import gather
from big_ssl.ops.transport import equipartition, place_rows

ROTATIONS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeLa(Method):
  """Self-labeling; defaults are the ImageNet recipe.

  Attributes:
    num_clusters, num_heads: K of each head, H.
    sharpness: lambda, by which log-probabilities are multiplied; 25 makes the plan one-hot up to rounding.
    tolerance: sum over images of |c_old / c_new - 1| at which the transport is solved.
    max_sweeps: after which labels are taken as they are.
    solves: how many times labels are computed; 0 keeps those of the start.
    solve_power: the times are (E + solve_margin) N linspace(0, 1, solves)^solve_power, E the epochs; 2 is quadratic, 1 linear.
    solve_margin: the public code trains one epoch more than E, so the last times lie beyond the end.
    one_head: each solve labels one head, the number of the epoch mod H (CIFAR), instead of all.
    train_mode_labels: dropout and batch statistics where labels are computed.
    assignments_file: instead of solves, a .npy file of [N, H] integers, the labels of a finished run, which stay.
    rotation_weight: "+Rot", the retraining stage with such labels: the four rotations of each image are classified by a
      head of their own; clusters are predicted for the upright one.
    size, scale: of the view.
    jitter: brightness, contrast, saturation, hue; jitter_p, gray, blur: probabilities.
    gray_first: grayscale before the jitter (ImageNet), or after it (CIFAR, MoCo v2's views).
    mean, std: pixel normalization.
    eval_fraction: share of the shorter side that the evaluation crop keeps.
  """

  num_clusters: int = 3000
  num_heads: int = 10
  sharpness: float = 25.0
  tolerance: float = 0.1
  max_sweeps: int = 2000
  solves: int = 100
  solve_power: float = 2.0
  solve_margin: float = 1.01
  one_head: bool = False
  train_mode_labels: bool = False
  assignments_file: str = ""
  rotation_weight: float = 0.0
  size: Size = 224
  scale: tuple[float, float] = (0.08, 1.0)
  jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.4)
  jitter_p: float = 1.0
  gray: float = 0.2
  blur: float = 0.0
  gray_first: bool = True
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  eval_fraction: float = 224 / 256

  row_sharded = ("assignments",)
  supports_accumulation = True

  def __post_init__(self):
    check_least(self, num_clusters=2, num_heads=1, solves=0, max_sweeps=1, rotation_weight=0)
    check_positive(self, "sharpness", "tolerance", "solve_power")
    height, width = sides(self.size)
    if self.rotation_weight and height != width:
      raise UserError(f"config.method.size={self.size}: images that are rotated must be squares; or set config.method.rotation_weight=0.")
    check_channels(self)

  # 1. One view, for training and for labels

  def inputs(self) -> Inputs:
    brightness, contrast, saturation, hue = self.jitter
    color = (ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation, hue=hue, p=self.jitter_p), Grayscale(p=self.gray))
    augment = (*(color[::-1] if self.gray_first else color), GaussianBlur(p=self.blur, sigma=(0.1, 2.0)), *normalize(self))
    return Inputs(views=(View(name="crop", size=self.size, scale=self.scale, augment=augment),))

  def eval_view(self) -> View:
    return center_view(self, size=self.size)

  # 2. Network and labels

  @property
  def encoder(self) -> Encoder:
    """The heads read fc7 after its ReLU, or the pooled output of networks without fully connected layers."""
    output = "relu" if isinstance(self.model, AlexNet | VGG) else "pooled"
    return Encoder(backbone=self.model, head=LinearHeads(heads=self.num_heads, output=self.num_clusters), output=output)

  def init(self, rng: Array, batch: dict[str, Array]) -> tuple[Params, Extra]:
    rng_encoder, rng_labels, rng_rotation = jax.random.split(rng, 3)
    out, variables = self.encoder.init_with_output(rng_encoder, batch["crop"][:, 0], train=False)
    params = {"encoder": variables["params"]}
    if self.rotation_weight:
      params["rotation"] = Linear(output=ROTATIONS).init(rng_rotation, out[self.encoder.output], train=True)["params"]
    return params, {"batch_stats": variables.get("batch_stats", {}), "assignments": self.random_labels(rng_labels)}

  def random_labels(self, rng: Array) -> Array:
    """[N, H] int32: for each head a permutation of 0, 1, ..., K - 1, 0, 1, ... over the images."""
    balanced = jnp.arange(max(self.num_examples, 1), dtype=jnp.int32) % self.num_clusters
    return jnp.stack([jax.random.permutation(key, balanced) for key in jax.random.split(rng, self.num_heads)], axis=1)

  # 3. Loss: the mean over heads of CE(head_h(x), L[h, i])

  def loss(self, params: Params, extra: Extra, batch: dict[str, Array], rng: Array, step: Array) -> tuple[Array, tuple[Extra, Metrics]]:
    del step
    images = batch["crop"][:, 0]  # [B, S, S, C]
    copies = ROTATIONS if self.rotation_weight else 1
    if copies > 1:
      turned = [jnp.rot90(images, k, axes=(1, 2)) for k in range(copies)]
      images = jnp.stack(turned, axis=1).reshape(-1, *images.shape[1:])  # [4B, S, S, C], image-major
    encoded = encode(self.encoder, params["encoder"], extra["batch_stats"], images, train=True, rng=rng)
    features, logits = encoded.out[self.encoder.output], encoded.out["projection"][::copies]  # [4B, D], [B, H, K]
    labels = extra["assignments"][batch["index"]]  # [B, H]
    loss = classify.cross_entropy(logits.reshape(-1, self.num_clusters), labels=labels.reshape(-1))
    metrics = {"label_accuracy": classify.accuracy(logits[:, 0], labels=labels[:, 0])}
    if copies > 1:
      scores = Linear(output=ROTATIONS).apply({"params": params["rotation"]}, features, train=True)
      turns = jnp.tile(jnp.arange(ROTATIONS), len(logits))
      metrics["rotation_accuracy"] = classify.accuracy(scores, labels=turns)
      loss += self.rotation_weight * classify.cross_entropy(scores, labels=turns)
    targets = jax.nn.one_hot(labels[:, 0], self.num_clusters)
    metrics |= health.distribution(targets, name="target") | health.distribution(jax.nn.softmax(logits[:, 0]), name="prediction")
    metrics |= health.embedding(features)
    return loss, (extra | {"batch_stats": encoded.batch_stats}, jax.lax.stop_gradient(metrics))

  # 4. Labels of all images, by optimal transport

  def solve_times(self) -> np.ndarray:
    """[solves] float64 times of the solves, in images seen; labels that are given are read once, at the start."""
    if self.assignments_file:
      return np.zeros(1)
    epochs = self.total_steps / self.steps_per_epoch if self.num_examples else 0.0
    return (epochs + self.solve_margin) * self.num_examples * np.linspace(0, 1, self.solves) ** self.solve_power

  def refresh_steps(self) -> Sequence[int]:
    """The first steps with step * batch >= time; one solve per step, so that those that fall together come one by one."""
    steps: list[int] = []
    for due in np.ceil(self.solve_times() / self.batch_size - 1e-9):
      steps.append(max(int(due), steps[-1] + 1 if steps else 0))
    return [step for step in steps if step < self.total_steps]

  def refresh(self, state: TrainState, extract: Extract, rng: Array) -> tuple[TrainState, dict[str, float]]:
    if self.assignments_file:
      return state.replace(extra=state.extra | {"assignments": self.given_labels()}), {}
    self._check_size()
    keyed = state.replace(extra=state.extra | {"label_key": jax.random.key_data(jax.random.fold_in(rng, 1))})
    features = place_rows(extract(keyed, self._penultimate, views=self.inputs().views, rng=rng))  # [N, D]
    before = gather(state.extra["assignments"])
    labels, found = before.copy(), []
    epoch = int(state.step) * self.batch_size // self.num_examples
    head = state.params["encoder"]["head"]
    how = dict(power=self.sharpness, tolerance=self.tolerance, max_iterations=self.max_sweeps, num_rows=self.num_examples)
    for h in [epoch % self.num_heads] if self.one_head else range(self.num_heads):
      log_p = _log_probabilities(features, head["kernel"][h], head["bias"][h])  # [N, K]
      solved = equipartition(log_p, **how)
      labels[:, h] = solved.labels
      found.append((solved, normalized_mutual_information(before[:, h], solved.labels)))
    metrics = {
      "nmi_to_last": float(np.mean([nmi for _, nmi in found])),
      "cluster_min": float(min(s.sizes.min() for s, _ in found)),
      "cluster_max": float(max(s.sizes.max() for s, _ in found)),
      "sweeps": float(max(s.iterations for s, _ in found)),
      "transport_error": max(s.error for s, _ in found),
      "cost": float(np.mean([s.cost for s, _ in found])),
    }
    return state.replace(extra=state.extra | {"assignments": labels}), metrics

  def given_labels(self) -> np.ndarray:
    """[N, H] int32 of `assignments_file`."""
    field, shape = f"config.method.assignments_file={self.assignments_file!r}", (self.num_examples, self.num_heads)
    try:
      labels = np.lib.format.open_memmap(pathlib.Path(self.assignments_file).expanduser(), mode="r")
    except (OSError, ValueError) as error:
      raise UserError(f"{field}: cannot be read as a .npy file: {error}") from error
    low, high = (labels.min(), labels.max()) if labels.size else (0, 0)
    last = self.num_clusters - 1
    if labels.shape != shape or labels.dtype.kind not in "iu" or low < 0 or high > last:
      raise UserError(f"{field}: found {labels.dtype} {labels.shape}, {low} to {high}; expected integers {shape}, 0 to {last}.")
    return labels.astype(np.int32)

  def _check_size(self) -> None:
    if self.num_clusters > self.num_examples:
      raise UserError(f"config.method.num_clusters={self.num_clusters}: more clusters than the {self.num_examples} training images.")

  def _penultimate(self, params: Params, extra: Extra, batch: dict[str, Array]) -> Array:
    """[B, D], what the heads read."""
    rng = jax.random.fold_in(jax.random.wrap_key_data(extra["label_key"]), batch["index"][0])
    train = self.train_mode_labels
    return encode(self.encoder, params["encoder"], extra["batch_stats"], batch["crop"][:, 0], train=train, rng=rng).out[self.encoder.output]

  def refresh_memory(self) -> dict[str, int]:
    """Printed before the start, so that a data set too small is refused there."""
    if self.assignments_file or not self.solves:
      return {"given labels": self.given_labels().nbytes} if self.assignments_file else {}
    self._check_size()
    images = jax.ShapeDtypeStruct((1, *sides(self.size), self.image_channels), jnp.float32)
    out = jax.eval_shape(lambda x: self.encoder.init_with_output(jax.random.key(0), x, train=False)[0], images)
    dim = out[self.encoder.output].shape[-1]
    rows = 4 * self.num_examples
    return {
      f"the features [{self.num_examples}, {dim}], on the host and over the devices": rows * dim,
      f"the scores of a head [{self.num_examples}, {self.num_clusters}], over the devices": rows * self.num_clusters,
    }

  # 5. Evaluation

  def features(self, params: Params, extra: Extra, batch: dict[str, Array]) -> dict[str, Array]:
    """What the heads read ("pooled"), the scores of head 0, and of AlexNet the pooled maps for linear probes."""
    out = encode(self.encoder, params["encoder"], extra["batch_stats"], batch["image"][:, 0], train=False).out
    probes = probe_features(out["stages"], pools=ALEXNET_POOLS, kind="max") if isinstance(self.model, AlexNet) else {}
    return {"pooled": out[self.encoder.output], "logits": out["projection"][:, 0]} | probes

  def param_rules(self) -> tuple[Rule, ...]:
    """Decay on everything, biases and norms included."""
    return (Rule(pattern=r".*"),)


@jax.jit
def _log_probabilities(features: Array, kernel: Array, bias: Array) -> Array:
  """log softmax of one head, [N, D] -> [N, K] float32."""
  return jax.nn.log_softmax(jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias)
