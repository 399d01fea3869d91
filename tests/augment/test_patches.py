"""Patches and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import patches
from big_ssl.core.types import UserError


def test_a_patch_is_read_row_column_channel_and_back():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8, 12, 3)))
  cut = patches.patchify(images, 4)
  assert cut.shape == (2, 3, 2, 3, 48)
  np.testing.assert_array_equal(cut[1, 2, 1, 2], images[1, 2, 4:8, 8:12].reshape(-1))
  np.testing.assert_array_equal(patches.unpatchify(cut, 4), images)


def test_a_remainder_is_cut_off_and_too_small_an_image_refused():
  images = jnp.arange(2.0 * 9 * 5 * 1).reshape(2, 9, 5, 1)
  np.testing.assert_array_equal(patches.patchify(images, 4), patches.patchify(images[:, :8, :4], 4))
  with pytest.raises(UserError, match="config.model.patch=10: the images are 9x5"):
    patches.patchify(images, 10)


def test_packing_gathers_inside_each_shard_and_padding_is_black():
  images = jnp.arange(1.0, 1 + 4 * 4 * 4).reshape(4, 4, 4, 1)  # two shards of two images, grids of 2x2 patches of 2
  as_int = lambda *v: jnp.array(v, jnp.int32)
  plan = {
    "image": as_int([0, 1, -1], [1, 1, 0]),
    "segment": as_int([0, 1, -1], [0, 0, 1]),
    "y": as_int([1, 0, 0], [0, 1, 0]),
    "x": as_int([0, 1, 0], [0, 1, 1]),
    "grid": jnp.full((2, 2, 2), 2, jnp.int32),
    "row": as_int(0, 0, 0, 0),
    "slot": as_int(0, 1, 1, 0),
    "shard": jnp.zeros(2),
  }
  packed = patches.pack_native(images, plan, patch=2)
  cut = patches.patchify(images, 2)
  wanted = [[cut[0, 1, 0], cut[1, 0, 1], jnp.zeros(4)], [cut[3, 0, 0], cut[3, 1, 1], cut[2, 0, 1]]]
  np.testing.assert_array_equal(packed.patches, jnp.stack([jnp.stack(row) for row in wanted]))
  features = jnp.arange(4.0).reshape(2, 2, 1)
  np.testing.assert_array_equal(patches.unpack_images(features, plan)[:, 0], [0, 1, 3, 2])
  np.testing.assert_allclose(patches.padding(packed.segment), 1 / 6)
  with pytest.raises(UserError, match="does not fit 3 images"):
    patches.pack_native(images[:3], plan, patch=2)
