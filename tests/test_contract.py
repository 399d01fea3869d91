"""What every method keeps, for every config: a new file in configs/ or methods/ enrols itself."""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
from collections.abc import Mapping

import engine
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl import setup
from big_ssl.augment.rand_augment import RandAugment
from big_ssl.core import config as config_lib
from big_ssl.core.method import Method
from big_ssl.core.optim import parameter_table
from big_ssl.core.step import make_step, prepare_streams
from big_ssl.core.types import Interval, UserError
from big_ssl.evaluate import Extractor, refresh

# The tests of a method follow each other, on one worker, and share what they compile.
PER_METHOD = pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in engine.methods()], scope="module"
)
ENGINE_FIELDS = {f.name for f in dataclasses.fields(Method)}


def abstract_run(name: str, recipe: str) -> setup.Run:
  """The recipe as it is, on a few rendered images instead of its data."""
  overrides = {"data.source": "sprites", "data.train_examples": 64, "data.eval_examples": 16, "data.image_size": 32, "optim.warmup": "0steps"}
  overrides |= engine.few_labels(engine.load(name, recipe))
  if "fsdp" in str(engine.load(name, recipe).mesh):
    overrides |= {"mesh.fsdp": 1, "mesh.tensor": 1}
  return setup.make_run(engine.load(name, recipe, **overrides), devices=jax.devices()[:1])


@pytest.mark.parametrize("name,recipe", engine.recipes())
def test_full_recipe_has_a_valid_step_and_the_recorded_parameter_table(name, recipe):
  run = abstract_run(name, recipe)
  raw = {k: p.spec() for k, p in run.pipelines.items()}
  resident = {k: jax.ShapeDtypeStruct(p.resident.shape, p.resident.dtype) for k, p in run.pipelines.items() if p.resident is not None}
  step = make_step(run.method, run.optimizer, seed=0, accumulate=run.config.optim.accumulate)
  state, metrics = jax.eval_shape(step, run.abstract_state, raw, resident)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), run.abstract_state)
  assert metrics["loss"].shape == () and all(m.shape == () for m in metrics.values())
  recorded = engine.ROOT / "tests" / "tables" / f"{name}-{recipe}.txt"
  table = parameter_table(run.optimizer.tensors) + "\n"
  if os.environ.get("RECORD_TABLES"):
    recorded.write_text(table)
  assert recorded.read_text() == table, f"the parameter table of configs/{name}.py:{recipe} changed; RECORD_TABLES=1 records it anew"


def shortened(name: str, **overrides):
  """Six steps under SGD, one compilation for all that compare with it.

  Adam turns the rounding of gradients that are exactly zero in truth (key biases, biases before BN) into whole steps. The
  methods' own optimizers are tested in tests/core and, whole, in the loops of tests/methods.
  """
  return engine.small(name, **{"optim.name": "sgd", "optim.lr": 0.05} | overrides)


@functools.lru_cache(maxsize=1)
def six_steps(name: str):
  return engine.train_steps(shortened(name))


@PER_METHOD
def test_steps_are_finite_and_change_every_trained_parameter(name):
  made = engine.compiled(shortened(name))
  run, start = made.run, made.initial_state()
  state, history = six_steps(name)
  assert all(np.isfinite(list(h.values())).all() and h["skipped"] == 0 for h in history), history
  frozen = {t.path for t in run.optimizer.tensors if t.rule.lr_mult == 0 or t.freeze_steps >= run.total_steps}
  # A bias before BN has a gradient of rounding alone, too small to move it: its velocity tells that it is connected.
  trees = (start.params, state.params, jax.tree.map(lambda p, m: m, state.params, state.opt_state["momentum"]))
  for tensor, a, b, velocity in zip(run.optimizer.tensors, *map(jax.tree.leaves, trees), strict=True):
    assert (np.array_equal(a, b) and not np.any(velocity)) == (tensor.path in frozen), tensor.path


def written_as_zeros(jaxpr: jax.extend.core.Jaxpr) -> bool:
  """Whether every output is a literal zero, broadcast: so the gradient of what is stopped everywhere is traced."""
  literal = lambda v: isinstance(v, jax.extend.core.Literal)
  source = {v: equation for equation in jaxpr.eqns for v in equation.outvars}
  made = lambda v: source[v].primitive.name == "broadcast_in_dim" and literal(source[v].invars[0]) and not np.any(source[v].invars[0].val)
  return all(not np.any(v.val) if literal(v) else v in source and made(v) for v in jaxpr.outvars)


