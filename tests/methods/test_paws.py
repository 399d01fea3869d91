"""PAWS: the official training loop replayed, its optimizer, its streams and its collapses."""

import ast
import functools
import re

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl import setup as setup_lib
from big_ssl.core.config import OptimConfig
from big_ssl.core.health import HealthConfig, judge
from big_ssl.core.optim import learning_rate, make_optimizer
from big_ssl.core.types import Interval, Rule, TrainState, UserError
from big_ssl.losses.semi import label_matrix, paws_loss
from big_ssl.methods.paws import PAWS, embed, paws_rules
from big_ssl.models.encoder import crop_major
from big_ssl.models.resnet import ResNet
from big_ssl.models.wide_resnet import WideResNet
from big_ssl.weights.families import dump, load
from big_ssl.weights.keymap import Weights


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def optim(start, peak, final, warmup, **fields):
  interval = Interval(warmup, "steps")
  return OptimConfig(name="larc", lr=peak, start_lr=start, final_lr=final, warmup=interval, lr_in_momentum=True, **fields)


def setup(z):
  c = ast.literal_eval(str(z["config"]))
  assert c["network"] == "wrn"
  total = c["epochs"] * c["iters_per_epoch"]
  method = PAWS(
    model=WideResNet(depth=10, width=1),
    total_steps=total,
    classes_per_step=c["classes"],
    images_per_class=c["imgs_per_class"],
    support_views=c["support_views"],
    small_views=c["multicrop"],
    big_size=c["size"],
    small_size=c["multicrop_size"],
    output_dim=c["out_dim"],
    prediction_head=c["pred_head"],
    temperature=c["tau"],
    sharpen=c["sharpen_T"],
    label_smoothing=c["label_smoothing"],
  )
  weights = load("paws_wide_resnet", {k.removeprefix("state_initial/"): v for k, v in z.items() if k.startswith("state_initial/")}).weights
  params, extra = jax.tree.map(jnp.asarray, (engine.nested(weights.params), {"batch_stats": engine.nested(weights.batch_stats)}))
  config = optim(
    *c["start_ref_final_lr"],
    c["warmup_epochs"] * c["iters_per_epoch"],
    weight_decay=c["weight_decay"],
    momentum=c["momentum"],
    trust_coefficient=c["trust"],
  )
  optimizer = make_optimizer(config, params=params, rules=method.param_rules(), total_steps=total, batch_size=1, examples=1)
  return c, method, optimizer, TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), extra=extra)


def recorded_batch(z, key, classes):
  views = {k: nhwc(z[f"{key}/{k}"]).swapaxes(0, 1) for k in ("unlabelled", "support", "multicrop")}
  count, supports = len(views["unlabelled"]), len(views["support"])
  return {
    "unlabeled": {"big": views["unlabelled"], "small": views["multicrop"], "index": jnp.arange(count)},
    "support": {"big": views["support"], "label": jnp.arange(supports) % classes, "index": jnp.arange(supports)},
  }


# Scales and biases of the norms upstream of the head's second one. Their gradient of the last step jumps where a ReLU
# changes sides, and after five updates pre-activations of 5e-5 are rounding: the same replay in float64, whose losses
# agree with the recording as well, ends 1.8e-3 away from it in these. An error of the update itself is far larger.
BEHIND_GATES = re.compile(r"(layer\d\.0\.bn\d|^bn1|^fc\.bn1)\.(weight|bias)$")


def make_step(method, optimizer):
  def step(state, batch):
    loss = functools.partial(method.loss, batch=batch, rng=jax.random.key(0), step=state.step)
    (total, (extra, metrics)), grads = jax.value_and_grad(lambda p: loss(p, state.extra), has_aux=True)(state.params)
    updated = optimizer.apply(state.params, grads, state.opt_state, state.step)
    new = TrainState(step=state.step + 1, params=updated.params, opt_state=updated.opt_state, extra=extra)
    return new, jnp.stack([total, metrics["ce"], metrics["memax"]])

  return jax.jit(step, compiler_options=engine.OPTIMIZED)


@pytest.fixture(scope="module")
def replayed(golden):
  """The recorded batches with the states before and after each, and the losses, on one device."""
  z = golden("paws_train_steps")
  c, method, optimizer, state = setup(z)
  step, found = make_step(method, optimizer), []
  for epoch in range(c["epochs"]):
    for i in range(c["iters_per_epoch"]):
      batch = recorded_batch(z, f"images/epoch{epoch}/iter{i}", c["classes"])
      new, losses = step(state, batch)
      found.append((batch, state, new, losses, z["total_ce_memax"][epoch, i]))
      state = new
  return found


