"""LOCA: the public network, views and training steps replayed, its invariances, and what its options do."""

import dataclasses
import functools
from typing import Any

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.augment import resample
from big_ssl.augment.correspondence import patch_positions
from big_ssl.core import health, schedules
from big_ssl.core.config import OptimConfig
from big_ssl.core.optim import learning_rate, make_optimizer
from big_ssl.core.step import prepare
from big_ssl.core.types import Interval, TrainState, UserError
from big_ssl.methods.loca import LOCA
from big_ssl.models.encoder import encode
from big_ssl.models.vit import ViT
from big_ssl.weights.families import dump, load
from big_ssl.weights.keymap import Weights

SIZES = {"reference_size": 16, "query_size": 16, "focal_size": 8, "reference_seqlen": 5, "query_seqlen": 7}
DIALECT = {"class_token": False, "gelu": "tanh", "patch_init": "loca", "pos_rule": "linear"}


def vit(**changes):
  sizes = {"variant": "custom", "width": 32, "depth": 2, "heads": 4, "mlp_dim": 64, "patch": 4, "image_size": 16}
  return ViT(**(sizes | DIALECT | changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replayed(LOCA):
  """LOCA with the tokens and targets of a recording."""

  run: Any = None
  kept: Any = None

  def visible_run(self, rng):
    return self.run

  def kept_tokens(self, rng):
    return self.kept

  def query_positions(self, batch, name):
    return batch[f"{name}_positions"]


def under(z, prefix):
  return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}


def in_method(params):
  """Encoder and position head as the method keeps them."""
  return {"encoder": {k: v for k, v in params.items() if k != "position_head"}, "position_head": params["position_head"]}


def official(params):
  """The inverse, under scenic's names, of networks with 4 x 4 patches."""
  weights = Weights(params["encoder"] | {"position_head": params["position_head"]}, {})
  return dump("loca", weights, image_size=16, patch=4)


# The public code's numbers


def test_the_network_is_that_of_the_public_code(golden):
  z = golden("loca_vit_tiny")
  params = jax.tree.map(jnp.asarray, in_method(load("loca", under(z, "state/")).weights.params))
  method = LOCA(model=vit(), num_prototypes=24, hidden_dim=40, output_dim=16, **SIZES)
  see = functools.partial(encode, method.encoder, params["encoder"], {}, train=False)
  place = lambda x, r: method.position_head.apply({"params": params["position_head"]}, x, r)
  close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=0)
  reference = see(jnp.asarray(z["input/reference"])).out
  close(reference["projection"], z["output/reference_cluster_logits"])
  visible = reference["tokens"][:, z["input/reference_kept"]]
  close(visible, z["output/reference_visible_tokens"])
  query = see(jnp.asarray(z["input/query0"]), keep=jnp.asarray(z["input/query0_kept"])).out
  close(query["projection"], z["output/query0_cluster_logits"])
  close(place(query["tokens"], visible), z["output/query0_position_logits"])
  focal, tiled = jnp.asarray(z["input/focal"]), jnp.tile(visible, (2, 1, 1))
  close(see(focal).out["projection"], z["output/focal_cluster_logits"])
  close(place(see(focal).out["tokens"], tiled), z["output/focal_position_logits"])
  close(place(see(focal, add_positions=False).out["tokens"], tiled), z["output/focal_position_logits_without_pos_emb"])


def test_the_key_map_is_its_own_inverse_and_fits_a_fresh_network(golden):
  state = under(golden("loca_vit_tiny"), "state/")
  params = in_method(load("loca", state).weights.params)
  again = official(params)
  assert again.keys() == state.keys() and all(np.array_equal(again[k], state[k]) for k in state)
  method = LOCA(model=vit(), num_prototypes=24, hidden_dim=40, output_dim=16, **SIZES)
  fresh, _ = method.init(jax.random.key(0), {"reference": jnp.zeros((1, 1, 16, 16, 3))})
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(np.shape, params)
  with pytest.raises(UserError, match="encoderblock_0/LayerNorm_7/scale"):
    load("loca", state | {"encoderblock_0/LayerNorm_7/scale": np.zeros(4)})


