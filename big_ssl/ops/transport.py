"""Balanced hard labels for a whole data set, by optimal transport."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import Array, UserError

_ERROR_EVERY = 10  # sweeps between two looks at the error, the first one included, as in the public code


@dataclasses.dataclass(frozen=True)
class Equipartition:
  """Labels of an equal partition.

  Attributes:
    labels: [N] int32.
    iterations: sweeps done.
    error: sum over the images of |c_old / c_new - 1| at the last look.
    errors: [ceil(iterations / 10)] float32, all looks.
    log_r: [K] float32 logarithms of the factors of the clusters; the plan is r_k p_ik^power c_i, with 1/N per image.
    sizes: [K] images per cluster.
    cost: mean of -log_p at the label, in nats.
  """

  labels: np.ndarray
  iterations: int
  error: float
  errors: np.ndarray
  log_r: np.ndarray
  sizes: np.ndarray
  cost: float


def equipartition(
  log_p: Array, *, power: float, tolerance: float, max_iterations: int, num_rows: int | None = None
) -> Equipartition:
  """Labels that use each of K clusters for N/K of the images and are as likely as that allows.

  Sinkhorn-Knopp on M = P^power (SeLa, arXiv 1911.05371, section 3.2; the public code). From c = 1/N each sweep takes
  r = (1/K) / (M c), then c = (1/N) / (M^T r); sweeps 0, 10, 20, ... look at err = sum_i |c_old,i / c_new,i - 1| and end
  where it is at most `tolerance`. The label is argmax_k r_k M_ki.

  Everything is float32 in logarithms: P^25 has no float32. A sweep is written as the update of r alone: with
  q_i = softmax_k(log r_k + log M_ki), the rows of the plan times N, the next r is r_k / (K mean_i q_ik), and
  c_old,i / c_new,i = sum_k q_ik r_new,k / r_old,k. So nothing of size N is kept between sweeps, K numbers are reduced
  over the devices, and the small changes near the end, which `tolerance` is about, are not differences of large ones.

  Args:
    log_p: [N, K] log-probabilities, or scores; the rows may be split over a mesh, a device works on its share.
    power: lambda; 25 for SeLa on ImageNet. The entropy of the plan has the weight 1/lambda.
    tolerance: a sum over images, so that 0.1 is tight; float32 itself gives up to 1e-7 per image.
    max_iterations: sweeps after which the labels are taken as they are.
    num_rows: N where `log_p` has been padded to more rows, at the end; None: no padding.

  Raises:
    UserError: K < 2, K > N, power or max_iterations not positive, or an image without finite scores.
  """
  rows, clusters = log_p.shape[0] if num_rows is None else num_rows, log_p.shape[1]
  if not 2 <= clusters <= rows:
    raise UserError(
      f"equal partition: {clusters} clusters of {rows} images; expected at least 2 and at most one per image."
    )
  if power <= 0:
    raise UserError(f"equal partition: lambda={power}: expected a positive number.")
  if max_iterations < 1:
    raise UserError(f"equal partition: max_iterations={max_iterations}: expected at least 1.")
  place = getattr(log_p, "sharding", None)
  mesh = place.mesh if isinstance(place, NamedSharding) else None
  first_bad = int(_compiled(_first_bad, mesh)(log_p, jnp.int32(rows)))
  if first_bad < rows:
    raise UserError(f"equal partition: the scores of image {first_bad} are not finite; the network has diverged.")
  out = _compiled(_solve, mesh)(
    log_p, *map(jnp.float32, (power, tolerance)), jnp.int32(rows), max_iterations=max_iterations
  )
  out = {name: np.asarray(value) for name, value in out.items()}
  iterations, labels = int(out["iterations"]), out["labels"][:rows]
  errors = out["errors"][: -(-iterations // _ERROR_EVERY)]
  sizes = np.bincount(labels, minlength=clusters)
  return Equipartition(labels, iterations, float(errors[-1]), errors, out["log_r"], sizes, float(out["cost"]))


def memory(*, rows: int, clusters: int) -> int:
  """Bytes at the peak over all devices: the scores, and three arrays of their size that a sweep works with."""
  return 4 * 4 * rows * clusters


def place_rows(rows: np.ndarray) -> Array:
  """The same rows on the devices, split over all of the mesh in use, and zeros after them until they divide.

  Every process passes the same array. Without a mesh it is one device's.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return jnp.asarray(rows)
  padded = (-(-len(rows) // mesh.size) * mesh.size, *rows.shape[1:])

  def part(index: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = index[0].indices(padded[0])
    there = rows[start : min(stop, len(rows))]
    return np.pad(there, [(0, stop - start - len(there))] + [(0, 0)] * (rows.ndim - 1))

  return jax.make_array_from_callback(padded, NamedSharding(mesh, P(mesh.axis_names)), part)


@functools.cache
def _compiled(function, mesh: Mesh | None):
  """The results are small, and every process needs all of them."""
  out = None if mesh is None else NamedSharding(mesh, P())
  return jax.jit(function, static_argnames=() if function is _first_bad else ("max_iterations",), out_shardings=out)


def _first_bad(log_p: Array, rows: Array) -> Array:
  """The first row with a NaN, +inf or nothing but -inf; the number of rows where there is none."""
  index = jnp.arange(log_p.shape[0])
  bad = ~jnp.isfinite(jnp.max(log_p, axis=1)) & (index < rows)
  return jnp.min(jnp.where(bad, index, rows))


def _solve(log_p: Array, power: Array, tolerance: Array, rows: Array, *, max_iterations: int) -> dict[str, Array]:
  clusters = log_p.shape[1]
  valid = (jnp.arange(log_p.shape[0]) < rows)[:, None]
  log_m = power * jnp.where(valid, log_p.astype(jnp.float32), 0.0)

  def log_q(high: Array, low: Array) -> Array:
    """log softmax_k(log r + log M) [N, K], with log r = high + low: the low part counts once the row's peak is gone."""
    x = log_m + high
    x = (x - jnp.max(x, axis=1, keepdims=True)) + low
    return x - jax.nn.logsumexp(x, axis=1, keepdims=True)

  def sweep(state: dict[str, Array]) -> dict[str, Array]:
    high, low, t = state["high"], state["low"], state["iterations"]
    share = clusters * jnp.sum(jnp.where(valid, jnp.exp(log_q(high, low)), 0.0), axis=0) / rows  # K mean_i q_ik
    delta = -jnp.log(share)

    def look() -> Array:
      ratio = jnp.sum(jnp.exp(log_q(high, low)) * jnp.expm1(delta), axis=1)  # c_old / c_new - 1
      return jnp.sum(jnp.where(valid[:, 0], jnp.abs(ratio), 0.0))

    error = jax.lax.cond(t % _ERROR_EVERY == 0, look, lambda: state["error"])
    total = high + (low + delta)  # two floats hold log r: near the end delta is below the last place of one
    return {
      "high": total,
      "low": (low + delta) - (total - high),
      "iterations": t + 1,
      "error": error,
      "errors": state["errors"].at[t // _ERROR_EVERY].set(error),
    }

  # Sweep 0 starts from c = 1/N, which is not of the form above: r = (1/K) / mean_i M_ik.
  log_mean = jax.nn.logsumexp(jnp.where(valid, log_m, -jnp.inf), axis=0) - jnp.log(rows.astype(jnp.float32))
  high = -math.log(clusters) - log_mean
  ratio = jnp.expm1(jax.nn.logsumexp(log_m + high, axis=1))
  error = jnp.sum(jnp.where(valid[:, 0], jnp.abs(ratio), 0.0))
  looks = -(-max_iterations // _ERROR_EVERY)
  state = {
    "high": high,
    "low": jnp.zeros_like(high),
    "iterations": jnp.int32(1),
    "error": error,
    "errors": jnp.zeros(looks).at[0].set(error),
  }
  state = jax.lax.while_loop(lambda s: (s["error"] > tolerance) & (s["iterations"] < max_iterations), sweep, state)
  labels = jnp.argmax(log_q(state["high"], state["low"]), axis=1).astype(jnp.int32)
  hit = jnp.take_along_axis(log_p, labels[:, None], axis=1)
  cost = -jnp.sum(jnp.where(valid, hit, 0.0)) / rows
  kept = {name: state[name] for name in ("iterations", "errors")}
  return kept | {"labels": labels, "log_r": state["high"] + state["low"], "cost": cost}
