"""SeLa: the public network's heads, the times of the solves, and labels that are equal parts on any machine."""

import dataclasses

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl import setup
from big_ssl.core import health
from big_ssl.core.optim import learning_rate
from big_ssl.core.types import TrainState, UserError
from big_ssl.evaluate import Extractor, refresh
from big_ssl.methods.sela import SeLa
from big_ssl.models.alexnet import AlexNet
from big_ssl.models.conv_probe import ALEXNET_POOLS, VGG_POOLS, probe_features
from big_ssl.models.encoder import encode
from big_ssl.models.resnet import ResNet
from big_ssl.models.vgg import VGG
from big_ssl.weights import transfer
from big_ssl.weights.families import load

SMALL = {"num_clusters": 5, "num_heads": 2, "size": 16, "image_channels": 3, "num_examples": 24, "batch_size": 8, "total_steps": 30}


@pytest.mark.parametrize("prefix,power,margin,solves", [("imagenet", 2.0, 1.01, 100), ("cifar", 1.0, 1.0001, 400)])
def test_solves_come_at_the_times_of_the_public_code(golden, prefix, power, margin, solves):
  wanted = golden("sela_sinkhorn")[f"schedule_{prefix}"]
  # 400 epochs of 1000 images with a batch of 100; the first entry of the golden is a sentinel, the rest goes backwards.
  method = SeLa(num_examples=1000, batch_size=100, total_steps=4000, solves=solves, solve_power=power, solve_margin=margin)
  np.testing.assert_allclose(method.solve_times(), wanted[:0:-1], rtol=1e-6)
  steps, due, popped = method.refresh_steps(), list(wanted), []
  for step in range(4000):  # the loop of the public code: one solve per iteration
    if step * 100 >= due[-1]:
      due.pop()
      popped.append(step)
  assert list(steps) == popped and steps[0] == 0


def test_heads_and_loss_are_those_of_the_public_network(golden):
  z = golden("sela_alexnet_tiny")
  net = load("alexnet", {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")})
  method = SeLa(model=transfer.backbone(net.model), num_clusters=9, num_heads=3, size=96, num_examples=4)
  params = {"encoder": net.weights.params}
  labels = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 0], [0, 1, 2]], np.int32)
  extra = {"batch_stats": net.weights.batch_stats, "assignments": jnp.asarray(labels)}
  images = jnp.asarray(np.moveaxis(z["input"], 1, -1))[:, None]

  out = jax.jit(method.features)(params, extra, {"image": images})
  np.testing.assert_allclose(out["logits"], z["output/eval_logits"][0], atol=2e-5, rtol=2e-5)
  np.testing.assert_allclose(out["pooled"], np.maximum(z["output/eval_fc7_prerelu"], 0), atol=2e-5, rtol=2e-5)

  still = method.replace(model=transfer.backbone(net.model | {"dropout": 0.0}))  # the golden's training mode has no dropout
  index = np.array([2, 0])
  loss, (new, _) = jax.jit(still.loss)(params, extra, {"crop": images, "index": index}, jax.random.key(0), jnp.int32(0))
  log_p = jax.nn.log_softmax(z["output/train_logits"])  # [H, B, K]
  wanted = -np.mean([log_p[h, b, labels[i, h]] for h in range(3) for b, i in enumerate(index)])
  np.testing.assert_allclose(loss, wanted, rtol=2e-5)
  np.testing.assert_allclose(new["batch_stats"]["backbone"]["bn5"]["var"], z["new_state/features.15.running_var"], rtol=2e-5)


@pytest.mark.parametrize(
  "recipe,factors",
  [
    ("imagenet", {0: 1, 149: 1, 150: 0.1, 300: 0.01, 350: 0.001}),
    ("imagenet_rot", {0: 1, 29: 1, 30: 0.1, 60: 0.01, 89: 0.01}),
    ("cifar10", {0: 1, 239: 1, 240: 0.1, 320: 0.01}),
  ],
)
def test_the_learning_rate_falls_at_the_published_epochs(recipe, factors):
  config = engine.load("sela", recipe)
  lr = learning_rate(config.optim, total_steps=10**6, batch_size=config.batch_size, examples=10 * config.batch_size)
  np.testing.assert_allclose([lr(10 * epoch) / config.optim.lr for epoch in factors], list(factors.values()), rtol=1e-5)


