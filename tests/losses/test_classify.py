"""Classification losses against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.losses.classify import accuracy, cross_entropy, sigmoid_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_its_definition_with_smoothed_one_hot_targets(smoothing):
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(9, 5)).astype(np.float32), rng.integers(0, 5, 9)
  target = np.eye(5)[labels] * (1 - smoothing) + smoothing / 5
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  loss, gradient = jax.value_and_grad(cross_entropy)(
    jnp.asarray(logits), labels=jnp.asarray(labels), label_smoothing=smoothing
  )
  assert float(loss) == pytest.approx(-np.mean(np.sum(target * log_p, 1)), rel=1e-5)
  np.testing.assert_allclose(gradient, (np.exp(log_p) - target) / 9, atol=1e-6)


def test_cross_entropy_of_huge_bfloat16_logits_is_finite_and_in_float32():
  loss = cross_entropy(jnp.asarray([[3e4, -3e4]], jnp.bfloat16), labels=jnp.asarray([1]))
  assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(6e4, rel=0.01)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_cross_entropy_equals_its_definition_summed_over_classes(smoothing):
  rng = np.random.default_rng(1)
  logits, labels = rng.normal(size=(9, 5)).astype(np.float32), rng.integers(0, 5, 9)
  labels[3] = -1
  target, p = np.eye(5)[labels] * (1 - smoothing) + smoothing / 5, 1 / (1 + np.exp(-logits.astype(np.float64)))
  rows = -np.sum(target * np.log(p) + (1 - target) * np.log(1 - p), axis=1)
  loss, gradient = jax.value_and_grad(sigmoid_cross_entropy)(
    jnp.asarray(logits), labels=jnp.asarray(labels), label_smoothing=smoothing
  )
  assert float(loss) == pytest.approx(np.mean(np.delete(rows, 3)), rel=1e-5)
  np.testing.assert_allclose(gradient, (p - target) / 8 * (labels >= 0)[:, None], atol=1e-6)
  assert np.isfinite(sigmoid_cross_entropy(jnp.asarray([[3e4, -3e4]], jnp.bfloat16), labels=jnp.asarray([1])))


def test_accuracy_is_the_share_of_hits_and_the_first_of_equals_counts():
  logits = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [2.0, 2.0]])
  assert float(accuracy(logits, labels=jnp.asarray([0, 0, 0, 1]))) == 0.5


def test_rows_without_a_label_are_left_out_and_get_no_gradient():
  logits = jax.random.normal(jax.random.key(0), (4, 3))
  labels, some = jnp.asarray([2, -1, 0, -1]), jnp.asarray([0, 2])
  value, gradient = jax.value_and_grad(lambda x: cross_entropy(x, labels=labels, label_smoothing=0.1))(logits)
  assert float(value) == pytest.approx(float(cross_entropy(logits[some], labels=labels[some], label_smoothing=0.1)), rel=1e-6)
  assert not np.any(gradient[1::2]) and np.all(gradient[::2])
  assert float(accuracy(logits, labels=labels)) == float(accuracy(logits[some], labels=labels[some]))
  assert float(cross_entropy(logits, labels=jnp.full(4, -1))) == 0 == float(accuracy(logits, labels=jnp.full(4, -1)))
