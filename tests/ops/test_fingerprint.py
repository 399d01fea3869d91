"""Names of trees: equal for equal bits on any mesh, others for any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.ops.fingerprint import fingerprint

TREE = {"a": np.arange(48, dtype=np.float32).reshape(8, 6), "b": [np.array([True, False]), np.int32(-3)]}


def test_the_sharding_changes_nothing(mesh8):
  expected = fingerprint(TREE)
  place = {"a": P(("data", "fsdp")), "b": [P(), P()]}
  spread = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh8, s)), TREE, place)
  assert fingerprint(spread, mesh=mesh8) == expected == fingerprint(jax.tree.map(jnp.asarray, TREE))


@pytest.mark.parametrize(
  "change",
  [
    lambda t: t | {"a": np.where(t["a"] == 17, np.nextafter(t["a"], np.float32(99)), t["a"])},
    lambda t: t | {"a": t["a"][::-1].copy()},
    lambda t: t | {"a": t["a"].reshape(6, 8)},
    lambda t: t | {"a": t["a"].astype(np.float16)},
    lambda t: {"c": t["a"], "b": t["b"]},
    lambda t: t | {"b": [~t["b"][0], t["b"][1]]},
    lambda t: t | {"a": np.where(t["a"] == 0, -0.0, t["a"]).astype(np.float32)},
    lambda t: t | {"d": jax.random.key(0)},
  ],
)
def test_any_change_of_bits_order_shape_dtype_or_name_gives_another(change):
  assert fingerprint(change(TREE)) != fingerprint(TREE)


def test_keys_and_empty_trees_have_names():
  assert fingerprint({"k": jax.random.key(0)}) != fingerprint({"k": jax.random.key(1)})
  assert len(fingerprint({})) == 16
