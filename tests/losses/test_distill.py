"""Losses on prototypes against reference numbers, their gradients, invariances and shardings."""

import pathlib

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.losses import distill
from big_ssl.losses.regularizers import entropy, mean_entropy_deficit
from big_ssl.losses.sinkhorn import sinkhorn

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
MSN = np.load(GOLDENS / "msn_loss.npz")
DINO = np.load(GOLDENS / "dino_loss.npz")
VARIANTS = {f"sinkhorn{s}_memax{m}": dict(sinkhorn=bool(s), memax_weight=float(m)) for s in (0, 1) for m in (0, 1)}


def msn(anchors, prototypes, targets=None, **kwargs):
  targets = MSN["targets"] if targets is None else targets
  fixed = dict(num_views=3, temperature=float(MSN["tau"]), sharpen=float(MSN["T"]), sinkhorn=False)
  return distill.msn_loss(jnp.asarray(anchors), jnp.asarray(targets), jnp.asarray(prototypes), **(fixed | kwargs))


def value_and_gradients(**kwargs):
  fn = jax.jit(jax.value_and_grad(lambda a, q: ((o := msn(a, q, **kwargs)).total, o), argnums=(0, 1), has_aux=True))
  (_, out), gradients = fn(MSN["anchors"], MSN["prototypes"])
  return out, gradients


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_divergence_equals_its_definition_and_the_teacher_gets_no_gradient(temperature):
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 7, 5)).astype(np.float32) * 3
  p, t = (np.exp(x / temperature) / np.exp(x / temperature).sum(1, keepdims=True) for x in (student, teacher))
  loss = lambda s, t: distill.kl_divergence(s, teacher=t, temperature=temperature)
  value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(student), jnp.asarray(teacher))
  assert float(value) == pytest.approx(temperature**2 * np.mean(np.sum(t * np.log(t / p), 1)), rel=1e-4)
  np.testing.assert_allclose(gradients[0], temperature * (p - t) / 7, atol=1e-6)
  assert not np.any(gradients[1])
  assert float(loss(jnp.asarray(student), jnp.asarray(student))) == 0
  assert np.isfinite(loss(jnp.asarray([[9e4, 0.0]]), jnp.asarray([[0.0, 9e4]])))


@pytest.mark.parametrize("name", VARIANTS)
def test_msn_loss_terms_targets_and_gradients_match_the_reference(name):
  out, (grad_anchors, grad_prototypes) = value_and_gradients(**VARIANTS[name])
  for mine, key in ((out.ce, "ce_loss"), (out.entropy, "entropy"), (out.total, "total"), (out.targets, "targets")):
    np.testing.assert_allclose(mine, MSN[f"{name}/{key}"], atol=1e-5, rtol=1e-5, err_msg=key)
  np.testing.assert_allclose(VARIANTS[name]["memax_weight"] * out.memax, MSN[f"{name}/memax_loss"], atol=1e-5)
  np.testing.assert_allclose(grad_anchors, MSN[f"{name}/grad_anchors"], atol=1e-5)
  np.testing.assert_allclose(grad_prototypes, MSN[f"{name}/grad_prototypes"], atol=1e-5)
  np.testing.assert_allclose(out.probabilities, MSN["anchor_probs"], atol=1e-5)


def test_msn_loss_with_other_weights_matches_the_reference():
  ce, memax, mean_entropy = MSN["weighted/ce_memax_entropy_weights"]
  assert ce == 1
  out, gradients = value_and_gradients(sinkhorn=True, memax_weight=float(memax), entropy_weight=float(mean_entropy))
  np.testing.assert_allclose(out.total, MSN["weighted/total"], atol=1e-5)
  np.testing.assert_allclose(gradients[0], MSN["weighted/grad_anchors"], atol=1e-5)
  np.testing.assert_allclose(gradients[1], MSN["weighted/grad_prototypes"], atol=1e-5)


def test_msn_targets_carry_no_gradient():
  gradient = jax.grad(lambda h: msn(MSN["anchors"], MSN["prototypes"], h, sinkhorn=True).total)(
    jnp.asarray(MSN["targets"])
  )
  assert float(jnp.abs(gradient).max()) == 0.0


