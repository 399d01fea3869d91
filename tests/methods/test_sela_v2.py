"""SeLa-v2: equal partitions of the data set as labels, prototypes that are trained."""

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from big_ssl.core import health
from big_ssl.core.types import Interval, TrainState, UserError
from big_ssl.methods.sela_v2 import SeLaV2
from big_ssl.models.vit import ViT
from big_ssl.ops.normalize import l2_normalize


@pytest.fixture(scope="module")
def tiny():
  model = ViT(variant="custom", width=24, depth=1, heads=2, mlp_dim=48, patch=8, image_size=32)
  sizes = dict(large_size=32, small_size=16, small_crops=1, hidden_dim=16, output_dim=8)
  method = SeLaV2(model=model, total_steps=9, batch_size=4, num_examples=61, num_prototypes=(5, 4), max_sweeps=200, **sizes)
  rng = np.random.default_rng(0)
  shapes = {"large": (4, 2, 32, 32, 3), "small": (4, 1, 16, 16, 3)}
  batch = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()} | {"index": jnp.array([9, 2, 12, 0])}
  params, extra = method.init(jax.random.key(0), batch)
  # One direction that all images like: without balance one cluster would take nearly all.
  offset = 2 * params["prototypes"]["head0"][0]
  bank = l2_normalize(jax.random.normal(jax.random.key(3), (61, 2, 8)) + offset).at[jnp.array([7, 30])].set(0.0)
  return method, batch, TrainState(step=jnp.int32(0), params=params, opt_state={}, extra=extra | {"bank": bank})


def no_pass(*args, **kwargs):
  raise AssertionError("the memory is not empty: no pass over the data")


def test_labels_are_an_equal_partition_that_the_nearest_prototype_is_not(tiny):
  method, _, state = tiny
  new, metrics = method.refresh(state, no_pass, jax.random.key(0))
  labels, bank = new.extra["assignments"], np.asarray(state.extra["bank"])
  seen = np.setdiff1d(np.arange(61), [7, 30])
  assert (labels[[7, 30]] == -100).all() and not np.any(new.extra["bank"])
  for h, count in enumerate(method.num_prototypes):
    sizes = np.bincount(labels[seen, h], minlength=count)
    assert np.abs(sizes - 59 / count).max() <= 3, sizes
    assert metrics[f"head{h}/transport_error"] <= method.tolerance and metrics[f"head{h}/empty_clusters"] == 0
  nearest = np.argmax(bank[seen, 0] @ np.asarray(state.params["prototypes"]["head0"]).T, axis=1)
  assert np.bincount(nearest).max() > 25
  assert "prototypes" not in new.extra and new.params is state.params  # learned, never overwritten


def test_labels_see_unit_prototypes_and_do_not_depend_on_the_devices(tiny):
  method, _, state = tiny
  alone, _ = method.refresh(state, no_pass, jax.random.key(0))
  long = state.replace(params=state.params | {"prototypes": jax.tree.map(lambda x: 5 * x, state.params["prototypes"])})
  np.testing.assert_array_equal(method.refresh(long, no_pass, jax.random.key(0))[0].extra["assignments"], alone.extra["assignments"])
  mesh = jax.make_mesh((4, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    placed = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    split, _ = method.refresh(placed, no_pass, jax.random.key(0))
  np.testing.assert_array_equal(split.extra["assignments"], alone.extra["assignments"])


def test_transport_options_reach_the_solver(tiny):
  method, _, state = tiny
  sweeps = lambda m: m.refresh(state, no_pass, jax.random.key(0))[1]["head0/sweeps"]
  assert sweeps(method.replace(max_sweeps=1)) == 1
  assert sweeps(method.replace(tolerance=1e-6, max_sweeps=500)) > sweeps(method)
  loose, _ = method.replace(epsilon=1.0).refresh(state, no_pass, jax.random.key(0))
  assert not np.array_equal(loose.extra["assignments"], method.refresh(state, no_pass, jax.random.key(0))[0].extra["assignments"])


def test_prototypes_get_a_gradient_and_are_frozen_at_the_start(tiny):
  method, batch, state = tiny
  labeled, _ = method.refresh(state, no_pass, jax.random.key(0))
  extra = jax.tree.map(jnp.asarray, labeled.extra)
  grads = jax.jit(jax.grad(lambda p: method.loss(p, extra, batch, jax.random.key(1), state.step)[0]))(state.params)
  assert all(np.any(g) for g in grads["prototypes"].values())
  rule = method.replace(freeze_prototypes=Interval(7, "steps")).param_rules()[0]
  assert rule.pattern == "^prototypes/" and rule.freeze_until == Interval(7, "steps")
  long = {"head0": 3 * state.params["prototypes"]["head0"]}
  np.testing.assert_allclose(method.project({"prototypes": long})["prototypes"]["head0"], long["head0"] / 3, atol=1e-6)


def test_equal_embeddings_are_judged_a_collapse_though_their_labels_are_an_equal_partition(tiny):
  method, batch, state = tiny
  extra = jax.tree.map(jnp.asarray, method.refresh(state, no_pass, jax.random.key(0))[0].extra)
  same = {k: jnp.broadcast_to(v[:1, :1, :1, :1], v.shape) for k, v in batch.items() if k != "index"} | {"index": batch["index"]}
  judge = lambda images: health.judge(
    {k: float(v) for k, v in engine.loss(method)(state.params, extra, images, jax.random.key(1), state.step)[1][1].items()},
    thresholds=health.HealthConfig(),
  )
  verdict = judge(same)
  assert verdict.state == "collapsed" and "constant embedding" in verdict.message
  assert judge(batch).state != "collapsed"


def test_a_repeated_refresh_gives_the_same_state(tiny):
  method, _, state = tiny
  first, again = (method.refresh(state, no_pass, jax.random.key(i))[0].extra for i in (0, 1))  # no draw is made
  np.testing.assert_array_equal(first["assignments"], again["assignments"])


def test_more_clusters_than_images_are_refused_before_the_start(tiny):
  method = tiny[0]
  with pytest.raises(UserError, match=r"num_prototypes=\(5, 62\): more clusters than the 61"):
    method.replace(num_prototypes=(5, 62)).refresh_memory()
  assert method.refresh_memory()["the transport of a head, over all devices"] == 16 * 61 * 5


@pytest.mark.parametrize("field", ["epsilon", "tolerance", "max_sweeps"])
def test_impossible_options_are_clear_errors(tiny, field):
  with pytest.raises(UserError, match=f"{field}=0"):
    tiny[0].replace(**{field: 0})