def fresh(method):
  batch = {"crop": jnp.zeros((2, 1, method.size, method.size, 3))}
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  return TrainState(step=jnp.int32(0), params=params, opt_state=(), extra=extra)


def tiny_method(**changes):
  return SeLa(model=ResNet(depth=18, blocks=(1,), stem_width=8, stem="cifar"), **SMALL | changes)


def images_of(method, seed=0):
  return np.random.default_rng(seed).normal(size=(method.num_examples, 1, method.size, method.size, 3)).astype(np.float32)


def extractor(images):
  def extract(state, function, *, views, rng):
    assert len(views) == 1 and rng is not None
    function = jax.jit(function)
    parts = np.split(np.arange(len(images)), 2)
    return np.concatenate([function(state.params, state.extra, {"crop": images[p], "index": p}) for p in parts])

  return extract


def test_labels_of_the_start_are_balanced_and_differ_between_heads():
  labels = np.asarray(tiny_method(num_examples=52).random_labels(jax.random.key(3)))
  assert labels.shape == (52, 2) and labels.dtype == np.int32
  assert {tuple(np.sort(np.bincount(c, minlength=5))) for c in labels.T} == {(10, 10, 10, 11, 11)}
  assert (labels[:, 0] != labels[:, 1]).mean() > 0.5 and (labels[:, 0] != np.arange(52) % 5).mean() > 0.5


def test_a_refresh_gives_equal_parts_and_touches_labels_only():
  method = tiny_method(num_examples=100)
  state = fresh(method)
  sharp = jax.tree.map(lambda x: 300 * x, state.params["encoder"]["head"])  # a flat plan has no equal argmax
  state = state.replace(params={"encoder": state.params["encoder"] | {"head": sharp}})
  new, metrics = method.refresh(state, extractor(images_of(method)), jax.random.key(1))
  labels = np.asarray(new.extra["assignments"])
  sizes = np.stack([np.bincount(c, minlength=5) for c in labels.T])
  assert np.abs(sizes - 20).sum(axis=1).max() <= 2 * (5 - 1), sizes  # an optimal plan splits at most K - 1 images
  assert metrics["cluster_min"] == sizes.min() and metrics["cluster_max"] == sizes.max()
  assert metrics["transport_error"] <= 0.1 and metrics["sweeps"] < 2000 and 0 <= metrics["nmi_to_last"] < 0.5
  assert new.extra.keys() == state.extra.keys() and engine.leaves_equal(new.params, state.params)
  again, _ = method.refresh(new, extractor(images_of(method)), jax.random.key(1))
  np.testing.assert_array_equal(again.extra["assignments"], labels)


@pytest.mark.parametrize("step,head", [(0, 0), (3, 1), (5, 1), (6, 0)])
def test_one_head_at_a_time_is_the_number_of_the_epoch(step, head):
  method = tiny_method(one_head=True)  # three steps of 8 are an epoch of 24
  state = fresh(method)
  state = state.replace(step=jnp.int32(step))
  new, _ = method.refresh(state, extractor(images_of(method)), jax.random.key(1))
  changed = (np.asarray(new.extra["assignments"]) != np.asarray(state.extra["assignments"])).any(axis=0)
  assert changed.tolist() == [h == head for h in range(2)]


def test_training_mode_labels_use_dropout_and_batch_statistics():
  model = AlexNet(widths=(4,) * 5, fc=32, stem="cifar", image_size=16)
  method = SeLa(model=model, **SMALL)
  state, images = fresh(method), images_of(method)

  def features(method, key):
    rows = []

    def extract(state, function, **kwargs):
      rows.append(extractor(images)(state, function, **kwargs))
      return rows[0]

    method.refresh(state, extract, jax.random.key(key))
    return rows[0]

  train = method.replace(train_mode_labels=True)
  np.testing.assert_array_equal(features(method, 1), features(method, 2))
  assert not np.allclose(features(train, 1), features(train, 2)) and not np.allclose(features(train, 1), features(method, 1))
  np.testing.assert_array_equal(features(train, 1), features(train, 1))


