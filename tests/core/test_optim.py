"""Optimizers, clipping and parameter rules against independent implementations and goldens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_ssl.core.config import OptimConfig
from big_ssl.core.optim import Tensor, clip_gradients, learning_rate, make_optimizer, match_rules
from big_ssl.core.types import Interval, Rule, UserError

RULES = (Rule(pattern=r"(bias|gamma)$", weight_decay=0.0, trust_ratio=False), Rule(pattern=r".*"))


def optimizer(config, params, rules=RULES, total=10):
  return make_optimizer(config, params=params, rules=rules, total_steps=total, batch_size=8, examples=80)


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  return {"a": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "bias": jnp.asarray(rng.normal(size=4), jnp.float32)}}


def test_adamw_equals_optax_with_a_decay_mask():
  config = OptimConfig(lr=3e-3, schedule="constant", weight_decay=0.1)
  params = make_params()
  opt = optimizer(config, params)
  reference = optax.adamw(3e-3, weight_decay=0.1, mask={"a": {"kernel": True, "bias": False}})
  ours, theirs, state, ref_state = params, params, opt.init(params), reference.init(params)
  for step in range(5):
    grads = make_params(step + 1)
    out = opt.apply(ours, grads, state, jnp.int32(step))
    ours, state = out.params, out.opt_state
    updates, ref_state = reference.update(grads, ref_state, theirs)
    theirs = optax.apply_updates(theirs, updates)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("group", ["simclr", "byol"])
def test_lars_golden_with_a_changing_learning_rate(golden, group):
  z = golden("lars_steps")
  names = ["conv/kernel", "dense/kernel", "dense/bias", "batch_normalization/gamma", "zero/kernel"]
  params = {n: jnp.asarray(z[f"param0/{n}"]) for n in names}
  state = None
  for i, lr in enumerate(z["learning_rates"]):
    config = OptimConfig(name="lars", lr=float(lr), schedule="constant", weight_decay=1e-3, lr_in_momentum=group == "simclr")
    opt = optimizer(config, params)
    state = opt.init(params) if state is None else state
    out = opt.apply(params, {n: jnp.asarray(z[f"grad{i}/{n}"]) for n in names}, state, jnp.int32(i))
    params, state = out.params, out.opt_state
    for n in names:
      np.testing.assert_allclose(params[n], z[f"{group}/param{i + 1}/{n}"], rtol=1e-5, atol=1e-7, err_msg=f"step {i} {n}")


def test_clipping_per_tensor_golden(golden):
  z = golden("dino_clip")
  names = [k.removeprefix("grad/") for k in z if k.startswith("grad/")]
  grads = {n: jnp.asarray(z[f"grad/{n}"]) for n in names}
  tensors = match_rules(grads, (Rule(pattern=".*"),), batch_size=1, examples=1)
  clipped = clip_gradients(grads, tensors, limit=float(z["clip"]), by="tensor")
  for n in names:
    np.testing.assert_allclose(clipped[n], z[f"clipped/{n}"], rtol=1e-6, atol=1e-8)


def test_query_key_and_value_are_clipped_by_their_common_norm():
  attention = {name: {"kernel": jnp.full((4,), value)} for name, value in (("query", 1.0), ("key", 2.0), ("value", 2.0), ("out", 3.0))}
  grads = {"block_0": {"attention": attention}, "block_1": {"attention": jax.tree.map(lambda x: 0.1 * x, attention)}}
  tensors = match_rules(grads, (Rule(pattern=".*"),), batch_size=1, examples=1)
  clipped = clip_gradients(grads, tensors, limit=1.0, by="tensor")
  first = clipped["block_0"]["attention"]  # norms 2, 4 and 4: 6 in common
  for name, expected in (("query", 1 / 6), ("key", 2 / 6), ("value", 2 / 6), ("out", 3 / 6)):
    np.testing.assert_allclose(first[name]["kernel"], expected, rtol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, clipped["block_1"], grads["block_1"])


@pytest.mark.parametrize("name", ["lars", "larc"])
def test_query_key_and_value_have_the_trust_ratio_of_the_one_tensor_that_they_are_elsewhere(name):
  rng = np.random.default_rng(0)
  draw = lambda scale: {n: {"kernel": jnp.asarray(scale * k * rng.normal(size=(6, 2, 3)), jnp.float32)} for k, n in enumerate(("query", "key", "value"), 1)}
  apart, grads = draw(1.0), draw(0.1)
  fused = lambda tree: {"qkv": {"kernel": jnp.stack([tree[n]["kernel"] for n in ("query", "key", "value")])}}
  config = OptimConfig(name=name, lr=0.3, schedule="constant", weight_decay=0.1, trust_coefficient=0.02)
  found = [
    opt.apply(params, g, opt.init(params), jnp.int32(0)).params
    for params, g in (({"attention": t(apart)}, {"attention": t(grads)}) for t in (dict, fused))
    for opt in [optimizer(config, params)]
  ]
  np.testing.assert_allclose(fused(found[0]["attention"])["qkv"]["kernel"], found[1]["attention"]["qkv"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize("name", ["lars", "larc"])
def test_a_clipped_trust_ratio_ends_at_the_scheduled_rate(name):
  params, grads = make_params(), make_params(1)
  same = lambda a, b: jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), a, b)

  def step(**fields):
    opt = optimizer(OptimConfig(schedule="constant", weight_decay=0.1, **fields), params, (Rule(pattern=".*"),))
    return opt.apply(params, grads, opt.init(params), jnp.int32(0)).params

  same(step(name=name, lr=0.3, trust_coefficient=1e3, trust_clip=True), step(name="sgd", lr=0.3))
  # Below it, the ratio is the rate itself, whatever is scheduled.
  same(step(name=name, lr=0.3, trust_coefficient=1e-2, trust_clip=True), step(name=name, lr=1.0, trust_coefficient=1e-2))
  same(step(name=name, lr=0.0, trust_clip=True), params)


def test_global_clipping_leaves_excluded_tensors_alone():
  grads = {"kernel": jnp.full((4,), 3.0), "prototypes": jnp.full((4,), 100.0)}
  tensors = match_rules(grads, (Rule(pattern="prototypes", clip=False), Rule(pattern=".*")), batch_size=1, examples=1)
  clipped = clip_gradients(grads, tensors, limit=1.0, by="global")
  np.testing.assert_allclose(np.linalg.norm(clipped["kernel"]), 1.0, rtol=1e-5)
  np.testing.assert_array_equal(clipped["prototypes"], grads["prototypes"])


def test_a_frozen_tensor_starts_its_own_adam_count_when_it_thaws():
  rules = (Rule(pattern="bias$", freeze_until=Interval(2, "steps")), Rule(pattern=".*"))
  params = make_params()
  opt = optimizer(OptimConfig(lr=1e-2, schedule="constant"), params, rules)
  state, current = opt.init(params), params
  for step in range(3):
    out = opt.apply(current, make_params(7), state, jnp.int32(step))
    if step < 2:
      np.testing.assert_array_equal(out.params["a"]["bias"], params["a"]["bias"])
    current, state = out.params, out.opt_state
  # The first Adam step has length lr in every coordinate, whatever the clock says.
  np.testing.assert_allclose(np.abs(current["a"]["bias"] - params["a"]["bias"]), 1e-2, rtol=1e-4)
  assert int(state["count"]["a"]["bias"]) == 1 and int(state["count"]["a"]["kernel"]) == 3


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
  with pytest.raises(UserError, match="a/kernel"):
    match_rules(make_params(), (Rule(pattern="bias$"),), batch_size=1, examples=1)


def test_warmup_longer_than_training_is_an_error():
  with pytest.raises(UserError, match="config.optim.warmup"):
    optimizer(OptimConfig(warmup=Interval(50, "steps")), make_params(), total=10)


def test_a_warmup_that_includes_both_ends_may_be_the_whole_run_but_no_longer():
  config = OptimConfig(lr=2.0, start_lr=0.5, warmup=Interval(4, "steps"), warmup_inclusive=True)
  curve = learning_rate(config, total_steps=4, batch_size=8, examples=80)
  np.testing.assert_allclose([curve(jnp.int32(i)) for i in range(4)], np.linspace(0.5, 2.0, 4), rtol=1e-6)
  for wrong, total in ((config, 3), (dataclasses.replace(config, warmup_inclusive=False), 4)):
    with pytest.raises(UserError, match="config.optim.warmup=4steps: 4 steps, but the schedule ends after"):
      learning_rate(wrong, total_steps=total, batch_size=8, examples=80)


@pytest.mark.parametrize("field,value", [("lr", 2e-3), ("b1", 0.5), ("b2", 0.9), ("eps", 1e-2), ("weight_decay", 0.3), ("clip", 0.1)])
def test_every_adamw_field_has_an_effect(field, value):
  base = OptimConfig(lr=1e-3, schedule="constant", weight_decay=0.1)
  results = []
  for config in (base, dataclasses.replace(base, **{field: value})):
    params = make_params()
    opt = optimizer(config, params)
    state = opt.init(params)
    for step in range(2):
      out = opt.apply(params, make_params(step + 3), state, jnp.int32(step))
      params, state = out.params, out.opt_state
    results.append(np.asarray(params["a"]["kernel"]))
  assert not np.array_equal(*results), field


def test_tensor_record_holds_the_rule():
  table = match_rules(make_params(), RULES, batch_size=1, examples=1)
  assert [(t.path, t.rule.weight_decay) for t in table] == [("a/bias", 0.0), ("a/kernel", 1.0)]
  assert isinstance(table[0], Tensor)
