"""Which reference patch lies under a query patch: against the canvas of the definition, built in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment.correspondence import patch_positions


def nearest(array, shape):
  """Nearest resize of the first two axes, half-pixel centers, float32 as in TensorFlow."""
  for axis, size in enumerate(shape):
    scale = np.float32(array.shape[axis]) / np.float32(size)
    index = np.floor((np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale).astype(int)
    array = np.take(array, np.minimum(index, array.shape[axis] - 1), axis)
  return array


def by_canvas(image, reference, query, flip, *, grid, size, patch):
  canvas = np.full(image, -1)
  y, x, height, width = reference
  canvas[y : y + height, x : x + width] = nearest(np.arange(grid[0] * grid[1]).reshape(grid), (height, width))
  y, x, height, width = query
  cut = nearest(nearest(canvas[y : y + height, x : x + width], size), (size[0] // patch, size[1] // patch))
  return cut[:, :: -1 if flip else 1].ravel()


def box(rng, image):
  sides = [rng.integers(2, n + 1) for n in image]
  return [*(rng.integers(0, n - side + 1) for n, side in zip(image, sides, strict=True)), *sides]


@pytest.mark.parametrize("grid,size,patch", [((14, 14), (224, 224), 16), ((14, 14), (96, 96), 16), ((7, 5), (24, 40), 8)])
def test_the_lookups_are_those_of_the_canvas(grid, size, patch):
  rng = np.random.default_rng(0)
  options = {"grid": grid, "size": size, "patch": patch}
  find = jax.jit(functools.partial(patch_positions, **options))
  images = rng.integers(30, 500, (40, 2))
  references, flips = [box(rng, i) for i in images], rng.random((40, 3)) < 0.5
  queries = [[box(rng, i) for _ in range(3)] for i in images]
  found = find(jnp.asarray(references, jnp.float32), jnp.asarray(queries, jnp.float32), jnp.asarray(flips))
  assert found.dtype == jnp.int32
  for row in range(40):
    for v in range(3):
      wanted = by_canvas(images[row], references[row], queries[row][v], flips[row, v], **options)
      assert np.array_equal(found[row, v], wanted), (row, v)


def test_a_center_on_the_border_of_two_samples_goes_where_tensorflow_goes():
  """3.5 * fl(62 / 7) is below 31, so TensorFlow's nearest shows row 30; so it does on the device."""
  assert np.floor(np.float32(3.5) * (np.float32(62) / np.float32(7))) == 30
  found = jax.jit(functools.partial(patch_positions, grid=(62, 62), size=(7, 7), patch=1))(
    jnp.array([[0.0, 0.0, 62.0, 62.0]]), jnp.array([[[0.0, 0.0, 62.0, 62.0]]]), jnp.array([[False]])
  )
  assert found[0, 0].reshape(7, 7)[3, 3] == 30 * 62 + 30


def test_the_reference_in_itself_is_the_identity_and_a_flip_mirrors_it():
  boxes = jnp.array([[5.0, 9.0, 140.0, 98.0]])
  find = functools.partial(patch_positions, boxes, boxes[:, None], grid=(7, 7), size=(56, 56), patch=8)
  grid = np.arange(49).reshape(7, 7)
  assert np.array_equal(find(jnp.array([[False]]))[0, 0], grid.ravel())
  assert np.array_equal(find(jnp.array([[True]]))[0, 0], grid[:, ::-1].ravel())