def test_msn_loss_is_invariant_to_lengths_and_to_the_order_of_images():
  base = float(msn(MSN["anchors"], MSN["prototypes"], sinkhorn=True).total)
  scale = np.linspace(0.1, 50, 18, dtype=np.float32)[:, None]
  order = np.random.default_rng(0).permutation(6)
  views = MSN["anchors"].reshape(3, 6, -1)[:, order].reshape(18, -1)
  assert float(msn(MSN["anchors"] * scale, 7 * MSN["prototypes"], sinkhorn=True).total) == pytest.approx(base, abs=1e-5)
  assert float(msn(views, MSN["prototypes"], MSN["targets"][order], sinkhorn=True).total) == pytest.approx(
    base, abs=1e-5
  )


def test_label_smoothing_equals_the_product_with_the_label_matrix():
  s, k = 0.1, 10
  labels = np.full((k, k), s / k) + np.eye(k) * (1 - s)
  plain = jnp.exp(distill.assign(MSN["anchors"], MSN["prototypes"], temperature=0.1))
  smooth = jnp.exp(distill.assign(MSN["anchors"], MSN["prototypes"], temperature=0.1, label_smoothing=s))
  np.testing.assert_allclose(smooth, np.asarray(plain) @ labels, atol=1e-6)
  out = msn(MSN["anchors"], MSN["prototypes"], label_smoothing=s)
  t = np.asarray(jnp.exp(distill.assign(MSN["targets"], MSN["prototypes"], temperature=0.1)), np.float64) @ labels
  t = t**4 / (t**4).sum(1, keepdims=True)
  np.testing.assert_allclose(out.targets, t, atol=1e-5)
  np.testing.assert_allclose(
    out.ce, -np.mean(np.sum(np.tile(t, (3, 1)) * np.log(np.asarray(plain) @ labels), 1)), rtol=1e-5
  )


@pytest.mark.parametrize("temperature", [0.1, 0.002])
def test_msn_loss_and_gradients_stay_finite_when_probabilities_underflow(temperature):
  out, gradients = value_and_gradients(
    temperature=temperature, sharpen=0.02, sinkhorn=True, memax_weight=5.0, entropy_weight=1.0
  )
  assert all(bool(jnp.isfinite(x).all()) for x in (out.total, *gradients)), out.total
  assert float(out.targets.min()) == 0.0


def test_dead_embeddings_give_finite_gradients():
  anchors = np.array(MSN["anchors"])
  anchors[4] = 0
  gradient = jax.grad(lambda a: msn(a, MSN["prototypes"]).total)(jnp.asarray(anchors))
  assert float(jnp.abs(gradient).max()) < 100, float(jnp.abs(gradient).max())


def test_half_precision_embeddings_are_computed_in_float32():
  anchors = jnp.asarray(MSN["anchors"], jnp.bfloat16)
  expected = msn(anchors.astype(jnp.float32), MSN["prototypes"]).total
  out = msn(anchors, MSN["prototypes"])
  assert out.total.dtype == jnp.float32 and float(out.total) == float(expected)


def test_collapse_numbers_of_msn_are_what_they_say():
  out = msn(MSN["anchors"], MSN["prototypes"])
  assert float(out.distinct_targets) == len(set(np.argmax(MSN["sinkhorn0_memax0/targets"], 1)))
  constant = np.ones_like(MSN["targets"])
  assert float(msn(MSN["anchors"], MSN["prototypes"], constant).distinct_targets) == 1
  same = msn(MSN["anchors"], np.ones_like(MSN["prototypes"]))
  assert float(same.max_target) == pytest.approx(0.1) and float(same.memax) == pytest.approx(0, abs=1e-6)


def test_msn_loss_is_the_same_on_eight_devices():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rng = np.random.default_rng(1)
  anchors, targets = (rng.normal(size=(n, 8)).astype(np.float32) for n in (48, 16))
  fn = jax.jit(jax.value_and_grad(lambda a, q, h: msn(a, q, h, sinkhorn=True).total, argnums=(0, 1)), compiler_options=engine.OPTIMIZED)
  one = fn(anchors, MSN["prototypes"], targets)
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  many = fn(put(anchors, P("data")), put(MSN["prototypes"], P()), put(targets, P("data")))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, many)


def test_wrong_number_of_views_is_an_error():
  with pytest.raises(ValueError, match="18 anchors are not 2 views of 6"):
    msn(MSN["anchors"], MSN["prototypes"], num_views=2)