@PER_METHOD
def test_no_gradient_reaches_the_extra_state(name):
  made = engine.compiled(shortened(name))
  run = made.run
  shapes = (run.abstract_state.params, run.batch_shapes, jax.random.key(2), jnp.int32(0))
  floats, rest = {}, {}
  for key, value in run.abstract_state.extra.items():
    (floats if all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(value)) else rest)[key] = value
  # Running batch statistics are not read in training; whatever else is differentiable must get exactly nothing.
  loss = lambda floats, rest, params, *others: run.method.loss(params, floats | rest, *others)[0]
  traced = jax.make_jaxpr(jax.grad(loss))(floats, rest, *shapes)
  if written_as_zeros(traced.jaxpr):
    return
  state = made.initial_state()
  batch = prepare_streams(run.method, next(run.batches(0, 1, state.extra)), run.resident, jax.random.key(1))
  parts = [{k: v for k, v in state.extra.items() if k in kept} for kept in (floats, rest)]
  grads = jax.jit(jax.grad(loss))(*parts, state.params, batch, jax.random.key(2), state.step)
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


@PER_METHOD
def test_several_devices_agree_with_one(name):
  # Four steps: rounding grows from step to step, through the gates of PAWS's ReLUs by an order of magnitude in two.
  state1, history1 = engine.train_steps(shortened(name), stop=4)
  for devices in (8, 4) if name == "msn" else (8,):
    state, history = engine.train_steps(shortened(name), devices=devices, stop=4)
    losses, losses1 = (np.array([h["loss"] for h in hs]) for hs in (history, history1))
    # Terms are of order 1 or more, but their difference may be near 0: PAWS's cross-entropy less the mean entropy.
    np.testing.assert_allclose(losses, losses1, rtol=0, atol=1e-5 * max(1, np.abs(losses1).max()))
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state1.params), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


@PER_METHOD
def test_a_run_resumed_in_the_middle_is_bit_equal(name):
  config = shortened(name)
  whole, history = six_steps(name)
  half, first = engine.train_steps(config, stop=3)
  host = jax.tree.map(np.asarray, half)
  placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), host, engine.compiled(config).run.abstract_state)
  again, second = engine.train_steps(config, state=placed)
  assert first + second == history
  assert engine.leaves_equal(again, whole)


@PER_METHOD
def test_bfloat16_compute_stays_finite_and_close(name):
  if "dtype" not in config_lib.find("models", engine.load(name).model["name"], setup.Backbone, path="config.model").__dataclass_fields__:
    pytest.fail("every backbone has a compute dtype")
  _, history = engine.train_steps(shortened(name, **{"model.dtype": "bfloat16"}), stop=2)
  reference = six_steps(name)[1]
  assert all(np.isfinite(list(h.values())).all() for h in history)
  np.testing.assert_allclose(history[0]["loss"], reference[0]["loss"], rtol=0.05)