def test_the_official_training_loop_is_reproduced(golden, replayed):
  for i, (*_, losses, wanted) in enumerate(replayed):
    np.testing.assert_allclose(losses, wanted, rtol=2e-4, err_msg=f"step {i}")
  state, z = replayed[-1][2], golden("paws_train_steps")
  final = Weights(engine.unnested(state.params), engine.unnested(state.extra["batch_stats"]), {})
  for name, value in dump("paws_wide_resnet", final).items():
    tolerance = 2.5e-3 if BEHIND_GATES.search(name) else 1e-4
    np.testing.assert_allclose(value, z[f"state_final/{name}"], atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("devices", [(2, 1), (2, 2), (8, 1)])
def test_each_step_is_the_same_on_several_devices(golden, replayed, devices):
  # From the same state: over several steps rounding grows through gates, as it does from one library to another.
  _, method, optimizer, _ = setup(golden("paws_train_steps"))
  count = devices[0] * devices[1]
  mesh = jax.make_mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])
  whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(("data", "fsdp")))
  # Four images and nine supports: what the devices do not divide arrives whole.
  place = lambda x: jax.device_put(x, whole if len(x) % count else split)
  with jax.set_mesh(mesh):
    step = make_step(method, optimizer)
    for i, (batch, before, after, _, wanted) in enumerate(replayed):
      new, losses = step(jax.device_put(before, whole), jax.tree.map(place, batch))
      np.testing.assert_allclose(losses, wanted, rtol=2e-4, err_msg=f"step {i}")
      for a, b in zip(jax.tree.leaves((new.params, new.extra)), jax.tree.leaves((after.params, after.extra)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=0, err_msg=f"step {i}")


def test_loss_gradients_and_statistics_are_the_same_with_every_stream_split_over_eight_devices(tiny, mesh8):
  method, params, extra, _ = tiny
  method = method.replace(classes_per_step=4)
  batch = batch_of(images=8, classes=4)  # 8 supports and 2 x 8 big views, 2 x 8 small ones: all rows divide
  step = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  (loss, (after, _)), grads = step(params, extra, batch, jax.random.key(0), jnp.int32(0))
  whole, split = NamedSharding(mesh8, P()), NamedSharding(mesh8, P(("data", "fsdp")))
  with jax.set_mesh(mesh8):
    trees, batch = jax.device_put((params, extra), whole), jax.device_put(batch, split)
    (loss8, (after8, _)), grads8 = step(*trees, batch, jax.random.key(0), jnp.int32(0))
  np.testing.assert_allclose(loss8, loss, rtol=1e-5)
  for a, b in zip(jax.tree.leaves((grads8, after8)), jax.tree.leaves((grads, after)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_a_support_that_the_devices_do_not_divide_is_a_clear_error():
  with pytest.raises(UserError, match="config.method.classes_per_step x images_per_class=6: must be divisible by the 4 devices"):
    overrides = {"data.train_examples": 120, "method.classes_per_step": 3, "method.images_per_class": 2, "method.labels_per_class": 3}
    setup_lib.make_run(engine.small("paws", **overrides), devices=jax.devices()[:4])


def test_the_learning_rate_is_the_recorded_one(golden):
  z = golden("paws_schedule")
  warmup, epochs, iterations = z["warmup_epochs_niter"]
  curve = learning_rate(
    optim(*z["start_ref_final"], int(warmup * iterations)), total_steps=int(epochs * iterations), batch_size=1, examples=1
  )
  np.testing.assert_allclose([curve(i) for i in range(len(z["lr"]))], z["lr"], rtol=1e-5)


def test_the_optimizer_is_the_recorded_one(golden):
  z = golden("paws_lars")
  ours = {"downsample.1.weight": "downsample_bn/scale", "downsample.1.bias": "downsample_bn/bias"}
  ours |= {"bn1.weight": "bn1/scale", "bn1.bias": "bn1/bias", "conv1.weight": "conv1/kernel"}
  ours |= {"fc.fc1.weight": "fc1/kernel", "fc.fc1.bias": "fc1/bias", "zero.weight": "zero/kernel"}
  names = {k.removeprefix("param0/"): ours[k.removeprefix("param0/").removeprefix("layer1.0.")] for k in z if k.startswith("param0/")}
  tree = lambda prefix: {ours: jnp.asarray(z[f"{prefix}/{name}"]) for name, ours in names.items()}
  params = tree("param0")
  velocity = {"momentum": jax.tree.map(jnp.zeros_like, params)}
  for i, lr in enumerate(z["lr"]):
    config = OptimConfig(
      name="larc",
      lr=float(lr),
      schedule="constant",
      weight_decay=float(z["weight_decay"]),
      momentum=float(z["momentum"]),
      trust_coefficient=float(z["trust"]),
      lr_in_momentum=True,
    )
    optimizer = make_optimizer(config, params=params, rules=paws_rules(), total_steps=3, batch_size=1, examples=1)
    out = optimizer.apply(params, tree(f"step{i}/grad"), velocity, jnp.int32(i))
    params, velocity = out.params, out.opt_state
    for name, path in names.items():
      np.testing.assert_allclose(params[path], z[f"step{i}/param/{name}"], rtol=1e-5, atol=1e-6, err_msg=name)
      np.testing.assert_allclose(-velocity["momentum"][path], z[f"step{i}/velocity/{name}"], rtol=1e-5, atol=1e-6, err_msg=name)


def test_of_a_resnet_the_shortcut_norms_alone_are_adapted_and_decayed():
  rule = lambda path: next(r for r in paws_rules() if re.search(r.pattern, path))
  plain = {"encoder/backbone/layer1_0/bn1/scale", "encoder/head/bn1/bias", "encoder/backbone/layer1_0/downsample_bn/bias"}
  adapted = {"encoder/backbone/layer1_0/downsample_bn/scale", "encoder/backbone/conv1/kernel", "predictor/fc1/kernel"}
  assert all(not rule(p).trust_ratio and rule(p).weight_decay == 0 for p in plain | {"encoder/backbone/conv1/bias"})
  assert all(rule(p) in (Rule(pattern=r"downsample_bn/scale$"), Rule(pattern=".*")) for p in adapted)


def batch_of(images=4, classes=3, each=2, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "unlabeled": {"big": draw(images, 2, 16, 16, 3), "small": draw(images, 2, 8, 8, 3), "index": jnp.arange(images)},
    "support": {"big": draw(classes * each, 1, 16, 16, 3), "label": 5 + jnp.arange(classes * each) % classes, "index": jnp.arange(classes * each)},
  }


@pytest.fixture(scope="module")
def tiny():
  method = PAWS(
    model=WideResNet(depth=10, width=1),
    total_steps=10,
    classes_per_step=3,
    images_per_class=2,
    small_views=2,
    big_size=16,
    small_size=8,
    output_dim=8,
    hidden_dim=16,
  )
  batch = batch_of()
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  return method, params, extra, batch


def loss_of(method, params, extra, batch):
  return engine.loss(method)(params, extra, batch, jax.random.key(0), jnp.int32(0))


def test_the_order_of_the_support_and_the_names_of_its_classes_do_not_matter(tiny):
  method, params, extra, batch = tiny
  order = np.array([3, 0, 5, 1, 4, 2])
  support = jax.tree.map(lambda x: x[order], batch["support"])
  renamed = support | {"label": jnp.array([0, 40, 7, 2, 9, 11, 3, 100])[support["label"]]}
  for other in (support, renamed):
    np.testing.assert_allclose(
      loss_of(method, params, extra, batch | {"support": other})[0], loss_of(method, params, extra, batch)[0], rtol=1e-5
    )


def test_shuffled_labels_change_the_loss(tiny):
  method, params, extra, batch = tiny
  wrong = batch["support"] | {"label": jnp.roll(jnp.sort(batch["support"]["label"]), 1)}
  a, b = (loss_of(method, params, extra, b)[0] for b in (batch, batch | {"support": wrong}))
  assert abs(a - b) > 1e-4


def test_swapping_the_two_big_views_of_every_image_leaves_the_loss(tiny):
  method, params, extra, batch = tiny
  swapped = batch["unlabeled"] | {"big": batch["unlabeled"]["big"][:, ::-1]}
  np.testing.assert_allclose(
    loss_of(method, params, extra, batch | {"unlabeled": swapped})[0], loss_of(method, params, extra, batch)[0], rtol=1e-5
  )


def test_each_resolution_is_a_batch_of_its_own_in_every_norm(tiny):
  method, params, extra, batch = tiny
  projections = lambda b: loss_of(method.replace(memax_weight=0.0), params, extra, b)[1][0]["batch_stats"]
  shifted = batch["unlabeled"] | {"small": batch["unlabeled"]["small"] + 3.0}
  # The small views come last: the running mean moves with them, but what the big views were normalized by does not.
  with_small, without = projections(batch), projections(batch | {"unlabeled": shifted})
  assert not np.allclose(with_small["encoder"]["backbone"]["layer1_0"]["bn1"]["mean"], without["encoder"]["backbone"]["layer1_0"]["bn1"]["mean"])
  alone = method.replace(small_views=0)
  metrics = [loss_of(alone, params, extra, batch | {"unlabeled": u})[1][1] for u in (batch["unlabeled"], shifted)]
  np.testing.assert_array_equal(metrics[0]["std"], metrics[1]["std"])


def test_small_views_of_the_size_of_the_big_ones_share_their_batch_in_every_norm(tiny):
  method, params, extra, batch = tiny
  same = method.replace(small_size=16)
  unlabeled, support = batch["unlabeled"] | {"small": 2.0 * batch["unlabeled"]["big"] + 1.0}, batch["support"]
  loss, (after, _) = loss_of(same, params, extra, {"unlabeled": unlabeled, "support": support})
  images = jnp.concatenate([crop_major(v) for v in (support["big"], unlabeled["big"], unlabeled["small"])])
  out, stats = embed(same, params, extra["batch_stats"], images, train=True)
  z, h = out["prediction"], out["projection"]
  labels = label_matrix(support["label"], columns=jnp.unique(support["label"]), smoothing=same.label_smoothing)
  wanted = paws_loss(z[6:], z[:6], h[6:14], h[:6], labels=labels, temperature=same.temperature, sharpen=same.sharpen).total
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), after["batch_stats"], stats)


def test_without_a_prediction_head_z_is_h_and_with_one_it_is_not(tiny):
  method, params, extra, batch = tiny
  image = {"image": batch["unlabeled"]["big"][:, :1]}
  out = method.features(params, extra, image)
  assert out["pooled"].shape == (4, 64) and not np.allclose(out["prediction"], out["projection"])
  plain = method.replace(prediction_head=False)
  params, extra = plain.init(jax.random.key(0), batch)
  out = plain.features(params, extra, image)
  np.testing.assert_array_equal(out["prediction"], out["projection"])
  assert params["predictor"] == {} and extra["batch_stats"]["predictor"] == {}


def test_equal_embeddings_are_judged_a_collapse(tiny):
  method, params, extra, batch = tiny
  flat = jax.tree.map(lambda x: x, params)
  for layer in ("fc1", "fc2"):
    flat["predictor"][layer] = jax.tree.map(jnp.zeros_like, flat["predictor"][layer]) | {"bias": jnp.ones_like(flat["predictor"][layer]["bias"])}
  flat["encoder"]["head"]["fc3"] = {"kernel": jnp.zeros((16, 8)), "bias": jnp.ones(8)}
  metrics = {k: float(v) for k, v in loss_of(method, flat, extra, batch)[1][1].items()}
  verdict = judge(metrics, thresholds=HealthConfig())
  assert verdict.state == "collapsed", metrics


def test_one_class_for_every_image_is_judged_a_collapse(tiny):
  method, params, extra, batch = tiny
  alike = batch["support"]["big"][0, 0]
  unlabeled = {k: jnp.broadcast_to(alike[: v.shape[2], : v.shape[3]], v.shape) if k != "index" else v for k, v in batch["unlabeled"].items()}
  metrics = {k: float(v) for k, v in loss_of(method, params, extra, batch | {"unlabeled": unlabeled})[1][1].items()}
  assert metrics["target_mean_entropy"] < 0.05 or metrics["std"] < 0.05, metrics
  assert judge(metrics, thresholds=HealthConfig()).state == "collapsed"


@pytest.mark.parametrize(
  "field,value,message",
  [
    ("classes_per_step", 1, "classes_per_step=1.*at least 2"),
    ("classes_per_step", 11, "classes_per_step=11: the training data has 10 classes"),
    ("images_per_class", 0, "images_per_class=0"),
    ("support_views", 0, "support_views=0"),
    ("temperature", 0.0, "temperature=0.0"),
    ("label_smoothing", 1.0, "label_smoothing=1.0"),
    ("output_dim", 6, "output_dim=6.*multiple of 4"),
    ("small_views", -1, "small_views=-1"),
    ("sharpen", 0.0, "sharpen=0.0"),
    ("target_floor", -0.1, "target_floor=-0.1"),
    ("memax_weight", -1.0, "memax_weight=-1.0"),
    ("hidden_dim", -1, "hidden_dim=-1"),
  ],
)
def test_impossible_options_are_clear_errors(tiny, field, value, message):
  with pytest.raises(UserError, match=f"config.method.{message}"):
    tiny[0].replace(num_classes=10, **{field: value})


def test_a_resnet_without_multicrop_trains_too():
  method = PAWS(
    model=ResNet(depth=18, stem="cifar", stem_width=8, blocks=(1, 1, 1, 1)), classes_per_step=3, images_per_class=2, small_views=0, output_dim=8
  )
  batch = batch_of()
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  loss, _ = loss_of(method, params, extra, batch)
  assert np.isfinite(loss) and [v.name for v in method.inputs()["unlabeled"].views] == ["big"]
