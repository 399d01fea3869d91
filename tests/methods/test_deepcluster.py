"""DeepCluster: clustering between epochs, what it resets and what it keeps, and its collapses."""

import dataclasses
import functools

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from big_ssl import setup
from big_ssl.core import health
from big_ssl.core.config import OptimConfig
from big_ssl.core.optim import make_optimizer
from big_ssl.core.types import Interval, TrainState, UserError
from big_ssl.evaluate import Extractor, refresh
from big_ssl.losses.cluster import IGNORE
from big_ssl.methods.deepcluster import DeepCluster, contiguous
from big_ssl.models.alexnet import AlexNet

N, D, K = 200, 16, 10


def make(**changes):
  model = AlexNet(widths=(4, 4, 4, 4, 4), fc=D, stem="cifar", sobel=True, image_size=32)
  fields = dict(model=model, num_examples=N, batch_size=20, total_steps=40, num_clusters=K, pca_dim=8, size=32)
  return DeepCluster(**fields | changes)


@functools.cache
def start(optimizer="sgd"):
  method = make()
  batch = {"crop": jnp.asarray(np.random.default_rng(0).normal(size=(20, 1, 32, 32, 3)), jnp.float32), "index": jnp.arange(20) * 3}
  params, extra = method.init(jax.random.key(0), batch)
  optim = OptimConfig(name=optimizer, lr=0.05, schedule="constant", weight_decay=1e-5)
  made = make_optimizer(optim, params=params, rules=method.param_rules(), total_steps=40, batch_size=20, examples=N)
  return TrainState(step=jnp.int32(0), params=params, opt_state=made.init(params), extra=extra), batch, made


def blobs(groups=K, seed=0):
  rng = np.random.default_rng(seed)
  return (4 * rng.normal(size=(groups, D))[rng.integers(0, groups, N)] + rng.normal(size=(N, D))).astype(np.float32)


def refreshed(method, features, *, key=1, state=None):
  state = start()[0] if state is None else state
  return method.refresh(state, lambda state, function, **_: np.array(features), jax.random.key(key))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clustering_draws_a_new_head_forgets_its_optimizer_state_and_keeps_the_body(optimizer):
  state, *_ = start(optimizer)
  state = state.replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
  new, _ = refreshed(make(), blobs(), state=state)
  assert engine.leaves_equal(new.params["encoder"], state.params["encoder"]) and int(new.step) == int(state.step)
  assert not np.array_equal(new.params["head"]["fc"]["kernel"], state.params["head"]["fc"]["kernel"])
  assert not np.any(new.params["head"]["fc"]["bias"]) and abs(float(jnp.std(new.params["head"]["fc"]["kernel"])) - 0.01) < 2e-3
  for slot, tree in new.opt_state.items():
    assert all(not np.any(x) for x in jax.tree.leaves(tree["head"])), slot
    assert engine.leaves_equal(tree["encoder"], state.opt_state[slot]["encoder"]), slot


def test_the_head_has_no_momentum_and_everything_is_decayed():
  state, _, optimizer = start()
  rules = {t.path: t.rule for t in optimizer.tensors}
  assert {r.weight_decay for r in rules.values()} == {1.0}
  assert all((r.momentum == 0) == path.startswith("head/") for path, r in rules.items())
  ones = jax.tree.map(jnp.ones_like, state.params)
  for step in range(3):
    state = dataclasses.replace(state, opt_state=optimizer.apply(state.params, ones, state.opt_state, jnp.int32(step)).opt_state)
  assert abs(float(state.opt_state["momentum"]["head"]["fc"]["bias"][0]) - 1) < 1e-3
  assert float(jax.tree.leaves(state.opt_state["momentum"]["encoder"])[0].ravel()[0]) > 2.6


