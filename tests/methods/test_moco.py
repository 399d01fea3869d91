"""MoCo v1 and v2: a step of the official code, the queue, shuffled batch normalization."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core import health
from big_ssl.core.types import UserError
from big_ssl.methods.moco import MoCo
from big_ssl.models.layers import BatchNorm


class Body(nn.Module):
  """Linear, ReLU, as the encoder of the recording; with `norm` a BN between, frozen or by `groups`."""

  width: int = 20
  norm: str = "none"
  groups: int = 1

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Dense(self.width, name="body")(x.reshape(x.shape[0], -1))
    if self.norm != "none":
      x = BatchNorm(groups=self.groups, name="bn")(x, train=train and self.norm == "train")
    return {"pooled": nn.relu(x)}


def make(model=None, **fields):
  defaults = dict(queue_size=32, batch_size=8, total_steps=10, hidden_dim=20, output_dim=16, momentum=0.99, momentum_final=0.99)
  return MoCo(model=model or Body(), **(defaults | fields))


def start(method, seed=0):
  views = jax.random.normal(jax.random.key(seed), (method.batch_size, 2, 12))
  params, extra = method.init(jax.random.key(seed + 1), {"views": views})
  return params, extra, views


def run(method, params, extra, steps, first=0):
  """The queue's course over steps without updates of the query encoder; returns extra and the keys of each step."""
  seen, step = [], jax.jit(method.loss)
  for i in range(first, first + steps):
    views = jax.random.normal(jax.random.key(100 + i), (method.batch_size, 2, 12))
    before = int(extra["queue_pointer"])
    _, (extra, _) = step(params, extra, {"views": views}, jax.random.key(i), jnp.int32(i))
    seen.append(np.asarray(extra["queue"][before : before + method.batch_size]))
  return extra, seen


def linear(z, name):
  return {"kernel": z[f"{name}.weight"].T, "bias": z[f"{name}.bias"]}


def tree(z, name):
  return {
    "backbone": {"body": linear(z, f"{name}/body")},
    "head": {"fc1": linear(z, f"{name}/fc.0"), "fc2": linear(z, f"{name}/fc.2")},
  }


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_of_the_official_code_is_reproduced(golden, devices, shuffle):
  z = golden("moco_step")
  m = float(z["momentum"])
  method = make(temperature=float(z["temperature"]), momentum=m, momentum_final=m, shuffle_bn=shuffle)
  params = {"encoder": tree(z, "encoder_q")}
  queue = {"queue": z["queue"].T, "queue_pointer": jnp.int32(z["queue_ptr"])}
  extra = {"teacher": tree(z, "encoder_k"), "batch_stats": {}, "teacher_batch_stats": {}} | queue
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  views = jax.device_put(np.stack([z["im_q"], z["im_k"]], axis=1), NamedSharding(mesh, P("data")))
  params, extra = jax.device_put(jax.tree.map(jnp.asarray, (params, extra)), NamedSharding(mesh, P()))

  def loss(params, views):
    return method.loss(params, extra, {"views": views}, jax.random.key(0), jnp.int32(3))

  (value, (after, _)), (grads, grad_views) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, views)
  np.testing.assert_allclose(value, z["loss"], rtol=1e-5)
  np.testing.assert_allclose(grad_views[:, 0], z["grad_im_q"], atol=1e-6)
  assert not np.any(grad_views[:, 1])
  np.testing.assert_allclose(after["queue"].T, z["new_queue"], atol=1e-6)
  assert int(after["queue_pointer"]) == int(z["new_queue_ptr"])
  for got, name in ((grads["encoder"], "grad_encoder_q"), (after["teacher"], "new_encoder_k")):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree(z, name)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)


def test_after_as_many_batches_as_fit_no_initial_row_is_left_and_the_order_is_first_in_first_out():
  method = make()
  params, extra, _ = start(method)
  initial = np.asarray(extra["queue"])
  np.testing.assert_allclose(np.linalg.norm(initial, axis=1), 1, rtol=1e-5)
  extra, seen = run(method, params, extra, steps=3)
  np.testing.assert_array_equal(extra["queue"][24:], initial[24:])
  extra, more = run(method, params, extra, steps=1, first=3)
  assert not (np.asarray(extra["queue"])[:, None] == initial[None]).all(-1).any()
  np.testing.assert_array_equal(extra["queue"], np.concatenate(seen + more))
  extra, last = run(method, params, extra, steps=1, first=4)
  np.testing.assert_array_equal(extra["queue"], np.concatenate(last + seen[1:] + more))
  assert int(extra["queue_pointer"]) == 8


def test_the_queue_goes_on_where_it_was_after_a_round_trip_through_the_host():
  method = make()
  params, extra, _ = start(method)
  whole, _ = run(method, params, extra, steps=6)
  half, _ = run(method, params, extra, steps=3)
  again, _ = run(method, params, jax.tree.map(lambda x: jnp.asarray(np.asarray(x).copy()), half), steps=3, first=3)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)


def keys_of(method, extra, images, seed=5):
  return method.encode_keys(extra, images, jax.random.key(seed)).out["projection"]


def test_shuffling_and_bringing_back_changes_nothing_with_frozen_or_whole_batch_normalization():
  for body in (Body(norm="frozen"), Body(norm="train")):
    method = make(body)
    _, extra, views = start(method)
    stats = extra["teacher_batch_stats"]["backbone"]["bn"]
    extra = extra | {"teacher_batch_stats": {"backbone": {"bn": {"mean": stats["mean"] + 0.3, "var": stats["var"] * 2}}}}
    plain = keys_of(method.replace(shuffle_bn=False), extra, views[:, 1])
    np.testing.assert_allclose(keys_of(method, extra, views[:, 1]), plain, atol=1e-6)


