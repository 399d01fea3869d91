"""Random dropping of patches: how many stay, and that they are drawn evenly."""

import jax
import numpy as np
import pytest

from big_ssl.augment.masking import keep_indices
from big_ssl.core.types import UserError


@pytest.mark.parametrize(
  "tokens,ratio,kept", [(196, 0.15, 166), (196, 0.7, 58), (10, 0.9, 1), (7, 0.0, 7), (100, 0.3, 70)]
)
def test_the_floor_of_the_kept_share_stays(tokens, ratio, kept):
  indices = np.asarray(keep_indices(jax.random.key(0), tokens=tokens, ratio=ratio))
  assert indices.shape == (kept,) and indices.dtype == np.int32
  assert len(set(indices.tolist())) == kept and indices.min() >= 0 and indices.max() < tokens


def test_a_batch_gets_one_set_per_image_and_keys_differ():
  per_image = np.asarray(keep_indices(jax.random.key(0), tokens=50, ratio=0.5, batch=6))
  assert per_image.shape == (6, 25)
  sets = {tuple(sorted(row)) for row in per_image.tolist()}
  assert len(sets) == 6 and all(len(set(s)) == 25 for s in sets)
  larger = np.asarray(keep_indices(jax.random.key(0), tokens=50, ratio=0.5, batch=9))
  np.testing.assert_array_equal(larger[:6], per_image)  # a set belongs to its row
  shared = [set(np.asarray(keep_indices(jax.random.key(k), tokens=50, ratio=0.5)).tolist()) for k in (1, 2)]
  assert shared[0] != shared[1]


def test_every_token_stays_equally_often():
  n = 4000
  kept = np.asarray(jax.jit(lambda k: keep_indices(k, tokens=9, ratio=0.5, batch=n))(jax.random.key(0)))
  rate = np.bincount(kept.ravel(), minlength=9) / n
  np.testing.assert_allclose(rate, 4 / 9, atol=4 * np.sqrt(4 / 9 * 5 / 9 / n))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_outside_is_an_error(ratio):
  with pytest.raises(UserError, match="ratio"):
    keep_indices(jax.random.key(0), tokens=9, ratio=ratio)


def test_dropping_everything_is_an_error_that_says_how_much_can_go():
  with pytest.raises(UserError, match="leaves none; at most 0.75"):
    keep_indices(jax.random.key(0), tokens=4, ratio=0.9)