def test_labels_are_the_same_on_eight_devices_and_when_a_killed_refresh_is_repeated():
  config = engine.small("sela", **{"method.solves": 3})
  labels = {}
  for devices in (1, 8):
    run = setup.make_run(config, devices=jax.devices()[:devices])
    assert run.method.refresh_steps() == [0, 3]
    start = run.initial_state()
    state, metrics = refresh(run, Extractor(run), start)
    labels[devices] = np.asarray(state.extra["assignments"])
    assert metrics["refresh/nmi_to_last"] < 1
  np.testing.assert_array_equal(labels[1], labels[8])
  # The checkpoint holds the state before a refresh; another process makes it again from there.
  placed = jax.tree.map(lambda x, a: jax.device_put(np.asarray(x), a.sharding), start, run.abstract_state)
  run = setup.make_run(config, devices=jax.devices()[:8])
  again = refresh(run, Extractor(run), placed)[0]
  assert engine.leaves_equal(state, again)
  later = refresh(run, Extractor(run), start.replace(step=start.step + 3))[0]  # another augmentation
  assert (np.asarray(later.extra["assignments"]) != labels[8]).any()


def test_rotations_are_told_apart_and_clusters_asked_of_the_upright_copy_only():
  method = tiny_method()
  rotating = method.replace(rotation_weight=0.5)
  state, images = fresh(rotating), images_of(method)[:8]
  labels = np.asarray(state.extra["assignments"])[:8]
  batch = {"crop": images, "index": np.arange(8)}
  loss = lambda params: rotating.loss(params, state.extra, batch, jax.random.key(0), jnp.int32(0))
  (value, (_, metrics)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)

  copies = np.stack([np.rot90(image[0], k) for image in images for k in range(4)])
  run = jax.jit(lambda x: encode(rotating.encoder, state.params["encoder"], state.extra["batch_stats"], x, train=True).out)
  out, head = run(copies), state.params["rotation"]["fc"]
  clusters, turns = jax.nn.log_softmax(out["projection"]), jax.nn.log_softmax(out["pooled"] @ head["kernel"] + head["bias"])
  wanted = -np.mean([clusters[4 * i, h, labels[i, h]] for i in range(8) for h in range(2)])
  wanted -= 0.5 * np.mean([turns[4 * i + k, k] for i in range(8) for k in range(4)])
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  right = np.argmax(turns, axis=1) == np.tile(np.arange(4), 8)
  np.testing.assert_allclose(metrics["rotation_accuracy"], right.mean(), rtol=1e-6)
  assert np.any(grads["rotation"]["fc"]["kernel"]) and "rotation" not in fresh(method).params


def test_solves_of_zero_keep_the_labels_and_need_no_memory():
  method = tiny_method(solves=0)
  assert list(method.refresh_steps()) == [] and method.refresh_memory() == {}
  memory = tiny_method().refresh_memory()
  assert sorted(memory.values()) == sorted([4 * 24 * 8, 4 * 24 * 5]), memory


def test_labels_of_a_finished_run_are_those_of_the_retraining_and_stay(tmp_path):
  finished = setup.make_run(engine.small("sela", **{"method.solves": 1}), devices=jax.devices()[:1])
  state, _ = refresh(finished, Extractor(finished), finished.initial_state())
  np.save(tmp_path / "assignments.npy", state.extra["assignments"])
  options = {"method.assignments_file": str(tmp_path / "assignments.npy"), "method.rotation_weight": 1.0}
  run = setup.make_run(engine.small("sela", **options), devices=jax.devices()[:8])
  assert list(run.method.refresh_steps()) == [0]
  start = run.initial_state()
  given, _ = refresh(run, Extractor(run), start)
  np.testing.assert_array_equal(given.extra["assignments"], state.extra["assignments"])
  assert (np.asarray(start.extra["assignments"]) != given.extra["assignments"]).any()
  assert "rotation" in given.params and engine.leaves_equal(given.params, start.params)