def test_with_statistics_per_group_shuffling_takes_the_key_out_of_the_group_of_its_query():
  method = make(Body(norm="train", groups=4))
  _, extra, views = start(method)
  plain = keys_of(method.replace(shuffle_bn=False), extra, views[:, 1])
  first, second = keys_of(method, extra, views[:, 1]), keys_of(method, extra, views[:, 1], seed=6)
  assert np.abs(first - plain).max() > 1e-3 and np.abs(first - second).max() > 1e-3


def test_the_key_encoder_averages_weights_with_last_updates_query_and_keeps_its_own_statistics():
  method = make(Body(norm="train"), momentum=0.75, momentum_final=0.75)
  params, extra, views = start(method)
  moved = jax.tree.map(lambda x: x + 1, params)
  _, (after, _) = method.loss(moved, extra, {"views": views}, jax.random.key(0), jnp.int32(0))
  for old, new in zip(jax.tree.leaves(extra["teacher"]), jax.tree.leaves(after["teacher"]), strict=True):
    np.testing.assert_allclose(new, old + 0.25, rtol=1e-5, atol=1e-6)
  body = after["teacher"]["backbone"]["body"]
  mean = 0.1 * np.mean(views[:, 1] @ body["kernel"] + body["bias"], axis=0)
  np.testing.assert_allclose(after["teacher_batch_stats"]["backbone"]["bn"]["mean"], mean, rtol=1e-4, atol=1e-6)
  keys = keys_of(method, extra | {"teacher": after["teacher"]}, views[:, 1])  # of the new weights, in train mode
  np.testing.assert_allclose(after["queue"][:8], keys / np.linalg.norm(keys, axis=1, keepdims=True), atol=1e-5)


def test_symmetric_adds_both_directions_and_queues_the_keys_of_both_views():
  method = make(symmetric=True)
  params, extra, views = start(method)
  loss = lambda m, v: m.loss(params, extra, {"views": v}, jax.random.key(0), jnp.int32(0))
  total, (after, _) = loss(method, views)
  one, (first, _) = loss(method.replace(symmetric=False), views)
  two, (second, _) = loss(method.replace(symmetric=False), views[:, ::-1])
  np.testing.assert_allclose(total, one + two, rtol=1e-5)
  np.testing.assert_allclose(after["queue"][:8], second["queue"][:8], atol=1e-6)  # keys of the first view
  np.testing.assert_allclose(after["queue"][8:16], first["queue"][:8], atol=1e-6)
  assert int(after["queue_pointer"]) == 16


def test_v1_has_one_linear_map_and_the_loss_of_its_equation():
  method = make(head_layers=1, temperature=0.07)
  params, extra, views = start(method)
  assert set(params["encoder"]["head"]) == {"fc1"}
  params = jax.tree.map(lambda x: x + 0.1, params)  # the key encoder has moved a hundredth of the way
  loss, (after, metrics) = method.loss(params, extra, {"views": views}, jax.random.key(0), jnp.int32(0))

  def embed(tree, x):
    body, head = (jax.tree.map(lambda a: np.asarray(a, np.float64), tree[k]) for k in ("backbone", "head"))
    hidden = np.maximum(np.asarray(x, np.float64) @ body["body"]["kernel"] + body["body"]["bias"], 0)
    z = hidden @ head["fc1"]["kernel"] + head["fc1"]["bias"]
    return z / np.linalg.norm(z, axis=1, keepdims=True)

  q, k = embed(params["encoder"], views[:, 0]), embed(after["teacher"], views[:, 1])
  logits = np.concatenate([np.sum(q * k, axis=1, keepdims=True), q @ np.asarray(extra["queue"], np.float64).T], axis=1) / 0.07
  np.testing.assert_allclose(loss, np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0]), rtol=1e-5)
  np.testing.assert_allclose(metrics["contrastive_accuracy"], np.mean(logits.argmax(1) == 0))


def test_v1_is_gray_before_the_jitter_and_v2_after():
  names = lambda m: [type(a).__name__ for a in m.inputs().views[0].augment]
  assert names(make())[:2] == ["ColorJitter", "Grayscale"] and names(make(gray_first=True))[:2] == ["Grayscale", "ColorJitter"]


def test_a_planted_constant_embedding_is_called_collapsed():
  method = make()
  params, extra, views = start(method)
  head = params["encoder"]["head"]
  constant = head | {"fc2": {"kernel": jnp.zeros((20, 16)), "bias": jnp.ones(16)}}
  for layer, wanted in ((head, "healthy"), (constant, "collapsed")):
    planted = {"encoder": params["encoder"] | {"head": layer}}
    loss, (_, metrics) = method.loss(planted, extra, {"views": views}, jax.random.key(0), jnp.int32(0))
    verdict = health.judge({k: float(v) for k, v in metrics.items()} | {"loss": float(loss)}, thresholds=health.HealthConfig())
    assert verdict.state == wanted, verdict


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(queue_size=36), "config.method.queue_size=36.*config.batch_size=8"),
    (dict(queue_size=4), "config.method.queue_size=4.*config.batch_size=8"),
    (dict(queue_size=24, symmetric=True), "config.method.queue_size=24.*config.batch_size=8"),
    (dict(temperature=0.0), "config.method.temperature=0.0"),
    (dict(momentum=1.2), "config.method.momentum=1.2"),
    (dict(head_layers=0), "config.method.head_layers=0"),
    (dict(output_dim=0), "config.method.output_dim=0"),
  ],
)
def test_impossible_options_are_clear_errors_before_the_first_step(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(make(), **changes)
