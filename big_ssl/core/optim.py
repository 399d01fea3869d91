"""Optimizers with parameter rules: AdamW, momentum SGD, LARS and LARC, as pure functions of the step.

Learning rate and weight decay are read from curves at the step; nothing counts but `TrainState.step`, except Adam's
bias correction, whose count is kept per tensor: a tensor frozen for a while starts its own count at its first update,
as the reference implementations of DINO do by skipping it (arXiv 2104.14294, public code).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from big_ssl.core import layer_decay, schedules
from big_ssl.core.optim_config import OptimConfig
from big_ssl.core.types import Array, Interval, Params, PyTree, Rule, UserError


@dataclasses.dataclass(frozen=True)
class Tensor:
  """What the optimizer does with one parameter tensor."""

  path: str
  shape: tuple[int, ...]
  rule: Rule
  freeze_steps: int

  @property
  def fused(self) -> str:
    """The path with query, key and value as the one tensor "qkv" that they are in the reference implementations."""
    return re.sub(r"/(query|key|value)/", "/qkv/", self.path)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """`init(params)` and `apply(params, grads, state, step)`; `tensors` is the table that is printed before the start."""

  init: Callable[[Params], PyTree]
  apply: Callable[..., Any]
  tensors: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Updated:
  params: Params
  opt_state: PyTree
  metrics: dict[str, Array]


def paths(tree: PyTree) -> list[str]:
  """The "a/b/c" path of every leaf, in flattening order."""
  return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


def match_rules(params: Params, rules: tuple[Rule, ...], *, batch_size: int, examples: int) -> tuple[Tensor, ...]:
  """The first matching rule of every parameter.

  Raises:
    UserError: a parameter that no rule matches, or a pattern that is not a regular expression.
  """
  table = []
  for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
    try:
      rule = next((r for r in rules if re.search(r.pattern, path)), None)
    except re.error as error:
      raise UserError(f"config.optim.rules: not a regular expression: {error}") from None
    if rule is None:
      raise UserError(f"config.optim.rules: no rule matches the parameter '{path}' {tuple(leaf.shape)}; end with '.*'.")
    until = rule.freeze_until.steps(batch_size=batch_size, examples=examples) if rule.freeze_until else 0
    table.append(Tensor(path, tuple(leaf.shape), rule, until))
  return tuple(table)


def decay_layers(tensors: tuple[Tensor, ...], *, decay: float) -> tuple[Tensor, ...]:
  """The tensors with `layer_decay.factors` on their learning rates, on top of what their rules say."""
  found = layer_decay.factors([t.path for t in tensors], shapes=[t.shape for t in tensors], decay=decay)
  slower = lambda t, factor: dataclasses.replace(t, rule=dataclasses.replace(t.rule, lr_mult=t.rule.lr_mult * factor))
  return tuple(slower(t, factor) for t, factor in zip(tensors, found, strict=True))


def learning_rate(config: OptimConfig, *, total_steps: int, batch_size: int, examples: int) -> Callable[[Array], Array]:
  """The scheduled learning rate as a function of the step."""
  factor = {"none": 1.0, "linear": batch_size / 256, "sqrt": batch_size**0.5}[config.lr_scale]
  warmup = config.warmup.steps(batch_size=batch_size, examples=examples)
  clock = _clock(config, batch_size=batch_size, examples=examples)
  if config.schedule == "constant":
    return lambda step: jnp.full((), config.lr * factor, jnp.float32)
  if config.schedule == "step":
    boundaries = [m.steps(batch_size=batch_size, examples=examples) for m in config.milestones]
    return lambda step: schedules.staircase(clock(step), start=config.lr * factor, boundaries=boundaries, factor=config.decay_factor)
  if config.schedule == "poly":
    ends = {"start": config.lr * factor, "final": config.final_lr * factor}
    total = int(total_steps * config.stretch)
    return lambda step: schedules.poly(clock(step), **ends, power=config.poly_power, total=total)
  # A warm-up that includes its end may be all of the run, as numpy's linspace; any other one would never peak.
  if config.schedule == "warmup_cosine" and warmup >= total_steps * config.stretch + config.warmup_inclusive:
    raise UserError(f"config.optim.warmup={config.warmup}: {warmup} steps, but the schedule ends after {int(total_steps * config.stretch)}.")
  return lambda step: schedules.warmup_cosine(
    clock(step),
    start=config.start_lr * factor,
    peak=config.lr * factor,
    final=config.final_lr * factor,
    warmup=warmup if config.schedule == "warmup_cosine" else 0,
    total=int(total_steps * config.stretch),
    inclusive=config.warmup_inclusive,
  )


def weight_decay(config: OptimConfig, *, total_steps: int, batch_size: int, examples: int) -> Callable[[Array], Array]:
  """The scheduled weight decay as a function of the step."""
  clock = _clock(config, batch_size=batch_size, examples=examples)
  if config.weight_decay_final is None:
    return lambda step: jnp.full((), config.weight_decay, jnp.float32)
  return lambda step: schedules.cosine(
    clock(step),
    start=config.weight_decay,
    final=config.weight_decay_final,
    total=int(total_steps * config.stretch),
  )


def _clock(config: OptimConfig, *, batch_size: int, examples: int) -> Callable[[Array], Array]:
  """The point of its curve at which an update is made: offset, and held within `schedule_every`."""
  if config.schedule_every is None:
    return lambda step: step + config.schedule_offset
  every = max(config.schedule_every.steps(batch_size=batch_size, examples=examples), 1)
  return lambda step: (step + config.schedule_offset) // every * every


def make_optimizer(
  config: OptimConfig,
  *,
  params: Params,
  rules: tuple[Rule, ...],
  total_steps: int,
  batch_size: int,
  examples: int,
  freeze_backbone: Interval | None = None,
) -> Optimizer:
  """Builds the optimizer for (abstract or real) `params`; until `freeze_backbone` only what is not the backbone learns."""
  tensors = match_rules(params, tuple(config.rules) + tuple(rules), batch_size=batch_size, examples=examples)
  if freeze_backbone is not None:
    until = freeze_backbone.steps(batch_size=batch_size, examples=examples)
    longer = lambda t: dataclasses.replace(t, freeze_steps=max(t.freeze_steps, until))
    tensors = tuple(longer(t) if "backbone" in t.path.split("/") else t for t in tensors)
  if config.layer_decay != 1:
    tensors = decay_layers(tensors, decay=config.layer_decay)
  lr_curve = learning_rate(config, total_steps=total_steps, batch_size=batch_size, examples=examples)
  wd_curve = weight_decay(config, total_steps=total_steps, batch_size=batch_size, examples=examples)
  update = _adamw if config.name == "adamw" else _momentum

  def init(params: Params) -> PyTree:
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    if config.name == "adamw":
      return {"mu": zeros(), "nu": zeros(), "count": jax.tree.map(lambda p: jnp.zeros((), jnp.int32), params)}
    return {"momentum": zeros()}

  def apply(params: Params, grads: Params, opt_state: PyTree, step: Array) -> Updated:
    lr, wd = lr_curve(step), wd_curve(step)
    grads = clip_gradients(grads, tensors, limit=config.clip, by=config.clip_by)
    leaves, treedef = jax.tree.flatten(params)
    grad_leaves = treedef.flatten_up_to(grads)
    slots = {k: treedef.flatten_up_to(v) for k, v in opt_state.items()}
    grad_leaves = [g.astype(p.dtype) for g, p in zip(grad_leaves, leaves, strict=True)]
    rates = [_Rates(lr=lr * t.rule.lr_mult, decay=wd * t.rule.weight_decay) for t in tensors]
    rates = with_trust(config, tensors, leaves, grad_leaves, rates)
    new_leaves, new_slots = [], {k: [] for k in slots}
    for i, (tensor, p, g) in enumerate(zip(tensors, leaves, grad_leaves, strict=True)):
      old = {k: v[i] for k, v in slots.items()}
      if tensor.rule.lr_mult == 0:
        new_p, new = p, old
      else:
        new_p, new = update(config, tensor.rule, p, g, old, rates[i])
        if tensor.freeze_steps:
          active = step >= tensor.freeze_steps
          new_p, new = jax.tree.map(lambda a, b: jnp.where(active, a, b), (new_p, new), (p, old))
      new_leaves.append(new_p)
      for k in new_slots:
        new_slots[k].append(new[k])
    new_params = treedef.unflatten(new_leaves)
    delta = jax.tree.map(lambda a, b: a - b, new_params, params)
    metrics = {"lr": lr, "weight_decay": wd, "update_norm": optax.global_norm(delta)}
    return Updated(new_params, {k: treedef.unflatten(v) for k, v in new_slots.items()}, metrics)

  return Optimizer(init, apply, tensors)


@dataclasses.dataclass(frozen=True)
class _Rates:
  """Of one tensor: p <- p - lr trust (g + decay p), but for the momentum."""

  lr: Array
  decay: Array
  trust: Array | float = 1.0


def with_trust(
  config: OptimConfig, tensors: tuple[Tensor, ...], params: list[Array], grads: list[Array], rates: list[_Rates]
) -> list[_Rates]:
  """The rates with the ratios of LARS or LARC, where a rule does not exempt the tensor.

  LARS (arXiv 1708.03888): trust |p| / |g + wd p|, 1 where a norm is 0. LARC (NVIDIA apex): trust |p| / (|g| + wd |p| + eps),
  and 1 without decay where |p| or |g| is 0. With `config.trust_clip`, LARC's clip, a ratio becomes min(ratio / lr, 1). Query, key
  and value of one attention have one ratio, since the reference implementations keep them in one tensor.
  """
  if config.name not in ("lars", "larc"):
    return rates
  lars = config.name == "lars"
  updates = [g + r.decay * p for p, g, r in zip(params, grads, rates, strict=True)] if lars else grads
  found = []
  for tensor, r, p, u in zip(tensors, rates, fused_norms(params, tensors), fused_norms(updates, tensors), strict=True):
    usable = (p > 0) & (u > 0)
    ratio = config.trust_coefficient * p / jnp.where(usable, u if lars else u + r.decay * p + config.eps, 1.0)
    ratio = jnp.minimum(ratio / r.lr, 1.0) if config.trust_clip else ratio
    trusted = _Rates(r.lr, r.decay if lars else jnp.where(usable, r.decay, 0.0), jnp.where(usable, ratio, 1.0))
    found.append(trusted if tensor.rule.trust_ratio else r)
  return found


def fused_norms(leaves: list[Array], tensors: tuple[Tensor, ...]) -> list[Array]:
  """Euclidean norm of each tensor, of query, key and value of one attention together."""
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves]
  totals: dict[str, Array] = {}
  for tensor, square in zip(tensors, squares, strict=True):
    totals[tensor.fused] = totals.get(tensor.fused, jnp.float32(0)) + square
  return [jnp.sqrt(totals[t.fused]) for t in tensors]


def _adamw(config: OptimConfig, rule: Rule, p: Array, g: Array, old: dict, rates: _Rates) -> tuple[Array, dict]:
  """Adam with decoupled weight decay (arXiv 1711.05101): p <- p - lr (m_hat / (sqrt(v_hat) + eps) + wd p)."""
  del rule
  count = old["count"] + 1
  mu = config.b1 * old["mu"] + (1 - config.b1) * g
  nu = config.b2 * old["nu"] + (1 - config.b2) * g * g
  t = count.astype(jnp.float32)
  m_hat = mu / (1 - config.b1**t)
  v_hat = nu / (1 - config.b2**t)
  p = p - rates.lr * (m_hat / (jnp.sqrt(v_hat) + config.eps) + rates.decay * p)
  return p, {"mu": mu, "nu": nu, "count": count}


def _momentum(config: OptimConfig, rule: Rule, p: Array, g: Array, old: dict, rates: _Rates) -> tuple[Array, dict]:
  """Momentum SGD, LARS and LARC: d = trust (g + wd p), trust 1 for SGD.

  v <- m v + d, p <- p - lr v (torch, BYOL, MoCo v3); with `lr_in_momentum`, v <- m v + lr d, p <- p - v (SimCLR, PAWS).
  The two agree only while the learning rate is constant.
  """
  d = rates.trust * (g + rates.decay * p)
  inside, outside = (rates.lr, 1.0) if config.lr_in_momentum else (1.0, rates.lr)
  d = inside * d
  momentum = config.momentum * rule.momentum
  v = momentum * old["momentum"] + d
  return p - outside * (momentum * v + d if config.nesterov else v), {"momentum": v}


def clip_gradients(grads: Params, tensors: tuple[Tensor, ...], *, limit: float, by: str) -> Params:
  """Scales gradients to at most `limit`: by their one "global" norm, or each "tensor" by its own.

  Query, key and value of one attention have one norm, since DINO and iBOT, which clip by tensor, keep them in one. The
  coefficient is limit / (norm + 1e-6) where that is below 1, as torch's clip_grad_norm_ has it. Tensors whose rule says
  clip=False neither count in the global norm nor are scaled.
  """
  if not limit:
    return grads
  leaves, treedef = jax.tree.flatten(grads)
  squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in leaves]
  groups = ["" if by == "global" else t.fused for t in tensors]
  totals: dict[str, Array] = {}
  for group, square, tensor in zip(groups, squares, tensors, strict=True):
    totals[group] = totals.get(group, jnp.float32(0)) + (square if tensor.rule.clip else 0.0)
  coefficients = [jnp.minimum(limit / (jnp.sqrt(totals[g]) + 1e-6), 1.0) for g in groups]
  clipped = [g * c if t.rule.clip else g for g, c, t in zip(leaves, coefficients, tensors, strict=True)]
  return treedef.unflatten(clipped)


def parameter_table(tensors: tuple[Tensor, ...]) -> str:
  """Shape, learning-rate factor, decay factor, freezing of every tensor, as text; recipes are compared by it."""
  lines = [f"{'parameter':<64} {'shape':<20} {'lr':>5} {'decay':>6} {'trust':>5} {'clip':>5} {'momentum':>8} {'frozen until':>13}"]
  for t in tensors:
    frozen = "always" if t.rule.lr_mult == 0 else str(t.freeze_steps) if t.freeze_steps else "-"
    shape, rule = str(t.shape), t.rule
    flags = f"{rule.trust_ratio!s:>5} {rule.clip!s:>5} {rule.momentum:>8g} {frozen:>13}"
    lines.append(f"{t.path:<64} {shape:<20} {rule.lr_mult:>5g} {rule.weight_decay:>6g} {flags}")
  lines.append(f"total {sum(int(np.prod(t.shape)) for t in tensors):,} parameters in {len(tensors)} tensors")
  return "\n".join(lines)