def test_target_grids_are_those_of_the_public_code(golden):
  z = golden("loca_views")
  boxes = (jnp.asarray(z["reference_boxes_yxhw"], jnp.float32), jnp.asarray(z["query_boxes_yxhw"], jnp.float32)[:, None])
  flips = jnp.asarray(z["query_flipped"], bool)[:, None]
  found = jax.jit(functools.partial(patch_positions, grid=(7, 7), size=(24, 24), patch=8))(*boxes, flips)
  assert np.array_equal(found.reshape(z["target_positions"].shape), z["target_positions"])


def test_views_are_those_of_the_public_code(golden):
  z = golden("loca_views")
  image, cut = jnp.asarray(z["image"])[None] / 255.0, functools.partial(resample.cut, antialias=False)
  for name, size, flips in (("reference", 56, np.zeros(12)), ("query", 24, z["query_flipped"])):
    count = len(z[f"{name}_views"])
    boxes = jnp.asarray(z[f"{name}_boxes_yxhw"][None, :count], jnp.float32)
    views = cut(image, boxes, jnp.asarray(flips[None, :count], bool), size=size)[0]
    np.testing.assert_allclose(255.0 * views, z[f"{name}_views"], atol=1e-2)


def test_schedules_are_those_of_the_public_code(golden):
  z = golden("loca_schedules")
  lr = schedules.warmup_cosine(jnp.asarray(z["steps"]), start=0.0, peak=1e-3, final=1e-5, warmup=300, total=2000)
  below = z["steps"] < 2000
  np.testing.assert_allclose(np.asarray(lr)[below], z["learning_rate"][below], rtol=1e-4, atol=1e-9)
  method = LOCA(total_steps=2000)
  np.testing.assert_allclose(method.ema_momentum(jnp.asarray(z["steps"]))[below], z["teacher_momentum"][below], rtol=1e-6)


@pytest.mark.parametrize("batch", [1024, 512])
def test_the_recipe_peaks_at_a_thousandth_per_1024_images_and_ends_at_a_hundredth_of_it(batch):
  optim = engine.load("loca", "imagenet", batch_size=batch).optim
  examples = 100 * batch
  lr = learning_rate(optim, total_steps=10_000, batch_size=batch, examples=examples)
  np.testing.assert_allclose([lr(0), lr(1500), lr(9999)], [0.0, 1e-3 * batch / 1024, 1e-5 * batch / 1024], rtol=1e-3)


def replayed(z):
  method = Replayed(
    model=vit(),
    total_steps=10,
    momentum=0.9,
    reference_size=16,
    query_size=16,
    focal_size=8,
    focal_queries=2,
    reference_seqlen=5,
    query_seqlen=9,
    num_prototypes=16,
    hidden_dim=24,
    output_dim=12,
  )
  params, teacher = (jax.tree.map(jnp.asarray, in_method(load("loca", under(z, f"before/{name}/")).weights.params)) for name in ("params", "teacher"))
  optim = OptimConfig(lr=0.01, final_lr=1e-4, warmup=Interval(2, "steps"), weight_decay=0.1, clip=1.0)
  optimizer = make_optimizer(optim, params=params, rules=method.param_rules(), total_steps=10, batch_size=3, examples=1)
  # The public run begins at global step 1, while its optimizer counts from 0.
  state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), extra={"teacher": teacher})
  return method, optimizer, state


def recorded_batch(z, step, copies):
  get = lambda name: np.concatenate([z[f"step{step}/{name}"]] * copies)
  rows = get("reference").shape[0]
  batch = {"reference": get("reference")[:, None], "query": get("query0")[:, None]}
  batch["focal"] = np.stack([get("query1"), get("query2")], axis=1)
  batch["query_positions"] = get("query0_mask").reshape(rows, -1)
  batch["focal_positions"] = np.concatenate([get(f"query{i}_mask").reshape(rows, -1) for i in (1, 2)], axis=1)
  return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize("devices,copies", [(1, 1), (3, 1), (8, 8)])
