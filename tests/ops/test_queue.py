"""Queues: order, wrapping, first filling, no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.ops import queue as queue_lib


def batch(i, rows=2):
  return jnp.full((rows, 3), float(i))


def test_push_keeps_the_newest_first_and_drops_the_oldest():
  queue = jnp.zeros((6, 3))
  for i in (1, 2, 3, 4):
    queue = jax.jit(queue_lib.push)(queue, batch(i))
  np.testing.assert_array_equal(queue[:, 0], [4, 4, 3, 3, 2, 2])


def test_a_pushed_queue_is_filled_exactly_when_its_last_row_has_come():
  queue, seen = jnp.zeros((6, 3)), []
  for i in (1, 2, 3):
    seen.append(bool(queue_lib.filled(queue)))
    queue = queue_lib.push(queue, batch(i))
  assert seen == [False, False, False] and bool(queue_lib.filled(queue))


def test_the_ring_overwrites_the_oldest_in_place_and_wraps():
  ring = queue_lib.ring(jnp.zeros((6, 3)))
  for i in (1, 2, 3, 4):
    ring = jax.jit(queue_lib.write)(ring, batch(i))
  np.testing.assert_array_equal(ring.rows[:, 0], [4, 4, 2, 2, 3, 3])
  assert int(ring.pointer) == 2


def test_both_layouts_hold_the_same_rows():
  pushed, ring = jnp.zeros((6, 3)), queue_lib.ring(jnp.zeros((6, 3)))
  for i in range(1, 6):
    pushed, ring = queue_lib.push(pushed, batch(i)), queue_lib.write(ring, batch(i))
  np.testing.assert_array_equal(np.sort(pushed, axis=0), np.sort(ring.rows, axis=0))


@pytest.mark.parametrize("layout", ["push", "ring"])
def test_no_gradient_reaches_the_rows(layout):
  def total(rows):
    if layout == "push":
      return jnp.sum(queue_lib.push(jnp.zeros((6, 3)), rows) ** 2)
    return jnp.sum(queue_lib.write(queue_lib.ring(jnp.zeros((6, 3))), rows).rows ** 2)

  assert not np.any(jax.grad(total)(batch(2)))


def test_impossible_sizes_are_errors():
  with pytest.raises(ValueError, match="8 rows do not fit"):
    queue_lib.push(jnp.zeros((6, 3)), batch(1, rows=8))
  with pytest.raises(ValueError, match="not a multiple of the 4"):
    queue_lib.write(queue_lib.ring(jnp.zeros((6, 3))), batch(1, rows=4))


@pytest.mark.parametrize("length,near", [(100, "nearest: 64 or 128"), (32, "nearest: 64")])
def test_a_length_that_is_no_multiple_of_the_batch_names_the_nearest(length, near):
  with pytest.raises(UserError, match=f"config.method.queue_length={length}.*batch_size=64; {near}"):
    queue_lib.check_length(length, batch_size=64, path="config.method.queue_length")
  queue_lib.check_length(128, batch_size=64, path="config.method.queue_length")