def changed(field: dataclasses.Field, value):
  """Another valid value of a field: the rule is by type, with names deciding where sizes must stay multiples."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, str) and "Literal[" in str(field.type):
    options = ast.literal_eval(f"({str(field.type).partition('[')[2].rpartition(']')[0]},)")
    return next(v for v in options if v != value)
  if isinstance(value, str):
    return [v for v in ("pil", "simclr") if v != value][0]
  if isinstance(value, int):
    return value * 2 if field.name.endswith(("size", "dim")) else value + 1
  if isinstance(value, float):
    return 0.35 if value == 0 else value * 0.5
  if isinstance(value, tuple) and value and all(isinstance(v, int) for v in value):
    return tuple(v + 1 for v in value)
  if isinstance(value, tuple):
    return tuple(v * 0.9 if v else 0.35 for v in value) if value else (0.5, 0.5, 0.5)
  if isinstance(value, Mapping):
    return dict(value)
  if isinstance(value, Interval):
    return dataclasses.replace(value, value=3 * value.value + 1)
  raise AssertionError(f"no rule for {field.name}={value!r}")


# Fields that act together with others only, which come first; and values that are not found by type.
COMPANIONS = {
  ("dino", "teacher_temperature_start"): {"teacher_warmup_epochs": 1},
  ("supervised", "switch_prob"): {"mixup": 0.8, "cutmix": 1.0},
  ("supervised", "hidden_dim"): {"hidden_layers": 1},
  ("segmentation", "decoder_layers"): {"decoder": "mask"},
  ("segmentation", "dropout"): {"decoder": "probe"},
}
VALUES = {("supervised", "hidden_dim"): 8, ("supervised", "rand_augment"): RandAugment()}


class Traced:
  """All a method can influence, as text, what is cheap to get first: its views and rules, its initialization, its step."""

  def __init__(self, method: Method, run: setup.Run):
    self._method, self._run = method, run

  @functools.cached_property
  def views(self) -> str:
    method = self._method
    return str([method.inputs(), method.eval_view(), method.param_rules(), list(method.refresh_steps())])

  @functools.cached_property
  def _shapes(self):
    run, streams = self._run, setup.as_streams(self._method.inputs())
    pipelines = {k: setup.make_pipeline(run.config, run.sources[i.source], i, mesh=run.mesh, stream=k) for k, i in streams.items()}
    return setup.batch_shapes(self._method, pipelines)

  @functools.cached_property
  def _initialized(self):
    return jax.make_jaxpr(lambda k: setup._init(self._method, self._shapes, k), return_shape=True)(jax.random.key(0))

  @property
  def init(self) -> str:
    return str(self._initialized[0])

  @functools.cached_property
  def step(self) -> str:
    method, (params, extra) = self._method, self._initialized[1]
    batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct((4, *s.shape[1:]), s.dtype), self._shapes)

    def whole(params, extra, batch, key, step):
      loss, (extra, metrics) = method.loss(params, extra, batch, key, step)
      return loss, method.post_update(params, extra, step), metrics

    traced = jax.make_jaxpr(whole)(params, extra, batch, jax.random.key(0), jax.ShapeDtypeStruct((), jnp.int32))
    return str(traced) + str([np.asarray(c).tolist() for c in traced.consts])  # a table of a schedule is a constant

  def __eq__(self, other) -> bool:
    """Once the views differ, the batch may not fit the rest: nothing more is looked at. Where they do not, the batch is the same."""
    if self.views != other.views:
      return False
    self._shapes = other._shapes
    return self.step == other.step and self.init == other.init


def read_by_refresh(run: setup.Run) -> set[str]:
  """Fields that the first refresh reads: its work on the host cannot be traced."""
  if not len(run.method.refresh_steps()):
    return set()
  read, names = set(), {f.name for f in dataclasses.fields(run.method)}

  def record(self, name):
    if name in names:
      read.add(name)
    return object.__getattribute__(self, name)

  cls = type(run.method)
  recorded = {"__getattribute__": record, "__hash__": lambda self: id(self), "__eq__": lambda self, other: self is other}
  method = object.__new__(type("Recorded", (cls,), recorded))
  vars(method).update({f.name: getattr(run.method, f.name) for f in dataclasses.fields(cls)})
  run = dataclasses.replace(run, method=method)
  state, extract = run.initial_state(), Extractor(run)
  read.clear()
  refresh(run, extract, state)
  return read


@PER_METHOD
def test_every_field_of_a_method_has_an_effect(name, tmp_path):
  # The fields of one block are those of all; segmentation's `layers` needs two.
  shallow = {"model.depth": 1} if engine.load(name).model["name"] == "vit" and name != "segmentation" else {}
  run = setup.make_run(engine.small(name, **shallow), devices=jax.devices()[:1])
  reference = Traced(run.method, run)
  dead = []
  for field in dataclasses.fields(run.method):
    if field.name in ENGINE_FIELDS:
      continue
    value = getattr(run.method, field.name)
    companions = COMPANIONS.get((name, field.name))
    base = run.method.replace(**companions) if companions else run.method
    try:
      changes = {field.name: VALUES[name, field.name] if (name, field.name) in VALUES else changed(field, value)}
      if field.name == "sinkhorn_iterations":
        changes["sinkhorn_iterations"] = value + 2
      if field.name in ("mean", "std") and not value:
        changes = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
      if field.name == "teacher":  # fields of a backbone, by name
        changes = {"teacher": {"layernorm_eps": 1e-3}}
      if field.name == "labels_file":
        (tmp_path / "labeled.txt").write_text("\n".join(map(str, range(len(run.sources["train"])))))
        changes = {"labels_file": str(tmp_path / "labeled.txt"), "labels_per_class": 0}
      if Traced(base.replace(**changes), run) == (reference if base is run.method else Traced(base, run)):
        dead.append(field.name)
    except UserError as error:
      pytest.fail(f"{field.name}: {error}")
  if dead:
    dead = sorted(set(dead) - read_by_refresh(run))
  assert not dead, f"fields without effect: {dead}"


@PER_METHOD
def test_features_are_finite_for_every_held_out_image(name):
  made = engine.compiled(shortened(name))
  run, extract = made.run, Extractor(made.run)
  extract.state = made.initial_state()
  out = extract("eval")
  assert out.features.shape[0] == len(run.sources["eval"]) and np.isfinite(out.features).all()


@PER_METHOD
def test_the_trunk_is_the_backbone_whose_features_are_evaluated(name):
  made = engine.compiled(shortened(name))
  run, state = made.run, made.initial_state()
  params = jax.tree.map(lambda x: 1.3 * x, state.params)  # no longer what a teacher started from
  images = jax.random.uniform(jax.random.key(0), (2, *run.method.eval_view().shape, 3))

  @jax.jit
  def both(params, extra):
    out = run.method.trunk(params, extra)(images)
    # What methods evaluate: an output of the backbone, the mean of its patches, or CLS before the last norm.
    found = {"mean": jnp.mean(out["tokens"], axis=1)} if "tokens" in out else {}
    found |= {k: out[k] for k in ("pooled", "relu") if k in out} | ({"cls": out["cls_layers"][:, -1]} if "cls_layers" in out else {})
    return run.method.features(params, extra, {"image": images[:, None]})["pooled"], found

  pooled, found = both(params, state.extra)
  assert any(x.shape == pooled.shape and np.allclose(x, pooled, rtol=1e-4, atol=1e-5) for x in found.values())