def test_labels_are_the_clusters_of_the_images_and_the_classifier_reads_relu_of_the_clustered_features():
  method, (_, batch, _) = make(), start()
  new, _ = refreshed(method, blobs())
  out, _ = method.encoder.apply(
    {"params": new.params["encoder"], "batch_stats": new.extra["batch_stats"]},
    batch["crop"][:, 0],
    train=True,
    rngs={"dropout": jax.random.fold_in(jax.random.key(5), 1)},
    mutable=["batch_stats"],
  )
  head = new.params["head"]["fc"]
  assert np.any(out["pooled"] < 0)
  labels = new.extra["assignments"][np.asarray(batch["index"])]
  for relu in (True, False):
    read = np.maximum(out["pooled"], 0) if relu else np.asarray(out["pooled"])
    logits = read @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(20), labels])
    value = method.replace(relu=relu).loss(new.params, new.extra, batch, jax.random.key(5), jnp.int32(0))[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_training_draws_dropout_and_the_clustered_features_are_those_of_evaluation():
  method, (_, batch, _) = make(), start()
  new, _ = refreshed(method, blobs())
  losses = [float(method.loss(new.params, new.extra, batch, jax.random.key(k), jnp.int32(0))[0]) for k in (0, 0, 1)]
  assert losses[0] == losses[1] != losses[2]
  image = {"image": batch["crop"]}
  clustered = method.clustered_features(new.params, new.extra, image)
  np.testing.assert_array_equal(clustered, method.features(new.params, new.extra, image)["pooled"])
  assert np.any(clustered < 0)
  view = method.eval_view()
  assert view.crop == "center" and view.flip == 0 and len(view.augment) == 1 and view.center_fraction == 224 / 256


def test_planted_clusters_are_found_and_each_clustering_starts_from_other_images():
  truth = np.random.default_rng(3).integers(0, 5, N)
  x = (20 * np.eye(D)[truth] + np.random.default_rng(4).normal(size=(N, D))).astype(np.float32)
  first, metrics = refreshed(make(), x, key=1)
  labels = np.asarray(first.extra["assignments"])
  assert all(len(set(truth[labels == c])) == 1 for c in range(labels.max() + 1))  # K is twice the groups: each cluster is pure
  assert "nmi_previous" not in metrics and metrics["clusters"] == labels.max() + 1 and metrics["size_entropy"] > 0.8
  np.testing.assert_array_equal(first.extra["sizes"], np.bincount(labels, minlength=K))
  again, second = refreshed(make(), x, key=1, state=first)
  np.testing.assert_array_equal(again.extra["assignments"], labels)
  assert second["nmi_previous"] == pytest.approx(1)
  other, third = refreshed(make(), x, key=2, state=first)
  assert not np.array_equal(other.extra["assignments"], labels) and 0.5 < third["nmi_previous"] < 1


def test_clusters_without_members_are_closed_up_and_the_smallest_beyond_the_limit_lose_their_label():
  np.testing.assert_array_equal(contiguous(np.array([7, 2, 7, 4, 4, 4]), most=5), [2, 0, 2, 1, 1, 1])
  np.testing.assert_array_equal(contiguous(np.array([7, 2, 7, 4, 4, 4]), most=2), [1, IGNORE, 1, 0, 0, 0])


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_a_mesh_gives_the_same_assignments_as_one_device(devices):
  alone = refreshed(make(), blobs())[0].extra["assignments"]
  shape = (devices, 1, 1)
  mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(refreshed(make(), blobs())[0].extra["assignments"], alone)


def test_an_epoch_is_uniform_over_clusters_when_one_holds_nearly_all_images():
  method = make()
  labels = np.zeros(N, np.int32)
  labels[:9] = np.arange(1, 10)
  extra = {"assignments": labels}
  orders = [method.plan(extra, epoch, 0) for epoch in range(100)]
  counts = np.array([np.bincount(labels[o], minlength=K) for o in orders])
  # 21 draws of each of 10 clusters are shuffled and cut to 200: the share of each is hypergeometric.
  sigma = np.sqrt(200 * 0.1 * 0.9 * (10 / 209)) / np.sqrt(len(orders))
  assert np.all(np.abs(counts.mean(0) - 20) < 4 * sigma)
  assert all(len(o) == N for o in orders) and not np.array_equal(orders[0], orders[1])
  np.testing.assert_array_equal(method.plan(extra, 3, 0), orders[3])
  limited = make(max_repeats=2).plan(extra, 0, 0)
  assert np.bincount(limited).max() <= 2 and len(limited) == N
  assert method.plan(start()[0].extra, 0, 0) is None


def verdict(method, new):
  batch = start()[1]
  metrics = method.loss(new.params, new.extra, batch, jax.random.key(0), jnp.int32(0))[1][1]
  return health.judge({k: float(v) for k, v in metrics.items()}, thresholds=health.HealthConfig())


def test_one_cluster_that_takes_all_images_is_a_collapse_although_batches_are_balanced():
  method = make()
  new, _ = refreshed(method, blobs())
  assert verdict(method, new).state == "healthy"
  taken = np.zeros(N, np.int32)
  taken[0] = 1
  swallowed = new.replace(extra=new.extra | {"assignments": taken, "sizes": np.bincount(taken, minlength=K)})
  found = verdict(method, swallowed)
  assert found.state == "collapsed" and "one-prototype" in found.message


def test_constant_features_cluster_without_an_error_and_are_a_collapse():
  method = make()
  new, metrics = refreshed(method, np.full((N, D), 2.5, np.float32))
  assert metrics["clusters"] == 1 and metrics["size_entropy"] == 0
  assert verdict(method, new).state == "collapsed"
  silent = jax.tree.map(jnp.zeros_like, new.params["encoder"])
  found = verdict(method, refreshed(method, blobs())[0].replace(params=new.params | {"encoder": silent}))
  assert found.state == "collapsed" and "constant embedding" in found.message


def test_power_iteration_labels_the_largest_clusters_and_the_rest_is_neither_drawn_nor_counted():
  method = make(clustering="pic", iterations=50, num_clusters=3)
  x = (20 * np.eye(D)[np.arange(N) % 6] + np.random.default_rng(4).normal(size=(N, D))).astype(np.float32)
  state = start()[0]
  head = method.new_head(jax.random.key(0), D)
  state = state.replace(params=state.params | {"head": head}, opt_state={"momentum": state.opt_state["momentum"] | {"head": head}})
  new, metrics = refreshed(method, x, state=state)
  labels = new.extra["assignments"]
  assert metrics["clusters"] == 3 and metrics["unlabeled"] == np.mean(labels == IGNORE) > 0
  order = method.plan(new.extra, 0, 0)
  assert len(order) == N and np.all(labels[order] >= 0)
  batch = start()[1] | {"index": jnp.asarray(np.flatnonzero(labels == IGNORE)[:20])}
  loss = method.loss(new.params, new.extra, batch, jax.random.key(0), jnp.int32(0))[0]
  assert float(loss) == 0.0


def test_the_small_run_clusters_again_in_mid_training_and_a_repeated_clustering_is_bit_equal():
  run = setup.make_run(engine.small("deepcluster"), devices=jax.devices()[:1])
  assert list(run.method.refresh_steps()) == [0, 2, 5] and run.method.steps_per_epoch == 2.5
  extract, state = Extractor(run), run.initial_state()
  first, metrics = refresh(run, extract, state)
  again, _ = refresh(run, extract, state)
  assert engine.leaves_equal(first, again)
  assert set(metrics) >= {"refresh/objective", "refresh/clusters", "refresh/size_entropy", "refresh/repeats"}
  assert np.asarray(first.extra["assignments"]).min() >= 0


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"num_clusters": 201}, "num_clusters=201: more than the 200 training images"),
    ({"pca_dim": 17}, "pca_dim=17: at most 16 are possible with 16 features of 200 images"),
    ({"num_examples": 12, "pca_dim": 12}, "pca_dim=12: at most 11"),
  ],
)
def test_sizes_that_the_data_do_not_allow_are_clear_errors_before_the_start(changes, message):
  for call in (make(**changes).refresh_memory, lambda: refreshed(make(**changes), blobs())):
    with pytest.raises(UserError, match=message):
      call()


