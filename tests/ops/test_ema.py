"""The moving average of a tree, and unit vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.ops.ema import ema
from big_ssl.ops.normalize import l2_normalize


def test_average_of_a_tree_in_float32():
  old, new = {"a": jnp.full(3, 2.0), "b": [jnp.ones(2)]}, {"a": jnp.full(3, 4.0, jnp.bfloat16), "b": [jnp.zeros(2)]}
  out = jax.jit(ema)(old, new, 0.75)
  np.testing.assert_allclose(out["a"], 2.5)
  np.testing.assert_allclose(out["b"][0], 0.75)
  assert out["a"].dtype == jnp.float32


def test_ends_and_unchanged_leaves_are_exact():
  x, y = jax.random.normal(jax.random.key(0), (2, 50))
  assert bool((ema(x, x, 0.9731) == x).all()) and bool((ema(x, y, 1.0) == x).all())
  np.testing.assert_allclose(ema(x, y, 0.0), y, atol=1e-6)


def test_a_high_momentum_still_moves_a_half_precision_teacher():
  teacher = ema(jnp.ones(1, jnp.bfloat16), jnp.full(1, 2.0, jnp.bfloat16), 0.9996)
  assert float(teacher[0]) == pytest.approx(1.0004, abs=1e-6)


def test_trees_of_different_structure_are_an_error():
  with pytest.raises(ValueError):
    ema({"a": jnp.ones(1)}, {"b": jnp.ones(1)}, 0.5)


def test_unit_vectors_and_a_harmless_gradient_at_zero():
  x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [3e-8, 4e-8]])
  np.testing.assert_allclose(l2_normalize(x), [[0.6, 0.8], [0, 0], [0.6, 0.8]], rtol=1e-6)
  assert float(jnp.abs(jax.jacobian(lambda v: l2_normalize(v))(jnp.zeros(2))).max()) == 1.0
