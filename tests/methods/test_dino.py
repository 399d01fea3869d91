"""DINO: the official training loop replayed, its optimizer groups, its views, its invariances and its collapses."""

import ast
import functools

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.augment.photometric import ColorJitter, GaussianBlur, Grayscale, Normalize, Solarize
from big_ssl.core import health
from big_ssl.core.config import OptimConfig
from big_ssl.core.optim import make_optimizer, match_rules
from big_ssl.core.types import Interval, TrainState, UserError
from big_ssl.methods.dino import DINO
from big_ssl.models.positions import resample
from big_ssl.models.resnet import ResNet
from big_ssl.models.vit import ViT
from big_ssl.weights.families import dump, load
from big_ssl.weights.keymap import Weights


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def state_of(z, prefix):
  return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}


# 1. The official training loop


def setup(z):
  c = ast.literal_eval(str(z["config"]))
  total = c["epochs"] * c["iters_per_epoch"]
  method = DINO(
    model=ViT(
      variant="custom", width=c["dim"], depth=c["depth"], heads=c["heads"], mlp_dim=4 * c["dim"], patch=c["patch"], image_size=c["img"]
    ),
    total_steps=total,
    batch_size=c["batch"],
    num_examples=c["batch"] * c["iters_per_epoch"],
    num_prototypes=c["out_dim"],
    hidden_dim=c["head_hidden"],
    bottleneck_dim=c["bottleneck"],
    head_batch_norm=c["bn_in_head"],
    fix_scale=c["norm_last_layer"],
    freeze_epochs=c["freeze_last_layer"],
    teacher_temperature=float(z["teacher_temp"][-1]),
    teacher_temperature_start=float(z["teacher_temp"][0]),
    teacher_warmup_epochs=c["teacher_temp_warmup_epochs"],
    momentum=float(z["ema_momentum"][0]),
    local_views=c["n_local"],
    global_size=c["img"],
    local_size=c["local"],
  )
  student, teacher = (
    load("dino", state_of(z, f"state_initial/{name}/"), heads=c["heads"]).weights for name in ("student", "teacher")
  )
  params = {"encoder": student.params}
  extra = {
    "teacher": teacher.params,
    "batch_stats": student.batch_stats,
    "teacher_batch_stats": teacher.batch_stats,
    "center": np.zeros(c["out_dim"], np.float32),
  }
  optim = OptimConfig(
    name=c["optimizer"],
    lr=float(z["lr"].max()),
    final_lr=1e-6,
    warmup=Interval(c["lr_warmup_epochs"], "epochs"),
    warmup_inclusive=True,
    weight_decay=0.04,
    weight_decay_final=0.4,
    clip=c["clip"],
    clip_by="tensor",
  )
  params, extra = jax.tree.map(jnp.asarray, (params, extra))
  run = dict(total_steps=total, batch_size=c["batch"], examples=method.num_examples)
  optimizer = make_optimizer(optim, params=params, rules=method.param_rules(), **run)
  state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), extra=extra)
  return c, method, optimizer, state