def test_sinkhorn_equals_the_published_loop_and_balances():
  rng = np.random.default_rng(0)
  t = rng.dirichlet(np.full(7, 0.3), size=12)
  q = t.T / t.sum()
  for _ in range(3):
    q = q / (q.sum(1, keepdims=True) * 7)
    q = q / (q.sum(0, keepdims=True) * 12)
  np.testing.assert_allclose(jnp.exp(sinkhorn(jnp.log(t), iterations=3)), (q * 12).T, atol=1e-5)
  many = jnp.exp(sinkhorn(jnp.log(t), iterations=500))
  np.testing.assert_allclose(many.sum(0), 12 / 7, rtol=1e-3)
  np.testing.assert_allclose(many.sum(1), 1, rtol=1e-5)


def test_sinkhorn_survives_scores_that_overflow_and_unused_prototypes():
  scores = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)) * 300, jnp.float32).at[:, 2].set(-jnp.inf)
  q = jnp.exp(sinkhorn(scores, iterations=3))
  assert bool(jnp.isfinite(q).all())
  np.testing.assert_allclose(q.sum(1), 1, rtol=1e-5)
  with pytest.raises(ValueError, match="at least 1"):
    sinkhorn(scores, iterations=0)


def test_entropies_at_their_ends_with_finite_gradients():
  assert float(mean_entropy_deficit(jnp.eye(4))) == pytest.approx(0, abs=1e-6)
  assert float(mean_entropy_deficit(jnp.eye(4)[:1])) == pytest.approx(np.log(4), rel=1e-6)
  np.testing.assert_allclose(entropy(jnp.full((2, 4), 0.25)), np.log(4), rtol=1e-6)
  assert bool(jnp.isfinite(jax.grad(lambda p: mean_entropy_deficit(p))(jnp.eye(4)[:1])).all())


@pytest.mark.parametrize("views,teachers,batch,prototypes", [(10, 2, 3, 4096), (3, 1, 5, 17), (4, 3, 2, 9), (2, 2, 4, 2)])
def test_dino_loss_is_the_mean_over_the_pairs_of_different_views(views, teachers, batch, prototypes):
  rng = np.random.default_rng(views)
  s, t, c = rng.normal(size=(views, batch, prototypes)), rng.normal(size=(teachers, batch, prototypes)), rng.normal(size=prototypes)
  log_softmax = lambda x: x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
  p, q = log_softmax(s / 0.2), np.exp(log_softmax((t - c) / 0.07))
  wanted = np.mean([-np.mean(np.sum(q[i] * p[v], axis=-1)) for i in range(teachers) for v in range(views) if v != i])
  run = lambda student: float(
    distill.dino_loss(student, jnp.asarray(t, jnp.float32), center=jnp.asarray(c), student_temperature=0.2, teacher_temperature=0.07)
  )
  student = jnp.asarray(s, jnp.float32)
  assert run(student) == pytest.approx(wanted, rel=1e-5)
  shift = jnp.asarray(rng.normal(size=(views, batch, 1)), jnp.float32)
  assert run(student + shift) == pytest.approx(wanted, rel=1e-5)


def test_dino_loss_gradient_and_center_match_the_reference_over_three_calls():
  views, batch = int(DINO["ncrops"]), int(DINO["batch"])
  center = jnp.asarray(DINO["centre_before_first"])
  for i in range(3):
    student, teacher = (
      DINO["student_logits"][i].reshape(views, batch, -1),
      DINO["teacher_logits"][i].reshape(2, batch, -1),
    )
    loss, gradient = jax.value_and_grad(distill.dino_loss)(
      jnp.asarray(student),
      jnp.asarray(teacher),
      center=center,
      student_temperature=float(DINO["student_temp"]),
      teacher_temperature=float(DINO["teacher_temp"][i]),
    )
    np.testing.assert_allclose(loss, DINO["loss"][i], rtol=1e-5)
    np.testing.assert_allclose(gradient.reshape(views * batch, -1), DINO["grad_student_logits"][i], atol=1e-5)
    center = distill.update_center(center, teacher=jnp.asarray(teacher), momentum=float(DINO["centre_momentum"]))
    np.testing.assert_allclose(center, DINO["centre_after"][i], atol=1e-5)
