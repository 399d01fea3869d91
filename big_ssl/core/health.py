"""Is the run learning or collapsing? Scalars for the jitted step, and a verdict in words on the host."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from big_ssl.core.types import Array, Metrics, PyTree


def distribution(probabilities: Array, *, name: str) -> Metrics:
  """How assignments [N, K] are spread.

  Returns:
    name + "_entropy": mean entropy / ln K; 0 one-hot, 1 uniform.
    name + "_mean_entropy": entropy of the mean / ln K; 0 all rows choose one prototype, 1 all are used alike.
    name + "_use": distinct argmax / min(N, K).
    name + "_max": mean of the largest probability.
  """
  p = probabilities.astype(jnp.float32)
  rows, classes = p.shape
  scale = 1.0 / math.log(max(classes, 2))
  mean = jnp.mean(p, axis=0)
  used = jnp.zeros(classes, jnp.float32).at[jnp.argmax(p, axis=-1)].set(1.0)
  return {
    f"{name}_entropy": -jnp.mean(jnp.sum(xlogy(p, p), axis=-1)) * scale,
    f"{name}_mean_entropy": -jnp.sum(xlogy(mean, mean)) * scale,
    f"{name}_use": jnp.sum(used) / min(rows, classes),
    f"{name}_max": jnp.mean(jnp.max(p, axis=-1)),
  }


def embedding(z: Array) -> Metrics:
  """Spread of l2-normalized embeddings [N, D].

  Returns:
    "rank": effective rank, the participation ratio (tr C)^2 / tr(C^2) of the covariance C; between 1 and min(N - 1, D),
      and 0 where all embeddings are equal.
    "std": mean deviation of a dimension times sqrt(D); about 1 when embeddings fill the sphere, 0 when all are equal
      (the monitor of arXiv 2011.10566, section 4.1).
  """
  z = _unit(z)
  z = z - jnp.mean(z, axis=0)
  # tr(C^2) is the same for the Gram matrix of the shorter side.
  z_short = z.T if z.shape[0] >= z.shape[1] else z
  gram = jnp.matmul(z_short, z_short.T, precision=jax.lax.Precision.HIGHEST)
  trace = jnp.sum(z * z)
  # Below this the deviations are the rounding of float32 and their rank means nothing.
  spread = trace > 1e-10 * z.shape[0]
  rank = jnp.where(spread, trace**2 / jnp.maximum(jnp.sum(gram * gram), 1e-30), 0.0)
  std = jnp.mean(jnp.std(z, axis=0)) * math.sqrt(z.shape[1])
  return {"rank": rank, "std": std}


def agreement(student: Array, teacher: Array) -> Array:
  """Mean cosine between the rows of two [N, D] arrays."""
  return jnp.mean(jnp.sum(_unit(student) * _unit(teacher), axis=-1))


def _unit(z: Array) -> Array:
  z = z.astype(jnp.float32)
  return z / jnp.maximum(jnp.linalg.norm(z, axis=-1, keepdims=True), 1e-12)


def first_nonfinite(tree: PyTree) -> Array:
  """Index, in flattening order, of the first leaf with a NaN or an infinity; -1 where there is none. int32 scalar."""
  leaves = jax.tree.leaves(tree)
  if not leaves:
    return jnp.int32(-1)
  bad = jnp.stack([~jnp.all(jnp.isfinite(x)) for x in leaves] + [jnp.bool_(True)])
  # One argmax, not any() besides: XLA derives any() of these scalars anew in whatever depends on it, as every tensor of a step does.
  first = jnp.argmax(bad)
  return jnp.where(first == len(leaves), -1, first).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
  """Thresholds of the verdict (own choice, on the safe side of what healthy runs show).

  Attributes:
    stop_on_collapse: end the run, exit code 4, when the verdict is "collapsed".
    max_entropy: mean target entropy, as a share of ln K, above which targets say nothing: collapsed.
    min_mean_entropy: entropy of the mean target, as a share of ln K, below which one prototype takes all: collapsed.
    min_use: distinct prototypes per min(batch, K), below which few are alive: warning.
    min_std: deviation of the embeddings, healthy is about 1: a warning below it, collapsed below a tenth of it.
    min_rank: effective rank of the embeddings: a warning below it.
    max_agreement: mean cosine of student and teacher above which the task is trivial: warning.
  """

  stop_on_collapse: bool = False
  max_entropy: float = 0.99
  min_mean_entropy: float = 0.05
  min_use: float = 0.05
  min_std: float = 0.05
  min_rank: float = 2.0
  max_agreement: float = 0.999


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What one line of metrics says; message and hint are in words, "" when healthy."""

  state: Literal["healthy", "warning", "collapsed"]
  message: str = ""
  hint: str = ""


