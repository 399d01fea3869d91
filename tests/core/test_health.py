"""Collapses planted on purpose get the right words; healthy numbers do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core import health
from big_ssl.core.health import HealthConfig

N, D, K = 64, 32, 48


def measure(z, probabilities, teacher=None, **extra):
  """Everything a step logs, as the host sees it."""

  @jax.jit
  def step(z, p, teacher):
    return health.embedding(z) | health.distribution(p, name="target") | {"agreement": health.agreement(z, teacher)}

  teacher = jax.random.normal(jax.random.key(9), z.shape) if teacher is None else teacher
  return {k: float(v) for k, v in step(z, probabilities, teacher).items()} | {"loss": 1.0, "skipped": 0.0} | extra


def healthy_embedding():
  return jax.random.normal(jax.random.key(0), (N, D))


def healthy_targets():
  return jax.nn.softmax(4 * jax.random.normal(jax.random.key(1), (N, K)))


def line():
  return jnp.outer(jnp.linspace(-1, 1, N), jax.random.normal(jax.random.key(2), (D,))) + jax.random.normal(
    jax.random.key(3), (D,)
  )


CONSTANT = jnp.broadcast_to(jax.random.normal(jax.random.key(4), (D,)), (N, D))
PLANTED = {
  "uniform collapse": ("collapsed", "Sharpen", dict(probabilities=jnp.full((N, K), 1 / K))),
  "one-prototype collapse": ("collapsed", "Sinkhorn", dict(probabilities=jax.nn.one_hot(jnp.full(N, 7), K))),
  "few prototypes": ("warning", "fewer prototypes", dict(probabilities=jax.nn.one_hot(jnp.arange(N) % 2, K))),
  "constant embedding": (
    "collapsed",
    "learning rate",
    dict(z=CONSTANT + 1e-4 * jax.random.normal(jax.random.key(5), (N, D))),
  ),
  "dimensional collapse": ("warning", "augmentation", dict(z=line())),
  "trivial agreement": ("warning", "views", dict(teacher=3 * healthy_embedding())),
  "loss is not finite": ("collapsed", "float32", dict(loss=float("nan"))),
  "step was skipped": ("warning", "learning rate", dict(skipped=1.0)),
  "metric grad_norm is not finite": ("warning", "clip", dict(grad_norm=float("inf"))),
}


@pytest.mark.parametrize("words", PLANTED)
def test_a_planted_collapse_is_named_with_its_remedy(words):
  state, remedy, planted = PLANTED[words]
  verdict = health.judge(
    measure(**({"z": healthy_embedding(), "probabilities": healthy_targets()} | planted)), thresholds=HealthConfig()
  )
  assert verdict.state == state and words in verdict.message and remedy in verdict.hint, verdict


def test_random_embeddings_and_targets_are_healthy():
  metrics = measure(healthy_embedding(), healthy_targets())
  assert health.judge(metrics, thresholds=HealthConfig()) == health.Verdict("healthy"), metrics
  assert health.judge({"loss": 3.0}, thresholds=HealthConfig()).state == "healthy", "what is not logged is not judged"


def test_a_collapse_outranks_a_warning():
  metrics = measure(line(), jnp.full((N, K), 1 / K), skipped=1.0)
  assert "uniform" in health.judge(metrics, thresholds=HealthConfig()).message


def test_assignments_of_a_teacher_are_judged_as_targets_are():
  metrics = {k: float(v) for k, v in health.distribution(jnp.full((N, K), 1 / K), name="teacher").items()}
  verdict = health.judge(metrics, thresholds=HealthConfig())
  assert verdict.state == "collapsed" and "temperature of the teacher" in verdict.hint


THRESHOLDS = {
  "max_entropy": ({"target_entropy": 0.5}, 0.4),
  "min_mean_entropy": ({"target_mean_entropy": 0.5}, 0.6),
  "min_use": ({"target_use": 0.5}, 0.6),
  "min_std": ({"std": 0.5}, 0.6),
  "min_rank": ({"rank": 5.0}, 6.0),
  "max_agreement": ({"agreement": 0.5}, 0.4),
}


@pytest.mark.parametrize("field", THRESHOLDS)
def test_each_threshold_has_an_effect(field):
  metrics, value = THRESHOLDS[field]
  assert health.judge(metrics, thresholds=HealthConfig()).state == "healthy"
  assert health.judge(metrics, thresholds=HealthConfig(**{field: value})).state != "healthy"
  assert {f.name for f in dataclasses.fields(HealthConfig)} == {*THRESHOLDS, "stop_on_collapse"}


def test_effective_rank_and_deviation_have_their_known_values():
  full = health.embedding(jax.random.normal(jax.random.key(0), (4000, 8)))
  assert float(full["rank"]) == pytest.approx(8, rel=0.02) and float(full["std"]) == pytest.approx(1, rel=0.02)
  basis = jnp.repeat(jnp.eye(8)[:3], 5, axis=0)
  assert float(health.embedding(basis)["rank"]) == pytest.approx(2, rel=1e-5), "three points span a plane"
  few = health.embedding(jax.random.normal(jax.random.key(1), (4, 500)))
  assert 2.5 < float(few["rank"]) <= 3.0001, "N points span N - 1 dimensions"
  equal = health.embedding(CONSTANT)
  assert float(equal["rank"]) == 0 and float(equal["std"]) < 1e-5


def test_shares_of_distributions_have_their_known_values():
  p = jax.nn.one_hot(jnp.arange(8) % 4, 16)
  out = {k: float(v) for k, v in health.distribution(p, name="p").items()}
  assert out == pytest.approx({"p_entropy": 0, "p_mean_entropy": 0.5, "p_use": 0.5, "p_max": 1}, abs=1e-6)


def test_agreement_is_the_cosine_in_float32_also_of_half_precision():
  x = jnp.asarray([[300.0, 0.0], [0.0, 2.0]], jnp.bfloat16)
  assert float(health.agreement(x, x)) == pytest.approx(1) and float(health.agreement(x, x[::-1])) == pytest.approx(0)


def test_the_first_nonfinite_tensor_is_found():
  tree = {"a": jnp.ones(3), "b": {"kernel": jnp.asarray([1.0, jnp.inf]), "scale": jnp.asarray(jnp.nan)}}
  assert int(jax.jit(health.first_nonfinite)(tree)) == 1
  assert int(health.first_nonfinite({"a": jnp.ones(3)})) == -1 and int(health.first_nonfinite({})) == -1


def test_numbers_are_the_same_on_eight_devices():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
  one, many = measure(healthy_embedding(), healthy_targets()), measure(put(healthy_embedding()), put(healthy_targets()))
  assert one == pytest.approx(many, rel=1e-5)
  tree = {"a": put(np.ones(16, np.float32)), "b": put(np.full(16, np.nan, np.float32))}
  assert int(jax.jit(health.first_nonfinite)(tree)) == 1