def test_the_public_training_steps_are_reproduced(golden, devices, copies):
  """Copies of the whole batch change no mean, no share of a prototype and no balanced target: eight devices get three images each."""
  z = golden("loca_train_steps")
  method, optimizer, state = replayed(z)
  method = method.replace(batch_size=3 * copies, loss_groups=copies)
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  state = jax.device_put(state, NamedSharding(mesh, P()))

  @jax.jit
  def step(state, batch, run, kept):
    method_ = method.replace(run=run, kept=kept)
    loss = functools.partial(method_.loss, batch=batch, rng=jax.random.key(0), step=state.step)
    (total, (extra, metrics)), grads = jax.value_and_grad(lambda p: loss(p, state.extra), has_aux=True)(state.params)
    updated = optimizer.apply(state.params, grads, state.opt_state, state.step)
    extra = method_.post_update(updated.params, extra, state.step + 1)
    metrics = jnp.stack([total, metrics["cluster_ce"] + metrics["memax"], metrics["position_accuracy"], updated.metrics["lr"]])
    return TrainState(step=state.step + 1, params=updated.params, opt_state=updated.opt_state, extra=extra), metrics

  with jax.set_mesh(mesh):
    for i in range(3):
      batch = jax.device_put(recorded_batch(z, i, copies), NamedSharding(mesh, P("data")))
      state, metrics = step(state, batch, jnp.asarray(z["reference_kept"]), jnp.asarray(z["query0_kept"]))
      wanted = [z[k][i] for k in ("total_loss", "cluster_loss", "position_accuracy", "lr_at_optimizer_count")]
      np.testing.assert_allclose(metrics, wanted, rtol=1e-5, atol=1e-7, err_msg=f"step {i}")

  for name, tree in (("params", state.params), ("teacher", state.extra["teacher"])):
    for key, value in official(tree).items():
      # The softmax absorbs the key biases: their gradient is zero in truth, and Adam turns its rounding into steps of lr.
      atol = 2 * z["lr_at_optimizer_count"].sum() if key.endswith("key/bias") else 1e-4
      np.testing.assert_allclose(value, z[f"after/{name}/{key}"], atol=atol, rtol=0, err_msg=f"{name}/{key}")


# Invariances and options


@pytest.fixture(scope="module")
def tiny():
  """A method with random views, boxes and weights: (method, params, extra, batch)."""
  method = LOCA(
    model=vit(depth=1, mlp_dim=32),
    total_steps=10,
    batch_size=4,
    num_prototypes=8,
    output_dim=8,
    hidden_dim=16,
    reference_size=16,
    query_size=16,
    focal_size=8,
    focal_queries=2,
    reference_seqlen=4,
    query_seqlen=5,
  )
  rng = np.random.default_rng(0)
  batch = {"size": jnp.full((4, 2), 40.0)}
  for view in method.inputs().views:
    batch[view.name] = jnp.asarray(rng.normal(size=(4, view.count, *view.shape, 3)), jnp.float32)
    start = rng.integers(0, 15, (4, view.count, 2))
    box = np.concatenate([start, start + rng.integers(10, 25, start.shape)], axis=-1)
    batch[f"{view.name}_box"] = jnp.asarray(box / 40.0, jnp.float32)
    batch[f"{view.name}_flip"] = jnp.asarray(rng.random((4, view.count)) < view.flip)
  params, _ = method.init(jax.random.key(0), batch)
  teacher = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), params)
  return method, params, {"teacher": teacher}, batch


@functools.partial(jax.jit, static_argnums=0)
def value(method, params, extra, batch):
  return method.loss(params, extra, batch, jax.random.key(3), jnp.int32(0))[0]


@functools.partial(jax.jit, static_argnums=0)
def step_metrics(method, params, extra, batch):
  return method.loss(params, extra, batch, jax.random.key(3), jnp.int32(0))[1][1]


def test_a_permutation_of_the_prototypes_of_both_networks_leaves_the_loss(tiny):
  method, params, extra, batch = tiny
  order = np.array([5, 2, 7, 0, 1, 6, 3, 4])

  def permuted(tree):
    return jax.tree_util.tree_map_with_path(lambda path, x: x[:, order] if "prototypes" in jax.tree_util.keystr(path) else x, tree)

  loss = value(method, params, extra, batch)
  np.testing.assert_allclose(value(method, permuted(params), permuted(extra), batch), loss, rtol=1e-5)
  assert abs(float(value(method, permuted(params), extra, batch) - loss)) > 1e-4


