"""DeepCluster-v2: the memory, the clustering of an epoch and the loss on its labels."""

import ast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core import health
from big_ssl.core.types import Interval, TrainState, UserError
from big_ssl.methods.deepcluster_v2 import DeepClusterV2
from big_ssl.models.vit import ViT
from big_ssl.ops.kmeans import spherical_kmeans
from big_ssl.ops.normalize import l2_normalize


class GivenRows:
  """A generator whose `choice` returns recorded rows."""

  def __init__(self, rows):
    self._rows = iter(rows)

  def choice(self, count, size, replace):
    del count, size, replace
    return next(self._rows)


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
def test_labels_and_centroids_are_the_official_ones(golden, iterations):
  """Through the method: head h from crop h mod 2, centroids as prototypes, -100 for images that are not in the memory."""
  z = golden("deepclusterv2_kmeans")
  counts = tuple(int(k) for k in z["nmb_prototypes"])
  memory, index = z["memory_embeddings"], z["memory_index"]
  method = DeepClusterV2(num_prototypes=counts, kmeans_iterations=iterations, output_dim=memory.shape[-1], num_examples=int(z["dataset_size"]))
  bank = np.zeros((method.num_examples, 2, memory.shape[-1]), np.float32)
  bank[index] = memory.swapaxes(0, 1)
  seen = np.flatnonzero(bank.any(axis=(1, 2)))
  position = {image: row for row, image in enumerate(seen)}
  labels = np.full((len(counts), method.num_examples), -100)
  for h in range(len(counts)):
    assert z[f"head{h}/memory_bank"] == h % method.large_crops
    rows = [position[image] for image in index[z[f"head{h}/initial_centroid_rows"]]]
    found = method.cluster(None, bank[seen, h % 2], head=h, rng=GivenRows([np.array(rows)]))
    np.testing.assert_allclose(found.prototypes, z[f"iters{iterations}/head{h}/centroids"], atol=1e-5)
    labels[h, seen] = found.labels
  np.testing.assert_array_equal(labels, z[f"iters{iterations}/assignments"])


@pytest.fixture(scope="module")
def tiny():
  model = ViT(variant="custom", width=24, depth=1, heads=2, mlp_dim=48, patch=8, image_size=32)
  sizes = dict(large_size=32, small_size=16, small_crops=1, hidden_dim=16, output_dim=8)
  method = DeepClusterV2(model=model, total_steps=9, batch_size=4, num_examples=13, num_prototypes=(5, 4, 3), **sizes)
  rng = np.random.default_rng(0)
  shapes = {"large": (4, 2, 32, 32, 3), "small": (4, 1, 16, 16, 3)}
  batch = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()} | {"index": jnp.array([9, 2, 12, 0])}
  return method, batch


def state_of(method, batch, **extra):
  params, start = method.init(jax.random.key(0), batch)
  return TrainState(step=jnp.int32(0), params=params, opt_state={}, extra=start | extra)


def unit_bank(method, images):
  bank = np.zeros((method.num_examples, 2, method.output_dim), np.float32)
  bank[images] = l2_normalize(jax.random.normal(jax.random.key(3), (len(images), 2, method.output_dim)))
  return bank


def no_pass(*args, **kwargs):
  raise AssertionError("the memory is not empty: no pass over the data")


def test_a_clustering_labels_the_seen_images_empties_the_memory_and_sets_the_prototypes(tiny):
  method, batch = tiny
  seen = np.array([0, 1, 2, 4, 5, 7, 8, 9, 10, 12])
  bank = unit_bank(method, seen)
  state = state_of(method, batch, bank=jnp.asarray(bank))
  new, metrics = method.refresh(state, no_pass, jax.random.key(5))
  labels = new.extra["assignments"]
  assert (labels[[3, 6, 11]] == -100).all() and (labels[seen] >= 0).all() and labels.dtype == np.int32
  assert not np.any(new.extra["bank"]) and metrics["labeled"] == pytest.approx(10 / 13)
  for h in range(3):
    centroids = new.extra["prototypes"][f"head{h}"]
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(labels[seen, h], np.argmax(bank[seen, h % 2] @ centroids.T, axis=1))
    assert f"head{h}/nmi_to_last" not in metrics and 0 <= metrics[f"head{h}/size_entropy"] <= 1
  again, metrics = method.refresh(new.replace(extra=new.extra | {"bank": bank}), no_pass, jax.random.key(5))
  np.testing.assert_array_equal(again.extra["assignments"], labels)  # the same key and rows
  assert all(metrics[f"head{h}/nmi_to_last"] == pytest.approx(1.0) for h in range(3))
  other, _ = method.refresh(state, no_pass, jax.random.key(6))
  assert not np.array_equal(other.extra["assignments"], labels)  # other first centroids


def test_the_first_clustering_fills_the_memory_in_one_pass_over_the_large_view(tiny):
  method, batch = tiny
  state, asked = state_of(method, batch), []

  def extract(state, function, *, views, rng):
    asked.append([v.name for v in views])
    rows = jax.jit(function)(state.params, state.extra, batch)
    assert rows.shape == (4, 2, 8)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, atol=1e-5)
    return np.resize(rows, (method.num_examples, 2, 8)) + 0.01 * unit_bank(method, np.arange(method.num_examples))

  new, _ = method.refresh(state, extract, jax.random.key(0))
  assert asked == [["large"]] and (new.extra["assignments"] >= 0).all()
  assert list(method.refresh_steps()) == [0, 3, 6]