def without_key_bias(name, value):
  """The key's bias has a gradient of exactly zero, and Adam turns its rounding into steps."""
  return np.delete(value, slice(len(value) // 3, 2 * len(value) // 3)) if name.endswith("qkv.bias") else value


def official(weights):
  """Official names, with the prefix of full checkpoints."""
  named = dump("dino", weights, heads=2)
  return {name if name.startswith("head.") else f"backbone.{name}": value for name, value in named.items()}


def check_trees(state, z, prefix):
  trees = {
    "student": Weights(state.params["encoder"], state.extra["batch_stats"]),
    "teacher": Weights(state.extra["teacher"], state.extra["teacher_batch_stats"]),
  }
  compared = 0
  for tree, weights in trees.items():
    mine = official(weights)
    for name, wanted in state_of(z, f"{prefix}/{tree}/").items():
      if not name.endswith("num_batches_tracked"):
        value, wanted = without_key_bias(name, mine[name]), without_key_bias(name, wanted)
        np.testing.assert_allclose(value, wanted, atol=5e-5, rtol=0, err_msg=f"{prefix}/{tree}/{name}")
        compared += 1
  return compared


@pytest.mark.parametrize("name,devices", [("dino_train_steps", 1), ("dino_train_steps", 4), ("dino_train_steps_bn_sgd", 1), ("dino_train_steps_bn_sgd", 5)])
def test_the_official_training_loop_is_reproduced(golden, name, devices):
  z = golden(name)
  c, method, optimizer, state = setup(z)
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  state = jax.device_put(state, NamedSharding(mesh, P()))

  @jax.jit
  def step(state, batch):
    loss = functools.partial(method.loss, batch=batch, rng=jax.random.key(0), step=state.step)
    (total, (extra, metrics)), grads = jax.value_and_grad(lambda p: loss(p, state.extra), has_aux=True)(state.params)
    updated = optimizer.apply(state.params, grads, state.opt_state, state.step)
    extra = method.post_update(updated.params, extra, state.step)
    curves = {"lr": updated.metrics["lr"], "wd": updated.metrics["weight_decay"], "ema_momentum": method.ema_momentum(state.step)}
    new = TrainState(step=state.step + 1, params=updated.params, opt_state=updated.opt_state, extra=extra)
    return new, total, curves | {"teacher_temp": metrics["teacher_temperature"]}

  for epoch in range(c["epochs"]):
    for i in range(c["iters_per_epoch"]):
      key, n = f"images/epoch{epoch}/iter{i}", epoch * c["iters_per_epoch"] + i
      large, small = (nhwc(z[f"{key}/{kind}"]).swapaxes(0, 1) for kind in ("global", "local"))
      batch = {"global1": large[:, :1], "global2": large[:, 1:], "local": small}
      state, loss, curves = step(state, jax.device_put(batch, NamedSharding(mesh, P("data"))))
      np.testing.assert_allclose(loss, z["losses"][epoch, i], rtol=1e-4, err_msg=key)
      for curve, value in curves.items():
        np.testing.assert_allclose(value, z[curve][epoch if curve == "teacher_temp" else n], rtol=1e-5, atol=1e-9, err_msg=f"{curve} {n}")
    np.testing.assert_allclose(state.extra["center"], z[f"after_epoch{epoch}/centre"][0], atol=5e-5)
    check_trees(state, z, f"after_epoch{epoch}")
  assert check_trees(state, z, "state_final") > 60


# 2. Goldens of the parts


def test_the_optimizer_groups_of_the_reference(golden):
  z = golden("dino_param_groups")
  state = {str(n): np.zeros(ast.literal_eval(str(s)), np.float32) for n, s in zip(z["names"], z["shapes"], strict=True)}
  norms = [n for n, v in state.items() if n.startswith("head.mlp") and n.endswith("weight") and v.ndim == 1]
  state |= {n.replace("weight", f"running_{kind}"): state[n] for n in norms for kind in ("mean", "var")}
  method = DINO(freeze_epochs=1)
  params = {"encoder": load("dino", state, heads=2).weights.params}
  tensors = match_rules(params, method.param_rules(), batch_size=1, examples=7)
  place = {t.path: t for t in tensors}
  for i, name in enumerate(z["names"]):
    found = place[path_of(str(name), state)]
    in_optimizer = found.rule.lr_mult > 0
    assert in_optimizer == z["in_optimizer"][i], name
    assert (in_optimizer and found.rule.weight_decay > 0) == z["decayed"][i], name
    assert (not in_optimizer or found.freeze_steps == 7) == z["frozen_in_first_epochs"][i], name


def path_of(name, state):
  """Where the importer puts a tensor: the one leaf that is not zero when only this tensor is."""
  marked = {k: np.ones_like(v) if k == name else v for k, v in state.items()}
  leaves = jax.tree_util.tree_leaves_with_path({"encoder": load("dino", marked, heads=2).weights.params})
  return next(jax.tree_util.keystr(p, simple=True, separator="/") for p, leaf in leaves if np.any(leaf))


def test_a_trained_scale_is_decayed_as_in_the_reference():
  params = {"encoder": {"head": {"last_layer": {"g": np.ones((4, 1)), "v": np.ones((4, 2))}}}}
  tensors = match_rules(params, DINO(fix_scale=False).param_rules(), batch_size=1, examples=1)
  assert all(t.rule.weight_decay == 1 and t.rule.lr_mult == 1 for t in tensors)


@pytest.mark.parametrize("size", ["224x224", "96x96", "480x480", "96x160"])
def test_positions_are_interpolated_as_in_the_reference(golden, size):
  z = golden("dino_pos_interp")
  image = tuple(int(n) for n in size.split("x"))
  out = resample(z["pos_embed"][0, 1:], rule="dino", grid=(image[0] // 16, image[1] // 16), image=image)
  np.testing.assert_allclose(out, z[f"interp/{size}"][0, 1:], atol=1e-5)


def test_lars_of_the_reference(golden):
  z = golden("dino_lars")
  names = [k.removeprefix("param0/") for k in z if k.startswith("param0/")]
  ours = {n: n.replace(".weight", "/scale" if z[f"param0/{n}"].ndim == 1 else "/kernel").replace(".bias", "/bias") for n in names}
  config = OptimConfig(
    name="lars",
    lr=float(z["lr"]),
    schedule="constant",
    weight_decay=float(z["weight_decay"]),
    momentum=float(z["momentum"]),
    trust_coefficient=float(z["eta"]),
  )
  params = {ours[n]: jnp.asarray(z[f"param0/{n}"]) for n in names}
  optimizer = make_optimizer(config, params=params, rules=DINO().param_rules(), total_steps=3, batch_size=1, examples=1)
  opt_state = optimizer.init(params)
  for i in range(3):
    updated = optimizer.apply(params, {ours[n]: jnp.asarray(z[f"step{i}/grad/{n}"]) for n in names}, opt_state, jnp.int32(i))
    params, opt_state = updated.params, updated.opt_state
    for n in names:
      np.testing.assert_allclose(params[ours[n]], z[f"step{i}/param/{n}"], rtol=1e-5, atol=1e-6, err_msg=f"{i} {n}")
      np.testing.assert_allclose(opt_state["momentum"][ours[n]], z[f"step{i}/momentum/{n}"], rtol=1e-5, atol=1e-6, err_msg=f"{i} {n}")


@pytest.mark.parametrize("case", [0, 1])
def test_the_teacher_temperature_moves_once_an_epoch(golden, case):
  z = golden("dino_schedules")
  start, final, warmup, epochs = z[f"teacher_temp{case}/start_final_warmup_nepochs"]
  method = DINO(
    teacher_temperature=float(final),
    teacher_temperature_start=float(start),
    teacher_warmup_epochs=int(warmup),
    total_steps=int(epochs) * 7,
    batch_size=10,
    num_examples=70,
  )
  steps = np.arange(method.total_steps)
  got = jax.vmap(method.temperature)(jnp.asarray(steps))
  np.testing.assert_allclose(got, z[f"teacher_temp{case}/per_epoch"][steps // 7], rtol=1e-6)


# 3. Views


def test_the_views_are_those_of_the_table():
  views = {v.name: v for v in DINO().inputs().views}
  expected = {  # count, size, scale, blur, solarize
    "global1": (1, 224, (0.4, 1.0), 1.0, 0.0),
    "global2": (1, 224, (0.4, 1.0), 0.1, 0.2),
    "local": (8, 96, (0.05, 0.4), 0.5, 0.0),
  }
  assert set(views) == set(expected)
  for name, (count, size, scale, blur, solarize) in expected.items():
    view = views[name]
    assert (view.count, view.size, view.scale, view.ratio) == (count, size, scale, (3 / 4, 4 / 3))
    assert (view.crop, view.interpolation, view.flip) == ("random_resized", "bicubic", 0.5)
    operations = [ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8), Grayscale(p=0.2)]
    operations += [GaussianBlur(p=blur, sigma=(0.1, 2.0))] + ([Solarize(p=solarize)] if solarize else []) + [Normalize()]
    assert view.augment == tuple(operations)
  assert DINO(local_views=0, global_views=3).inputs().views[1].count == 2
  assert "local" not in {v.name for v in DINO(local_views=0).inputs().views}


# 4. What the method keeps


def make(model=None, **options):
  model = model or ViT(variant="custom", width=24, depth=2, heads=2, mlp_dim=48, patch=8, image_size=32)
  sizes = dict(num_prototypes=16, hidden_dim=16, bottleneck_dim=8, global_size=32, local_size=16, local_views=2)
  method = DINO(model=model, total_steps=10, batch_size=4, num_examples=8, **(sizes | options))
  rng = np.random.default_rng(0)
  views = {v.name: (4, v.count, v.size, v.size, 3) for v in method.inputs().views}
  batch = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in views.items()}
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  return method, params, extra, batch


@pytest.fixture(scope="module")
def tiny():
  return make()


def loss_of(method, params, extra, batch, step=0, key=0):
  return engine.loss(method)(params, extra, batch, jax.random.key(key), jnp.int32(step))


def test_the_order_of_the_images_changes_neither_loss_nor_center(tiny):
  method, params, extra, batch = tiny
  total, (new, _) = loss_of(*tiny)
  order = np.array([2, 0, 3, 1])
  again, (moved, _) = loss_of(method, params, extra, {k: v[order] for k, v in batch.items()})
  np.testing.assert_allclose(again, total, rtol=1e-6)
  np.testing.assert_allclose(moved["center"], new["center"], atol=1e-7)
  assert np.any(new["center"])


def test_the_teacher_sees_the_large_crops_only_and_passes_no_gradient(tiny):
  method, params, extra, batch = tiny
  other = batch | {"local": batch["local"] + 1.0}
  assert np.array_equal(loss_of(method, params, extra, other)[1][0]["center"], loss_of(*tiny)[1][0]["center"])
  grads = jax.grad(lambda e: loss_of(method, params, e, batch)[0])({k: extra[k] for k in ("teacher", "center", "batch_stats", "teacher_batch_stats")})
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_only_the_student_drops_paths():
  dropped = make(ViT(variant="custom", width=24, depth=2, heads=2, mlp_dim=48, patch=8, image_size=32, drop_path=0.5))
  (one, (first, _)), (two, (second, _)) = loss_of(*dropped, key=0), loss_of(*dropped, key=1)
  assert float(one) != float(two)
  assert np.array_equal(first["center"], second["center"])


def test_a_convolutional_teacher_normalizes_by_its_batch_and_keeps_its_own_statistics():
  method, params, extra, batch = make(ResNet(depth=18, stem="cifar", blocks=(1, 1), stem_width=4), head_batch_norm=True)
  shifted = jax.tree.map(lambda x: x + 3.0, extra["teacher_batch_stats"])
  total, (new, _) = loss_of(method, params, extra, batch)
  again, (moved, _) = loss_of(method, params, extra | {"teacher_batch_stats": shifted}, batch)
  np.testing.assert_allclose(again, total, rtol=1e-6)  # running statistics are not read in training
  changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), moved["teacher_batch_stats"], new["teacher_batch_stats"])
  assert all(jax.tree.leaves(changed))
  differs = jax.tree.map(lambda a, b: bool(np.any(a != b)), new["batch_stats"], new["teacher_batch_stats"])
  assert any(jax.tree.leaves(differs))  # the student's saw the small crops too
  after = method.post_update(params, new, jnp.int32(0))
  assert jax.tree.all(jax.tree.map(np.array_equal, after["teacher_batch_stats"], new["teacher_batch_stats"]))


def test_a_convolutional_checkpoint_goes_out_and_in_bit_for_bit():
  _, params, extra, _ = make(ResNet(depth=18, stem="cifar", blocks=(1, 1), stem_width=4), head_batch_norm=True)
  state = dump("dino_resnet", Weights(params["encoder"], extra["batch_stats"]))
  assert {"conv1.weight", "layer1.0.bn1.running_mean", "bn1.num_batches_tracked", "head.mlp.1.running_var", "head.last_layer.weight_g"} <= set(state)
  again = load("dino_resnet", {f"module.{k}": v for k, v in state.items()}).weights
  for mine, wanted in ((again.params, params["encoder"]), (again.batch_stats, extra["batch_stats"])):
    assert jax.tree.all(jax.tree.map(np.array_equal, mine, dict(wanted)))


def test_the_teacher_follows_the_new_student_by_the_cosine_of_the_momentum(tiny):
  method, params, extra, _ = tiny
  moved = {"encoder": jax.tree.map(lambda x: x + 1.0, params["encoder"])}
  after = method.post_update(moved, extra, jnp.int32(5))["teacher"]
  m = 1 - 0.004 * 0.5 * (1 + np.cos(np.pi * 5 / 10))
  for old, new in zip(jax.tree.leaves(extra["teacher"]), jax.tree.leaves(after), strict=True):
    np.testing.assert_allclose(new, old + (1 - m), rtol=1e-4, atol=1e-6)


def test_features_are_the_teachers_cls_after_the_final_norm(tiny):
  method, params, extra, _ = tiny
  images = jax.random.normal(jax.random.key(5), (3, 1, 32, 32, 3))
  out = method.features(params, extra, {"image": images})
  direct = method.model.apply({"params": extra["teacher"]["backbone"]}, images[:, 0], train=False)
  np.testing.assert_allclose(out["pooled"], direct["cls"], atol=1e-6)
  np.testing.assert_allclose(out["cls_layers_normed"][:, -1], direct["cls"], atol=1e-5)
  other = method.features(jax.tree.map(jnp.zeros_like, params), extra, {"image": images})
  np.testing.assert_array_equal(other["pooled"], out["pooled"])


def test_the_loss_is_the_teachers_entropy_and_the_divergence(tiny):
  total, (_, metrics) = loss_of(*tiny)
  np.testing.assert_allclose(metrics["target_nats"] + metrics["kl"], total, rtol=1e-6)
  assert 0 < float(metrics["target_nats"]) < np.log(16) and float(metrics["kl"]) > 0


# 5. Collapses and mistakes


def verdict(metrics):
  return health.judge({k: float(v) for k, v in metrics.items()}, thresholds=health.HealthConfig())


def test_a_uniform_collapse_is_seen(tiny):
  method, params, extra, batch = tiny
  last = params["encoder"]["head"]["last_layer"]
  flat = lambda tree: tree | {"head": tree["head"] | {"last_layer": last | {"v": jnp.ones_like(last["v"])}}}
  _, (_, metrics) = loss_of(method, {"encoder": flat(params["encoder"])}, extra | {"teacher": flat(extra["teacher"])}, batch)
  assert float(metrics["target_entropy"]) > 0.999 and float(metrics["kl"]) < 1e-4
  assert verdict(metrics).state == "collapsed" and "uniform collapse" in verdict(metrics).message


def test_a_collapse_to_one_dimension_is_seen(tiny):
  method, params, extra, batch = tiny
  _, (_, metrics) = loss_of(method, params, extra | {"center": extra["center"].at[3].set(-5.0)}, batch)
  assert float(metrics["target_mean_entropy"]) < 0.01
  assert verdict(metrics).state == "collapsed" and "one-prototype collapse" in verdict(metrics).message


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(num_prototypes=1), "num_prototypes=1: at least 2"),
    (dict(global_views=1, local_views=0), "global_views=1, local_views=0: .* two in all"),
    (dict(global_views=0), "global_views=0"),
    (dict(local_size=12), "local_size=12.*config.model.patch=8"),
    (dict(global_size=36), "global_size=36.*config.model.patch=8"),
    (dict(teacher_warmup_epochs=6), "teacher_warmup_epochs=6: longer than the training, 5 epochs"),
    (dict(teacher_temperature=0.0), "teacher_temperature=0.0"),
    (dict(center_momentum=1.5), "center_momentum=1.5"),
    (dict(solarize=-0.1), "solarize=-0.1"),
    (dict(mean=(0.5,)), "3 channels"),
  ],
)
def test_impossible_options_are_clear_errors(tiny, changes, message):
  with pytest.raises(UserError, match=message):
    tiny[0].replace(**changes)


def test_a_crop_size_that_no_crop_has_is_not_checked(tiny):
  assert tiny[0].replace(local_views=0, local_size=12).inputs().views