def test_the_reference_branch_has_a_gradient_in_the_location_only_variant_alone(tiny):
  method, params, extra, batch = tiny
  of_pixels = lambda m: jax.grad(lambda x: value(m, params, extra, batch | {"reference": x}))(batch["reference"])
  assert not np.any(of_pixels(method)) and np.any(of_pixels(method.replace(cluster_loss=False)))
  assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(lambda e: value(method, params, e, batch))(extra)))


def test_only_the_visible_run_of_the_reference_places_the_queries(tiny):
  method, params, extra, batch = tiny
  method = method.replace(cluster_loss=False)
  run = np.asarray(method.visible_run(jax.random.split(jax.random.key(3), 5)[0]))
  hidden = np.setdiff1d(np.arange(16), run)
  assert len(run) == 4 and (np.diff(run) == 1).all() and 0 <= run[0] <= 12

  def repainted(token):
    y, x = 4 * (token // 4), 4 * (token % 4)
    return batch | {"reference": batch["reference"].at[:, :, y : y + 4, x : x + 4].add(1.0)}

  loss = value(method, params, extra, batch)
  assert value(method, params, extra, repainted(hidden[0])) == loss != value(method, params, extra, repainted(run[0]))


def test_the_run_and_the_kept_tokens_reach_every_place(tiny):
  method = tiny[0]
  keys = jax.random.split(jax.random.key(0), 200)
  runs, kept = (np.asarray(jax.vmap(draw)(keys)) for draw in (method.visible_run, method.kept_tokens))
  assert set(runs[:, 0]) == set(range(13)) and set(kept.ravel()) == set(range(16))
  assert all(len(set(row)) == 5 for row in kept)


def test_queries_have_no_positions_in_the_location_only_variant(tiny):
  method, params, extra, batch = tiny
  method = method.replace(cluster_loss=False, reference_seqlen=16)  # the whole reference; its order is told by positions alone
  same = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if "pos_embed" in jax.tree_util.keystr(path) else x, params)
  turned = lambda x: x.reshape(4, 2, 2, 4, 2, 4, 3)[:, :, ::-1].reshape(x.shape)
  swapped = batch | {"focal": turned(batch["focal"])}
  # Without positions a query is a set: its tokens move with its patches.
  @functools.partial(jax.jit, static_argnums=2)
  def tokens(b, p, add):
    return encode(method.encoder, p["encoder"], {}, b["focal"][:, 0], train=False, add_positions=add).out["tokens"]

  np.testing.assert_allclose(tokens(swapped, params, False)[:, [2, 3, 0, 1]], tokens(batch, params, False), atol=1e-5)
  assert np.abs(tokens(swapped, params, True)[:, [2, 3, 0, 1]] - tokens(batch, params, True)).max() > 1e-2
  assert value(method, params, extra, batch) != value(method, same, extra, batch)  # the reference keeps them


def test_loss_groups_average_over_the_parts_of_the_batch(tiny):
  method, params, extra, batch = tiny
  method = method.replace(cluster_loss=False)  # nothing is shared by the parts then
  part = lambda s: jax.tree.map(lambda x: x[s], batch)
  parts = [value(method, params, extra, part(s)) for s in (slice(None, 2), slice(2, None))]
  np.testing.assert_allclose(value(method.replace(loss_groups=2), params, extra, batch), np.mean(parts), rtol=1e-5)