def judge(metrics: Mapping[str, float], *, thresholds: HealthConfig) -> Verdict:
  """The gravest finding in one line of metrics; what a method does not log is not judged.

  Args:
    metrics: from the step: "loss", "skipped", "std", "rank", "agreement"; "target_*" or "teacher_*" of `distribution`.
    thresholds: from `config.health`.
  """
  findings = _nonfinite(metrics) + _embeddings(metrics, thresholds)
  for name in ("target", "teacher"):
    findings += _assignments(metrics, name, thresholds)
  grave = [f for f in findings if f.state == "collapsed"]
  return (grave + findings + [Verdict("healthy")])[0]


def _nonfinite(metrics: Mapping[str, float]) -> list[Verdict]:
  hint = "Lower the learning rate, clip harder (config.optim.clip), or compute in float32 (config.model.dtype)."
  if not math.isfinite(metrics.get("loss", 0.0)):
    return [Verdict("collapsed", f"the loss is not finite ({metrics['loss']}).", hint)]
  if metrics.get("skipped", 0.0):
    return [Verdict("warning", "the step was skipped: a gradient is not finite.", hint)]
  bad = [k for k, v in metrics.items() if not math.isfinite(v)]
  return [Verdict("warning", f"the metric {bad[0]} is not finite ({metrics[bad[0]]}).", hint)] if bad else []


def _embeddings(metrics: Mapping[str, float], t: HealthConfig) -> list[Verdict]:
  std, rank = metrics.get("std", 1.0), metrics.get("rank", math.inf)
  if std < t.min_std:
    return [
      Verdict(
        "collapsed" if std < 0.1 * t.min_std else "warning",
        f"constant embedding: all images get nearly the same one (deviation {std:.4f}, healthy is about 1).",
        "Check that something forbids it: a teacher that moves slowly, batch normalization in the head, negatives or a"
        " regularizer; and lower the learning rate.",
      )
    ]
  found = []
  if rank < t.min_rank:
    text = f"dimensional collapse: embeddings fill {rank:.1f} dimensions."
    found.append(
      Verdict(
        "warning", text, "Strengthen the augmentation, raise the batch size or the regularizer, lower the weight decay."
      )
    )
  if metrics.get("agreement", 0.0) > t.max_agreement:
    text = f"trivial agreement: student and teacher give the same embedding (cosine {metrics['agreement']:.4f})."
    found.append(
      Verdict(
        "warning", text, "The views are probably equal: check that crops and augmentation differ between the two sides."
      )
    )
  return found


def _assignments(metrics: Mapping[str, float], name: str, t: HealthConfig) -> list[Verdict]:
  entropy, mean_entropy = metrics.get(f"{name}_entropy", 0.0), metrics.get(f"{name}_mean_entropy", 1.0)
  use = metrics.get(f"{name}_use", 1.0)
  if entropy > t.max_entropy:
    text = f"uniform collapse: every {name} is spread over all prototypes (entropy {entropy:.3f} of ln K)."
    return [
      Verdict(
        "collapsed",
        text,
        f"Sharpen: lower the temperature of the {name}, then the learning rate; use fewer prototypes on small data.",
      )
    ]
  if mean_entropy < t.min_mean_entropy:
    text = f"one-prototype collapse: all images share one (entropy of the mean {name} {mean_entropy:.3f} of ln K)."
    hint = "Balance the targets: turn Sinkhorn or centering on, or raise the weight of the mean-entropy term."
    return [Verdict("collapsed", text, hint)]
  if use < t.min_use:
    text = f"few prototypes are alive ({use:.3f} of those a batch could use)."
    return [
      Verdict(
        "warning",
        text,
        "Balance the targets: Sinkhorn, or a larger weight of the mean-entropy term; or use fewer prototypes.",
      )
    ]
  return []
