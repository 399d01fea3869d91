"""Augmenting a batch: every image has its own numbers, wherever and with whomever it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment.apply import augment_views, validate
from big_ssl.augment.photometric import ColorJitter, GaussianBlur, Grayscale, Normalize
from big_ssl.core.method import View
from big_ssl.core.types import UserError

OPS = (ColorJitter(), Grayscale(), GaussianBlur(), Normalize())
VIEWS = (
  View(name="a", size=8, count=2, augment=OPS),
  View(name="b", size=6, count=3, augment=OPS),
  View(name="plain", size=4),
)
KEY = jax.random.key(0)
run = jax.jit(lambda cut, key, row: augment_views(VIEWS, cut, key, row=row))


def pictures(batch, seed=0):
  rng = np.random.default_rng(seed)
  return {v.name: jnp.asarray(rng.uniform(size=(batch, v.count, *v.shape, 3)), jnp.float32) for v in VIEWS}


def test_shapes_stay_and_a_view_without_operations_passes_unchanged():
  cut = pictures(4)
  got = run(cut, KEY, jnp.arange(4))
  assert {k: (v.shape, v.dtype) for k, v in got.items()} == {k: (v.shape, jnp.float32) for k, v in cut.items()}
  np.testing.assert_array_equal(got["plain"], cut["plain"])


def test_a_batch_in_two_halves_gets_the_same_numbers():
  cut = pictures(4)
  whole = run(cut, KEY, jnp.arange(4))
  halves = [run({k: v[s] for k, v in cut.items()}, KEY, jnp.arange(4)[s]) for s in (slice(0, 2), slice(2, 4))]
  for name, value in whole.items():
    np.testing.assert_allclose(np.concatenate([h[name] for h in halves]), value, atol=1e-5)


def test_a_sharded_batch_gets_the_same_numbers():
  devices = jax.devices()[:2]
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  cut = pictures(4)
  sharded = run(jax.device_put(cut, sharding), KEY, jax.device_put(jnp.arange(4), sharding))
  for name, value in run(cut, KEY, jnp.arange(4)).items():
    np.testing.assert_allclose(sharded[name], value, atol=1e-5)


def test_rows_copies_views_and_keys_all_draw_differently():
  image = pictures(1)["a"][0, 0]
  ops = (GaussianBlur(p=1.0),)
  views = (View(name="a", size=8, count=2, augment=ops), View(name="b", size=8, count=2, augment=ops))
  cut = {v.name: jnp.broadcast_to(image, (2, 2, 8, 8, 3)) for v in views}
  together = jax.jit(lambda key: augment_views(views, cut, key, row=jnp.arange(2)))
  got = [together(jax.random.key(k)) for k in range(2)]
  flat = np.stack([np.asarray(g[n]).reshape(4, -1) for g in got for n in ("a", "b")]).reshape(16, -1)
  apart = np.abs(flat[:, None] - flat[None]).max(-1)
  assert apart[np.triu_indices(16, 1)].min() > 1e-6


def test_validate_names_the_view_and_the_operation():
  validate(VIEWS, 3)
  validate(VIEWS, 1)
  with pytest.raises(UserError, match="view 'a': ColorJitter"):
    validate(VIEWS, 4)