@pytest.mark.parametrize("field,value", [("num_clusters", 1), ("pca_dim", 0), ("iterations", 0), ("max_repeats", -1), ("mean", (0.5,))])
def test_impossible_options_are_clear_errors(field, value):
  with pytest.raises(UserError, match=f"config.method.{field}="):
    make(**{field: value})


def test_features_that_are_not_finite_name_the_image():
  x = blobs()
  x[17, 3] = np.nan
  with pytest.raises(UserError, match="the features of image 17 are not finite"):
    refreshed(make(), x)


def test_reassign_sets_the_steps_and_the_stated_memory_grows_with_the_features():
  assert list(make(reassign=Interval(2, "epochs")).refresh_steps()) == [0, 20]
  memory = make().refresh_memory()
  assert memory["features in host memory"] == 4 * N * D and set(memory) > {"k-means on each device"}
  assert "the graph of neighbors in host memory" in make(clustering="pic").refresh_memory()


def test_probes_read_the_maps_after_relu_averaged_in_windows():
  method, (state, batch, _) = make(), start()
  out = method.features(state.params, state.extra, {"image": batch["crop"]})
  assert set(out) == {"pooled", "relu", *(f"conv{i}" for i in range(1, 6))}
  np.testing.assert_array_equal(out["relu"], np.maximum(out["pooled"], 0))
  variables = {"params": state.params["encoder"], "batch_stats": state.extra["batch_stats"]}
  stage = np.asarray(method.encoder.apply(variables, batch["crop"][:, 0], train=False)["stages"][1])  # conv2: 4/4, no padding
  side = stage.shape[1] // 4
  windows = stage[:, : 4 * side, : 4 * side].reshape(20, side, 4, side, 4, 4).mean((2, 4))
  np.testing.assert_allclose(out["conv2"], windows.transpose(0, 3, 1, 2).reshape(20, -1), rtol=1e-5, atol=1e-6)
