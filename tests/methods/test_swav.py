"""SwAV: the official network, optimizer and training loop replayed, the queue, and what its options do."""

import ast
import dataclasses

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl import setup
from big_ssl.core import health
from big_ssl.core.config import OptimConfig
from big_ssl.core.optim import learning_rate, make_optimizer
from big_ssl.core.types import Interval, Rule, TrainState, UserError
from big_ssl.methods.multicrop import scores
from big_ssl.methods.swav import SwAV
from big_ssl.models.encoder import encode_crops
from big_ssl.models.resnet import ResNet
from big_ssl.models.vit import ViT
from big_ssl.ops.normalize import l2_normalize
from big_ssl.weights.families import dump, load
from big_ssl.weights.keymap import Weights


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def state_of(z, prefix):
  return {k.removeprefix(f"{prefix}/"): v for k, v in z.items() if k.startswith(f"{prefix}/")}


def tiny_resnet(state):
  """Bottlenecks [1, 1, 1, 1]; the widths say `width_per_group`, which the official code uses for stem and inner width alike."""
  width = state["conv1.weight"].shape[0]
  return ResNet(depth=50, blocks=(1, 1, 1, 1), stem_width=width, width_per_group=width)


def test_the_official_network_is_reproduced(golden):
  z = golden("swav_resnet_tiny")
  state = state_of(z, "state")
  weights = load("swav", state).weights
  hidden, output = state["projection_head.0.weight"].shape[0], state["prototypes.weight"].shape[1]
  encoder = SwAV(model=tiny_resnet(state), hidden_dim=hidden, output_dim=output).encoder
  groups = [nhwc(z[f"input/{size}"]).swapaxes(0, 1) for size in (48, 32)]  # [B, V, H, W, C]
  for mode in ("eval", "train"):
    encoded = encode_crops(encoder, weights.params, weights.batch_stats, groups, train=mode == "train")
    embedding = l2_normalize(encoded.out["projection"]).reshape(-1, output)
    np.testing.assert_allclose(embedding, z[f"output/{mode}/embedding"], atol=1e-4)
    np.testing.assert_allclose(scores(embedding, weights.params["prototypes"]["head0"]), z[f"output/{mode}/scores"], atol=1e-4)
    if mode == "eval":
      np.testing.assert_allclose(encoded.out["pooled"].reshape(15, -1), z["output/eval/pooled_features"], atol=1e-4)
  after = dump("swav", Weights(weights.params, encoded.batch_stats, {}))
  for name, value in state_of(z, "state_after_train").items():
    np.testing.assert_allclose(after[name], value, atol=1e-4, err_msg=name)


def test_the_official_wide_network_is_reproduced(golden):
  """Twice the channels everywhere, as in w2; the stem's 16 channels are 8 * 2."""
  z = golden("resnet_swav_wide_multicrop")
  state = state_of(z, "state")
  weights = load("swav", state).weights
  model = ResNet(depth=50, blocks=(1, 1, 1, 1), stem_width=8, width=2, width_per_group=8)
  hidden, output = state["projection_head.0.weight"].shape[0], state["prototypes.weight"].shape[1]
  encoder = SwAV(model=model, hidden_dim=hidden, output_dim=output).encoder
  groups = [nhwc(z[f"input/{name}"]).swapaxes(0, 1) for name in ("large", "small")]
  for mode in ("eval", "train"):
    encoded = encode_crops(encoder, weights.params, weights.batch_stats, groups, train=mode == "train")
    embedding = l2_normalize(encoded.out["projection"])
    np.testing.assert_allclose(embedding.reshape(-1, output), z[f"output/{mode}/embedding"], atol=1e-4)
    found = scores(embedding, weights.params["prototypes"]["head0"])
    np.testing.assert_allclose(found.reshape(len(embedding) * 2, -1), z[f"output/{mode}/prototype_scores"], atol=1e-4)
    if mode == "eval":
      np.testing.assert_allclose(encoded.out["pooled"][0], z["output/eval/backbone_large0"], atol=1e-4)
  after = dump("swav", Weights(weights.params, encoded.batch_stats, {}))
  for name, value in state_of(z, "output/train/new_state").items():
    np.testing.assert_allclose(after[name], value, atol=1e-4, err_msg=name)