@pytest.mark.parametrize(
  "labels,found",
  [
    (None, "cannot be read as a .npy file"),
    (np.zeros((23, 2), int), r"found int64 \(23, 2\), 0 to 0; expected integers \(24, 2\), 0 to 4"),
    (np.zeros((24, 2)), "found float64"),
    (np.full((24, 2), 5), "found .*, 5 to 5; expected integers .*, 0 to 4"),
    (np.full((24, 2), -1), "found .*, -1 to -1"),
  ],
)
def test_given_labels_that_do_not_fit_are_refused_before_the_start(tmp_path, labels, found):
  file = tmp_path / "assignments.npy"
  if labels is not None:
    np.save(file, labels)
  with pytest.raises(UserError, match=f"config.method.assignments_file='{file}': {found}"):
    tiny_method(assignments_file=str(file)).refresh_memory()


@pytest.mark.parametrize("planted,found", [("labels", "one-prototype"), ("features", "constant embedding")])
def test_a_collapse_is_seen_by_the_verdict(planted, found):
  method = tiny_method()
  state, images = fresh(method), images_of(method)[:8]
  extra, params = state.extra, state.params
  if planted == "labels":
    extra = extra | {"assignments": jnp.zeros_like(extra["assignments"])}
  else:
    images = np.repeat(images[:1], 8, axis=0)
  batch = {"crop": images, "index": np.arange(8)}
  _, (_, metrics) = jax.jit(method.loss)(params, extra, batch, jax.random.key(0), jnp.int32(0))
  verdict = health.judge({k: float(v) for k, v in metrics.items()}, thresholds=health.HealthConfig())
  assert verdict.state == "collapsed" and found in verdict.message, verdict


def test_gray_comes_before_the_jitter_unless_told_otherwise():
  names = lambda method: [type(op).__name__ for op in method.inputs().views[0].augment]
  assert names(tiny_method())[:2] == ["Grayscale", "ColorJitter"]
  assert names(tiny_method(gray_first=False))[:2] == ["ColorJitter", "Grayscale"]


def test_probes_of_every_layer_have_the_published_widths():
  shape = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

  def widths(model, pools, kind):
    stages = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=False)[0]["stages"], shape)
    found = jax.eval_shape(lambda s: probe_features(s, pools=pools, kind=kind), stages)
    return [found[f"conv{i}"].shape[1] for i in range(1, len(pools) + 1)]

  for kind in ("average", "max"):
    assert widths(AlexNet(), ALEXNET_POOLS, kind) == [9600, 9216, 9600, 9600, 9216]
  assert widths(VGG(variant="deepercluster", sobel=True), VGG_POOLS, "average")[::4] == [9216, 9216, 8192, 8192]
  corner = probe_features([jnp.ones((1, 13, 13, 1))], pools=((3, 1),), kind="average")["conv1"].reshape(5, 5)
  np.testing.assert_allclose(corner[0, 0], 4 / 9, rtol=1e-6)  # padded zeros count


@pytest.mark.parametrize(
  "field,value",
  [("num_clusters", 1), ("num_heads", 0), ("sharpness", 0.0), ("sharpness", -1.0), ("tolerance", 0.0), ("solves", -1), ("mean", (0.5,))],
)
def test_impossible_options_are_clear_errors(field, value):
  with pytest.raises(UserError, match=f"config.method.{field}="):
    dataclasses.replace(tiny_method(), **{field: value})


def test_only_squares_are_rotated():
  assert tiny_method(rotation_weight=1.0, size=(16, 16)).size == (16, 16) and tiny_method(size=(16, 24)).size == (16, 24)
  with pytest.raises(UserError, match=r"config.method.size=\(16, 24\): .*squares.*config.method.rotation_weight=0"):
    tiny_method(rotation_weight=1.0, size=(16, 24))


def test_more_clusters_than_images_are_refused_before_the_start():
  with pytest.raises(UserError, match="num_clusters=25: more clusters than the 24 training images"):
    tiny_method(num_clusters=25).refresh_memory()
