"""Mixup and cutmix: the distribution of their shares, the boxes, the partners, and labels that are mixed like the images."""

import dataclasses
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


@functools.partial(jax.jit, static_argnames="size")
def masks(alpha, *, size):
  keys = jax.random.split(jax.random.key(1), 4000)
  return jax.vmap(lambda k: mixup.cut_mask(k, alpha=alpha, size=size)[..., 0])(keys)


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_a_cut_is_one_box_about_an_even_center_clipped_by_the_image(alpha):
  found = np.asarray(masks(alpha, size=(24, 16)))
  assert set(np.unique(found)) == {0.0, 1.0}
  rows, columns = (found == 0).any(2), (found == 0).any(1)
  np.testing.assert_array_equal(found == 0, rows[:, :, None] & columns[:, None, :])  # a product of ranges
  for along in (rows, columns):
    assert np.all(np.abs(np.diff(np.pad(along, ((0, 0), (1, 1))).astype(int))).sum(1) <= 2)  # of one interval
  # The areas of the same definition, drawn with numpy.
  rng = np.random.default_rng(0)
  side = np.sqrt(1 - rng.beta(alpha, alpha, 200_000))
  area = 1.0
  for n in (24, 16):
    center, half = rng.integers(0, n, side.size), (n * side).astype(int) // 2
    area = area * (np.clip(center + half, 0, n) - np.clip(center - half, 0, n)) / n
  got = (found == 0).mean((1, 2))
  assert got.mean() == pytest.approx(area.mean(), abs=0.01) and got.std() == pytest.approx(area.std(), abs=0.006)


@pytest.fixture
def plain_draws(monkeypatch):
  """Shares and boxes that tell which alpha they belong to; the draws themselves are tested above."""
  monkeypatch.setattr(mixup, "draw", lambda key, *, alpha: jnp.float32(alpha))
  box = lambda alpha, size: jnp.ones((*size, 1)).at[: int(10 * alpha), :3].set(0.0)
  monkeypatch.setattr(mixup, "cut_mask", lambda key, *, alpha, size: box(alpha, size))


def test_the_share_of_the_label_is_the_exact_area_and_the_switch_chooses(plain_draws):
  keys = jax.random.split(jax.random.key(2), 2000)
  draw = lambda **k: jax.jit(jax.vmap(lambda key: dataclasses.astuple(mixup.draw_mixture(key, size=(8, 12), **k))))(keys)
  for switch in (0.5, 0.2):
    mask, share = map(np.asarray, draw(mixup=0.8, cutmix=0.4, switch=switch))
    assert mask.shape == (2000, 8, 12, 1)
    np.testing.assert_allclose(share, mask.mean((1, 2, 3)), atol=2e-7)
    cut = np.isclose(share, 1 - 4 * 3 / 96)
    assert np.all(np.isclose(share[~cut], 0.8)) and cut.mean() == pytest.approx(switch, abs=0.04)


def test_one_alpha_alone_has_no_switch(plain_draws):
  key = jax.random.key(3)
  even = mixup.draw_mixture(key, mixup=0.8, cutmix=0.0, switch=1.0, size=(4, 4))
  assert np.all(even.mask == even.share) and float(even.share) == pytest.approx(0.8)
  cut = mixup.draw_mixture(key, mixup=0.0, cutmix=0.2, switch=0.0, size=(4, 4))
  assert set(np.unique(cut.mask)) == {0.0, 1.0} and float(cut.share) == 1 - 6 / 16


def test_a_mask_mixes_pixel_by_pixel():
  x = jnp.arange(2 * 3 * 3 * 2, dtype=jnp.float32).reshape(2, 3, 3, 2)
  mask = jnp.zeros((3, 3, 1)).at[1].set(1.0)
  mixed = mixup.mix(x, share=mask)
  np.testing.assert_array_equal(mixed[0, 1], x[0, 1])
  np.testing.assert_array_equal(mixed[:, 0], x[::-1, 0])