def test_positions_come_from_the_boxes_and_flips_of_the_batch():
  """The pipeline's boxes through `prepare`, against the canvas of the definition."""
  method = LOCA(model=vit(), reference_size=16, query_size=16, focal_size=8, focal_queries=2, reference_seqlen=4, query_seqlen=5)
  method = method.replace(color_strength=0.0, gray=0.0, solarize=0.0)  # they take time to compile
  sizes, boxes = (37, 53), {"reference": [[3, 5, 30, 41]], "query": [[0, 0, 37, 53]], "focal": [[10, 20, 9, 14], [25, 1, 12, 11]]}
  raw = {"canvas": np.zeros((1, 64, 64, 3), np.uint8), "size": np.array([sizes], np.int32), "index": np.zeros(1, np.int32)}
  flips = {"reference": [False], "query": [True], "focal": [False, True]}
  for name, rows in boxes.items():
    raw |= {f"{name}/box": np.array([rows], np.float32), f"{name}/flip": np.array([flips[name]])}
  batch = prepare(method.inputs(), jax.tree.map(jnp.asarray, raw), None, jax.random.key(0))
  y0, x0, height, width = boxes["reference"][0]
  for name, side in (("query", 16), ("focal", 8)):
    wanted = []
    for (top, left, h, w), flip in zip(boxes[name], flips[name], strict=True):
      rows = [top + np.floor((4 * i + 2.5) * h / side) for i in range(side // 4)]
      columns = [left + np.floor((4 * j + 2.5) * w / side) for j in range(side // 4)]
      inside = lambda y, x: y0 <= y < y0 + height and x0 <= x < x0 + width
      grid = [int((y - y0 + 0.5) * 4 // height) * 4 + int((x - x0 + 0.5) * 4 // width) if inside(y, x) else -1 for y in rows for x in columns]
      wanted.append(np.array(grid).reshape(side // 4, -1)[:, :: -1 if flip else 1].ravel())
    assert np.array_equal(method.query_positions(batch, name)[0], np.concatenate(wanted)), name
    assert np.array_equal(batch[f"{name}_flip"][0], flips[name])


def test_constant_features_are_called_a_collapse(tiny):
  method, params, extra, batch = tiny
  thresholds = health.HealthConfig()
  judged = lambda p, e: health.judge(
    {k: float(v) for k, v in step_metrics(method, p, e, batch).items()}, thresholds=thresholds
  )
  assert judged(params, extra).state != "collapsed"

  def constant(tree):
    """The final norm of the backbone gives its bias alone."""
    norm = {"scale": jnp.zeros(32), "bias": jnp.ones(32)}
    return tree | {"encoder": tree["encoder"] | {"backbone": tree["encoder"]["backbone"] | {"norm": {"norm": norm}}}}

  verdict = judged(constant(params), {"teacher": constant(extra["teacher"])})
  assert verdict.state == "collapsed", verdict


@pytest.mark.slow
def test_a_short_run_places_patches_better_than_chance():
  config = engine.load("loca", **{"total": "60steps", "batch_size": 32, "data.train_examples": 256, "optim.warmup": "10steps"})
  _, history = engine.train_steps(config)
  last = {k: np.mean([h[k] for h in history[-10:]]) for k in ("position_accuracy", "valid_fraction", "prediction_mean_entropy")}
  assert last["position_accuracy"] > 1.3 / 36 and 0.6 < last["valid_fraction"] < 0.9 and last["prediction_mean_entropy"] > 0.8, last


@pytest.mark.parametrize(
  "field,bad,message",
  [
    ("reference_size", 18, "config.method.reference_size=18: .*config.model.patch=4"),
    ("focal_size", 10, "config.method.focal_size=10"),
    ("reference_seqlen", 17, "config.method.reference_seqlen=17: from 1 to the 16"),
    ("query_seqlen", 17, "config.method.query_seqlen=17"),
    ("focal_queries", 0, "config.method.focal_queries=0"),
    ("num_prototypes", 1, "config.method.num_prototypes=1"),
    ("sinkhorn_iterations", 0, "config.method.sinkhorn_iterations=0: at least 1"),
    ("temperature", 0.0, "config.method.temperature=0.0: expected a positive number"),
    ("sharpen", -0.05, "config.method.sharpen=-0.05: expected a positive number"),
    ("momentum", 1.1, r"config.method.momentum=1.1: expected a share in \[0, 1\]"),
    ("loss_groups", 3, "config.method.loss_groups=3: must divide config.batch_size=4"),
    ("mean", (0.5,), "mean=.*3 channels"),
    ("model", vit(stem_channels=(8, 16)), "config.model: LOCA needs a ViT"),
  ],
)
def test_impossible_options_are_clear_errors(tiny, field, bad, message):
  with pytest.raises(UserError, match=message):
    tiny[0].replace(**{field: bad})