def test_official_keys_round_trip_bit_for_bit(golden):
  state = {k: v for k, v in state_of(golden("swav_resnet_tiny"), "state").items() if "num_batches" not in k}
  again = dump("swav", load("swav", {f"module.{k}": v for k, v in state.items()}).weights)
  assert again.keys() == state.keys() and all(np.array_equal(again[k], state[k]) for k in state)
  heads = {k: v for k, v in state.items() if k != "prototypes.weight"} | {f"prototypes.prototypes{i}.weight": np.eye(3) + i for i in range(3)}
  again = dump("swav", load("swav", heads).weights)
  assert again.keys() == heads.keys() and all(np.array_equal(again[k], heads[k]) for k in heads)
  with pytest.raises(UserError, match="predictor.0.weight"):
    load("swav", state | {"predictor.0.weight": np.zeros((2, 2))})


def test_larc_adapts_every_tensor_as_the_official_optimizer(golden):
  z = golden("swav_larc")
  params = jax.tree.map(jnp.asarray, state_of(z, "param0"))
  curve = z["lr"]
  config = dict(name="larc", schedule="constant", momentum=float(z["momentum"]), trust_coefficient=float(z["trust_coefficient"]))
  config |= dict(weight_decay=float(z["weight_decay"]))
  # The parameter without a gradient in the first step is one that is frozen until the second.
  rules = (Rule(pattern="frozen", freeze_until=Interval(1, "steps")), *SwAV().param_rules())
  opt_state = None
  for step, lr in enumerate(curve):
    optimizer = make_optimizer(OptimConfig(lr=float(lr), **config), params=params, rules=rules, total_steps=3, batch_size=1, examples=1)
    opt_state = optimizer.init(params) if opt_state is None else opt_state
    grads = jax.tree.map(jnp.asarray, jax.tree.map(np.zeros_like, state_of(z, "param0")) | state_of(z, f"step{step}/grad"))
    updated = optimizer.apply(params, grads, opt_state, jnp.int32(step))
    params, opt_state = updated.params, updated.opt_state
    for name, value in state_of(z, f"step{step}/param").items():
      np.testing.assert_allclose(params[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{step} {name}")
    for name, value in state_of(z, f"step{step}/momentum").items():
      np.testing.assert_allclose(opt_state["momentum"][name], value, rtol=1e-5, atol=1e-7, err_msg=f"{step} {name}")


@pytest.mark.parametrize(("tag", "fields"), [("noclip", {"trust_coefficient": 0.001}), ("clip", {"trust_coefficient": 0.02, "trust_clip": True})])
def test_larc_leaves_zero_tensors_and_zero_gradients_raw_with_and_without_its_clip(golden, tag, fields):
  """SEER's runs of the same rule: parameter 3 starts at zero, the first gradient of parameter 1 is zero."""
  z = golden("seer_larc")
  config = OptimConfig(name="larc", schedule="constant", lr=0.3, momentum=0.9, weight_decay=1e-5, **fields)
  params = {f"{i}": jnp.asarray(z[f"param_{i}_{tag}"][0]) for i in range(4)}
  optimizer = make_optimizer(config, params=params, rules=SwAV().param_rules(), total_steps=3, batch_size=1, examples=1)
  opt_state = optimizer.init(params)
  for step in range(3):
    updated = optimizer.apply(params, {k: jnp.asarray(z[f"grad_{k}_step{step}"]) for k in params}, opt_state, jnp.int32(step))
    params, opt_state = updated.params, updated.opt_state
    for k, value in params.items():
      np.testing.assert_allclose(value, z[f"param_{k}_{tag}"][step + 1], rtol=1e-5, atol=1e-6, err_msg=f"{step} {k}")


def test_the_learning_rate_is_the_official_schedule(golden):
  z = golden("swav_lr")
  start, base, final, warmup, epochs, iterations = z["start_base_final_warmup_epochs_niter"]
  warm = Interval(float(warmup * iterations), "steps")
  config = OptimConfig(lr=float(base), start_lr=float(start), final_lr=float(final), warmup=warm, warmup_inclusive=True)
  total = int(epochs * iterations)
  curve = learning_rate(config, total_steps=total, batch_size=1, examples=1)
  np.testing.assert_allclose([curve(jnp.int32(i)) for i in range(total)], z["schedule"], rtol=1e-5)


def make_replay(z):
  c = ast.literal_eval(str(z["config"]))
  state = state_of(z, "state_initial")
  total = c["epochs"] * c["iters_per_epoch"]
  method = SwAV(
    model=tiny_resnet(state),
    total_steps=total,
    batch_size=c["batch"],
    num_examples=c["batch"] * c["iters_per_epoch"],
    num_prototypes=(c["prototypes"],),
    large_crops=c["crops"][0],
    small_crops=c["crops"][1],
    large_size=c["sizes"][0],
    small_size=c["sizes"][1],
    hidden_dim=state["projection_head.0.weight"].shape[0],
    output_dim=state["prototypes.weight"].shape[1],
    temperature=c["temperature"],
    epsilon=c["epsilon"],
    sinkhorn_iterations=c["sinkhorn_iterations"],
    freeze_prototypes=Interval(c["freeze_prototypes_iters"], "steps"),
    queue_size=c["queue_length"],
    queue_start=Interval(c["queue_starts_epoch"], "epochs"),
  )
  weights = load("swav", state).weights
  params, batch_stats = jax.tree.map(jnp.asarray, (dict(weights.params), weights.batch_stats))
  params = {"prototypes": params.pop("prototypes"), "encoder": params}
  extra = {"batch_stats": batch_stats, "queue": jnp.zeros((c["crops"][0], c["queue_length"], method.output_dim))}
  config = OptimConfig(name="larc", schedule="constant", lr=1.0, weight_decay=c["weight_decay"], momentum=c["momentum"], trust_coefficient=c["trust"])

  def optimizer(lr):
    scaled = dataclasses.replace(config, lr=float(lr))
    return make_optimizer(scaled, params=params, rules=method.param_rules(), total_steps=total, batch_size=c["batch"], examples=method.num_examples)

  state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer(1.0).init(params), extra=extra)
  return c, method, optimizer, state


@pytest.mark.parametrize("devices", [1, 4])
def test_the_official_training_loop_is_reproduced(golden, devices):
  z = golden("swav_train_steps")
  c, method, optimizer, state = make_replay(z)
  mesh = jax.make_mesh((devices, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices])
  state = jax.device_put(state, NamedSharding(mesh, P()))

  @jax.jit
  def gradients(state, batch):
    state = state.replace(params=method.project(state.params))
    loss = lambda p: method.loss(p, state.extra, batch, jax.random.key(0), state.step)
    (total, (extra, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state, total, extra, grads, metrics

  used = []
  with jax.set_mesh(mesh):
    for i in range(method.total_steps):
      key = f"images/epoch{i // c['iters_per_epoch']}/iter{i % c['iters_per_epoch']}"
      sizes = dict(zip(("large", "small"), c["sizes"], strict=True))
      batch = {name: nhwc(z[f"{key}/{size}"]).swapaxes(0, 1) for name, size in sizes.items()}
      batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
      state, total, extra, grads, metrics = gradients(state, batch)
      np.testing.assert_allclose(total, z["losses"][i], rtol=1e-4, err_msg=key)
      updated = optimizer(z["lr"][i]).apply(state.params, grads, state.opt_state, state.step)
      state = TrainState(step=state.step + 1, params=updated.params, opt_state=updated.opt_state, extra=extra)
      used.append(bool(metrics["queue_used"]))

  assert used == [False] * 4 + [True] * 2  # created at epoch 1, one batch long
  np.testing.assert_allclose(state.extra["queue"], z["queue_final"], atol=1e-4)
  final = dump("swav", Weights(state.params["encoder"] | {"prototypes": state.params["prototypes"]}, state.extra["batch_stats"], {}))
  for name, value in state_of(z, "state_final").items():
    if not name.endswith("num_batches_tracked"):
      np.testing.assert_allclose(final[name], value, atol=1e-4, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def tiny():
  model = ViT(variant="custom", width=24, depth=2, heads=2, mlp_dim=48, patch=8, image_size=32)
  sizes = dict(large_size=32, small_size=16, small_crops=2, hidden_dim=16, output_dim=8)
  method = SwAV(model=model, total_steps=10, batch_size=4, num_examples=8, num_prototypes=(6, 5), **sizes)
  rng = np.random.default_rng(0)
  shapes = {"large": (4, 2, 32, 32, 3), "small": (4, 2, 16, 16, 3)}
  batch = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
  return method, batch


def loss_of(method, batch, params=None, step=0):
  made, extra = method.init(jax.random.key(0), batch)
  return jax.jit(method.loss)(params or made, extra, batch, jax.random.key(1), jnp.int32(step))


def test_several_heads_are_the_mean_of_single_ones(tiny):
  method, batch = tiny
  params, extra = method.init(jax.random.key(0), batch)
  both = loss_of(method, batch, params)[0]
  alone = []
  for h, count in enumerate(method.num_prototypes):
    one = params | {"prototypes": {"head0": params["prototypes"][f"head{h}"]}}
    alone.append(loss_of(method.replace(num_prototypes=(count,)), batch, one)[0])
  np.testing.assert_allclose(both, np.mean(alone), rtol=1e-6)


def test_two_crops_have_no_small_view_and_only_predict_each_other(tiny):
  method, batch = tiny
  two = method.replace(small_crops=0)
  assert [v.name for v in two.inputs().views] == ["large"]
  loss, _ = loss_of(two, {"large": batch["large"]})
  assert np.isfinite(loss)


def test_embeddings_of_large_crops_alone_enter_the_queue(tiny):
  method, batch = tiny
  queued = method.replace(queue_size=8, queue_start=Interval(0, "steps"))
  _, (extra, metrics) = loss_of(queued, batch)
  assert extra["queue"].shape == (2, 8, 8) and metrics["queue_used"] == 0
  params, start = queued.init(jax.random.key(0), batch)
  z = queued.embed(params, start, batch, jax.random.key(1)).z
  np.testing.assert_allclose(extra["queue"][:, :4], z[:2], atol=1e-5)
  assert not np.any(extra["queue"][:, 4:])
  _, (late, _) = loss_of(method.replace(queue_size=8, queue_start=Interval(3, "steps")), batch, step=2)
  assert not np.any(late["queue"])


def test_a_resume_in_mid_queue_goes_on_exactly_and_the_full_queue_counts(tiny):
  method, batch = tiny
  queued = method.replace(queue_size=12, queue_start=Interval(1, "steps"))
  params, start = queued.init(jax.random.key(0), batch)
  step_fn = jax.jit(queued.loss)

  def run(extra, first, last):
    history = []
    for i in range(first, last):
      images = {k: jnp.roll(v, i, axis=2) for k, v in batch.items()}
      loss, (extra, metrics) = step_fn(params, extra, images, jax.random.key(1), jnp.int32(i))
      history.append((float(loss), float(metrics["queue_used"])))
    return extra, history

  whole, history = run(start, 0, 7)
  half, first = run(start, 0, 3)
  restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half)
  again, second = run(restored, 3, 7)
  assert first + second == history and engine.leaves_equal(again, whole)
  assert [used for _, used in history] == [0, 0, 0, 0, 1, 1, 1]
  assert not np.isclose(run(half, 3, 5)[1][1][0], run(start, 3, 5)[1][1][0], rtol=1e-4)  # the queue alone makes the difference


def test_frozen_prototypes_are_projected_but_not_trained_by_the_engine():
  changes = {"method.freeze_prototypes": "2steps", "optim.lr": 0.1, "optim.name": "sgd", "optim.schedule": "constant", "optim.warmup": "0steps"}
  run = setup.make_run(engine.small("swav", **changes), devices=jax.devices()[:1])
  state = run.initial_state()
  unit = np.array(state.params["prototypes"]["head0"])
  state = state.replace(params=state.params | {"prototypes": {"head0": jnp.asarray(3 * unit)}})
  seen = []
  with jax.set_mesh(run.mesh):
    step_fn = run.jit_step()
    for raw in run.batches(0, 3, state.extra):
      state, _ = step_fn(state, raw, run.resident)
      seen.append(np.array(state.params["prototypes"]["head0"]))
  np.testing.assert_allclose(seen[0], unit, atol=1e-6)
  np.testing.assert_allclose(seen[1], unit, atol=1e-6)
  assert np.abs(seen[2] - unit).max() > 1e-5


def test_equal_features_are_judged_a_collapse(tiny):
  method, batch = tiny
  same = {k: jnp.broadcast_to(v[:1, :1, :1, :1], v.shape) for k, v in batch.items()}
  _, (_, metrics) = loss_of(method, same)
  verdict = health.judge({k: float(v) for k, v in metrics.items()}, thresholds=health.HealthConfig())
  assert verdict.state == "collapsed" and "constant embedding" in verdict.message
  assert metrics["target_entropy"] > 0.99  # codes of equal features are uniform
  _, (_, healthy) = loss_of(method, batch)
  assert healthy["target_entropy"] < 0.99


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"queue_size": 6}, "queue_size=6.*multiple of config.batch_size=4; nearest: 4 or 8"),
    ({"num_prototypes": ()}, "num_prototypes=\\(\\)"),
    ({"num_prototypes": (5, 1)}, "num_prototypes=\\(5, 1\\)"),
    ({"epsilon": 0.0}, "epsilon=0.0"),
    ({"temperature": -1.0}, "temperature=-1.0"),
    ({"sinkhorn_iterations": 0}, "sinkhorn_iterations=0"),
    ({"large_crops": 1, "small_crops": 0}, "two crops in all"),
    ({"small_size": 12}, "small_size=12.*config.model.patch=8"),
    ({"std": (0.2,)}, "3 channels"),
    ({"gray": 1.2}, "gray=1.2"),
  ],
)
def test_impossible_options_are_clear_errors(tiny, changes, message):
  with pytest.raises(UserError, match=message):
    tiny[0].replace(**changes)


def test_a_crop_size_that_no_crop_has_is_not_checked(tiny):
  assert tiny[0].replace(small_crops=0, small_size=12).inputs().views
