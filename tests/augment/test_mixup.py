"""Mixup: the distribution of its share, the partners, and labels that are mixed like the images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import mixup
from big_ssl.losses import classify


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_share_is_the_larger_part_of_a_symmetric_beta(alpha):
  keys = jax.random.split(jax.random.key(0), 20_000)
  shares = np.asarray(jax.vmap(functools.partial(mixup.draw, alpha=alpha))(keys))
  assert shares.dtype == np.float32 and shares.min() >= 0.5 and shares.max() <= 1
  # max(b, 1 - b) = 1/2 + |b - 1/2|, whose square has the variance of Beta(alpha, alpha) as its mean.
  assert np.mean((shares - 0.5) ** 2) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.02)
  if alpha == 1:
    assert np.quantile(shares, [0.25, 0.5, 0.75]) == pytest.approx([0.625, 0.75, 0.875], abs=0.01)


def test_the_partner_is_the_row_before():
  x = np.arange(12, dtype=np.float32).reshape(3, 2, 2) ** 2
  mixed = mixup.mix(jnp.asarray(x), share=jnp.float32(0.75))
  np.testing.assert_allclose(mixed, [0.75 * x[i] + 0.25 * x[i - 1] for i in range(3)])
  np.testing.assert_array_equal(mixup.mix(jnp.asarray(x), share=jnp.float32(1)), x)


@pytest.mark.parametrize("loss", [classify.cross_entropy, classify.sigmoid_cross_entropy])
def test_the_mixed_loss_is_the_loss_on_mixed_targets(loss):
  rng = np.random.default_rng(0)
  logits, labels, share = rng.normal(size=(6, 5)).astype(np.float32), rng.integers(0, 5, 6), 0.7
  targets = np.asarray(mixup.mix(jnp.asarray(0.9 * np.eye(5)[labels] + 0.1 / 5), share=share))
  if loss is classify.cross_entropy:
    expected = -np.mean(np.sum(targets * np.asarray(jax.nn.log_softmax(logits)), axis=1))
  else:
    p = 1 / (1 + np.exp(-logits))
    expected = -np.mean(np.sum(targets * np.log(p) + (1 - targets) * np.log(1 - p), axis=1))
  on = lambda y: loss(jnp.asarray(logits), labels=y, label_smoothing=0.1)
  assert float(mixup.mixed_loss(on, labels=jnp.asarray(labels), share=share)) == pytest.approx(expected, rel=1e-5)