def test_all_crops_predict_the_label_and_large_crops_enter_the_memory(tiny):
  method, batch = tiny
  labels = np.full((13, 3), -100, np.int32)
  labels[[9, 2, 12]] = [[1, 2, 0], [4, 0, 1], [0, 3, 2]]  # image 0 has none
  state = state_of(method, batch, assignments=jnp.asarray(labels))
  loss, (extra, metrics) = jax.jit(method.loss)(state.params, state.extra, batch, jax.random.key(1), state.step)
  z = method.embed(state.params, state.extra, batch, jax.random.key(1)).z
  wanted = []
  for h in range(3):
    log_p = jax.nn.log_softmax(z @ state.extra["prototypes"][f"head{h}"].T / 0.1)
    wanted.append(-np.mean([log_p[v, b, labels[i, h]] for v in range(3) for b, i in enumerate([9, 2, 12])]))
  np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-5)
  np.testing.assert_allclose(extra["bank"][np.asarray(batch["index"])], z[:2].swapaxes(0, 1), atol=1e-5)
  assert np.count_nonzero(extra["bank"].any(axis=(1, 2))) == 4
  assert metrics["labeled"] == pytest.approx(0.75)


def test_the_memory_after_the_official_loop_is_the_recorded_one(golden):
  """By image. The reference keeps rows in the order of arrival; a slot that no batch has reached still holds an older row."""
  z = golden("deepclusterv2_loss")
  size = ast.literal_eval(str(z["config"]))["dataset_size"]
  bank, wanted = np.zeros((2, size, 2, 6), np.float32)
  slot = 0
  for i in range(3):
    index = z[f"iter{i}/index"]
    bank[index] = l2_normalize(z[f"iter{i}/features"][:2]).swapaxes(0, 1)
    slots = slice(slot, slot + len(index))
    wanted[z["memory_index_after"][slots]] = z["memory_embeddings_after"][:, slots].swapaxes(0, 1)
    slot += len(index)
  np.testing.assert_allclose(bank, wanted, atol=1e-6)


def test_more_clusters_than_images_is_a_clear_error(tiny):
  method, batch = tiny
  with pytest.raises(UserError, match=r"num_prototypes=\(14,\): more clusters than the 13 training images"):
    method.replace(num_prototypes=(14,)).refresh(state_of(method, batch), no_pass, jax.random.key(0))
  state = state_of(method, batch, bank=jnp.asarray(unit_bank(method, np.arange(4))))
  with pytest.raises(UserError, match="only 4 images are seen from one clustering to the next.*cluster_every=1epochs"):
    method.refresh(state, no_pass, jax.random.key(0))
  with pytest.raises(UserError, match="kmeans_iterations=0"):
    method.replace(kmeans_iterations=0)


def test_sizes_that_no_clustering_takes_are_refused_before_the_start(tiny):
  method, _ = tiny
  with pytest.raises(UserError, match=r"num_prototypes=\(14,\): more clusters than the 13 training images"):
    method.replace(num_prototypes=(14,)).refresh_memory()
  with pytest.raises(UserError, match=r"num_prototypes=\(13,\): only 12 images are seen.*cluster_every=1epochs"):
    method.replace(num_prototypes=(13,)).refresh_memory()
  assert method.replace(num_prototypes=(13,), total_steps=3).refresh_memory()  # the only clustering has all images


def test_an_embedding_that_is_not_finite_names_the_image(tiny):
  method, batch = tiny
  bank = unit_bank(method, np.arange(13))
  bank[7, 1, 2] = np.nan
  with pytest.raises(UserError, match="the embedding of image 7 is not finite"):
    method.refresh(state_of(method, batch, bank=jnp.asarray(bank)), no_pass, jax.random.key(0))


def test_clusterings_stay_at_the_starts_of_the_epochs():
  """312.78 steps an epoch: at multiples of 313 the last clustering would come 172 steps late, in mid-epoch."""
  method = DeepClusterV2(num_examples=1_281_167, batch_size=4096, total_steps=250_228)
  steps = np.array(method.refresh_steps())
  assert len(steps) == 800
  np.testing.assert_allclose(steps, np.arange(800) * method.steps_per_epoch, atol=0.5)
  assert list(method.replace(cluster_every=Interval(100_000, "steps")).refresh_steps()) == [0, 100_000, 200_000]


def test_equal_embeddings_are_judged_a_collapse_though_their_labels_are_spread(tiny):
  method, batch = tiny
  same = {k: jnp.broadcast_to(v[:1, :1, :1, :1], v.shape) for k, v in batch.items() if k != "index"} | {"index": batch["index"]}
  state = state_of(method, batch, assignments=jnp.arange(39, dtype=jnp.int32).reshape(13, 3) % 3)
  _, (_, metrics) = method.loss(state.params, state.extra, same, jax.random.key(1), state.step)
  verdict = health.judge({k: float(v) for k, v in metrics.items()}, thresholds=health.HealthConfig())
  assert verdict.state == "collapsed" and "constant embedding" in verdict.message


def test_one_cluster_for_all_is_judged_a_collapse(tiny):
  method, batch = tiny
  state = state_of(method, batch, assignments=jnp.full((13, 3), 2, jnp.int32))
  _, (_, metrics) = method.loss(state.params, state.extra, batch, jax.random.key(1), state.step)
  verdict = health.judge({k: float(v) for k, v in metrics.items()}, thresholds=health.HealthConfig())
  assert verdict.state == "collapsed" and "one-prototype collapse" in verdict.message


def test_more_iterations_fit_better(tiny):
  x = np.asarray(l2_normalize(jax.random.normal(jax.random.key(7), (200, 8))))
  found = [spherical_kmeans(x, centroids=x[:6], iterations=n).objective[-1] for n in (1, 10)]
  assert found[1] > found[0] + 1
