"""BYOL: its update and schedules as released, BN per view, the classifier alongside, and collapse without predictor."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core import health
from big_ssl.core.config import OptimConfig
from big_ssl.core.optim import learning_rate
from big_ssl.core.types import Interval, UserError
from big_ssl.losses.regression import normalized_mse
from big_ssl.methods.byol import BYOL


class Flat(nn.Module):
  """The pixels through one layer."""

  @nn.compact
  def __call__(self, images, *, train):
    return {"pooled": nn.relu(nn.Dense(32, name="fc")(images.reshape(images.shape[0], -1)))}


def make(**fields):
  return BYOL(model=Flat(), **(dict(total_steps=400, hidden_dim=32, output_dim=8) | fields))


@pytest.fixture(scope="module")
def tiny():
  method = make(num_classes=3, online_classifier=True)
  keys = jax.random.split(jax.random.key(0), 2)
  batch = {f"view{i + 1}": jax.random.normal(k, (16, 1, 2, 2, 3)) for i, k in enumerate(keys)}
  batch["label"] = jnp.arange(16) % 3
  return method, *method.init(jax.random.key(1), batch), batch


def loss_of(method, params, extra, batch):
  return jax.jit(method.loss)(params, extra, batch, jax.random.key(0), jnp.int32(0))


def test_the_target_moves_as_in_the_released_code(golden):
  z = golden("byol_loss")
  method = make(momentum=float(z["tau"]))
  online = {"head": jnp.asarray(z["online_param_after_update"]), "predictor": jnp.zeros(3)}
  extra = method.post_update({"encoder": online}, {"teacher": {"head": jnp.asarray(z["target_param"])}}, jnp.int32(0))
  np.testing.assert_allclose(extra["teacher"]["head"], z["new_target_param"], rtol=1e-6, atol=1e-7)


def test_learning_rate_and_momentum_are_the_released_curves(golden):
  z = golden("byol_schedules")
  config = OptimConfig(name="lars", lr=0.2, lr_scale="linear", warmup=Interval(100, "steps"))
  lr = learning_rate(config, total_steps=1000, batch_size=4096, examples=1)
  method = make(total_steps=1000)
  # The reference is float32 and cancels in 1 + cos.
  np.testing.assert_allclose([float(lr(s)) for s in z["step"]], z["learning_rate"], rtol=1e-6, atol=1e-7 * 3.2)
  np.testing.assert_allclose([float(method.ema_momentum(s)) for s in z["step"]], z["tau"], rtol=1e-6)


def test_the_loss_is_the_sum_of_both_directions_of_separate_passes_with_statistics_of_each_view(tiny):
  method, params, extra, batch = tiny
  _, (after, metrics) = loss_of(method, params, extra, batch)

  def norm(x, p):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * p["scale"] + p["bias"]

  def mlp(x, p):
    return np.maximum(norm(x @ p["fc1"]["kernel"] + p["fc1"]["bias"], p["bn1"]), 0) @ p["fc2"]["kernel"]

  def project(view, p):
    x = np.asarray(batch[view]).reshape(16, -1) @ p["backbone"]["fc"]["kernel"] + p["backbone"]["fc"]["bias"]
    return mlp(np.maximum(x, 0), p["head"])

  online, target = jax.tree.map(np.asarray, (params["encoder"], extra["teacher"]))
  q1, q2 = (mlp(project(v, online), online["predictor"]) for v in ("view1", "view2"))
  t1, t2 = (project(v, target) for v in ("view1", "view2"))
  wanted = normalized_mse(q1, targets=t2) + normalized_mse(q2, targets=t1)
  np.testing.assert_allclose(metrics["regression"], wanted, rtol=1e-4)
  # Running means have seen view 1, then view 2, each with a tenth.
  for tree, stats in ((online, after["batch_stats"]), (target, after["teacher_batch_stats"])):
    hidden = []
    for view in ("view1", "view2"):
      x = np.asarray(batch[view]).reshape(16, -1) @ tree["backbone"]["fc"]["kernel"] + tree["backbone"]["fc"]["bias"]
      hidden.append((np.maximum(x, 0) @ tree["head"]["fc1"]["kernel"] + tree["head"]["fc1"]["bias"]).mean(0))
    np.testing.assert_allclose(stats["head"]["bn1"]["mean"], 0.09 * hidden[0] + 0.1 * hidden[1], rtol=1e-3, atol=1e-5)


def test_the_target_reads_no_running_statistics(tiny):
  method, params, extra, batch = tiny
  other = extra | {"teacher_batch_stats": jax.tree.map(lambda x: x + 3.0, extra["teacher_batch_stats"])}
  assert float(loss_of(method, params, extra, batch)[0]) == float(loss_of(method, params, other, batch)[0])


def test_the_predictor_is_online_only_and_the_target_starts_on_its_own_or_as_a_copy(tiny):
  method, params, extra, batch = tiny
  assert "predictor" in params["encoder"] and "predictor" not in extra["teacher"] | extra["teacher_batch_stats"]
  for own in (True, False):
    params, extra = method.replace(own_target_init=own).init(jax.random.key(1), batch)
    same = np.array_equal(params["encoder"]["head"]["fc1"]["kernel"], extra["teacher"]["head"]["fc1"]["kernel"])
    assert same == (not own)


def test_the_classifier_learns_and_leaves_the_encoder_alone(tiny):
  method, params, extra, batch = tiny
  grad = lambda m, p: jax.jit(jax.grad(lambda p: m.loss(p, extra, batch, jax.random.key(0), jnp.int32(0))[0]))(p)
  with_it = grad(method, params)
  without = grad(method.replace(online_classifier=False), {"encoder": params["encoder"]})
  assert np.any(with_it["classifier"]["fc"]["kernel"])
  for a, b in zip(jax.tree.leaves(with_it["encoder"]), jax.tree.leaves(without["encoder"]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_classifier_without_labels_is_a_clear_error():
  with pytest.raises(UserError, match="online_classifier=True.*the data has 0.*set it to False"):
    make(online_classifier=True).inputs()
  assert make().inputs().keys == () and make(online_classifier=True, num_classes=2).inputs().keys == ("label",)


def test_the_two_views_are_blurred_and_solarized_unlike_and_cropped_by_clipping():
  one, two = make().inputs().views
  p = lambda view: {type(a).__name__: a.p for a in view.augment if hasattr(a, "p")}
  assert p(one) == {"ColorJitter": 0.8, "Grayscale": 0.2, "GaussianBlur": 1.0, "Solarize": 0.0}
  assert p(two) == {"ColorJitter": 0.8, "Grayscale": 0.2, "GaussianBlur": 0.1, "Solarize": 0.2}
  assert one.crop == two.crop == "clipped" and one.augment[0].style == "byol" and one.augment[2].radius(224) == 11
  views = (one, two, make().eval_view())
  assert all(v.interpolation == "bicubic" and not v.antialias for v in views)  # tf.image.resize by default


def train(method, steps=400, lr=0.2):
  """Gradient descent on 64 points seen twice through noise; the metrics of the last step."""
  x = jax.random.normal(jax.random.key(0), (64, 1, 2, 2, 3))
  params, extra = method.init(jax.random.key(1), {"view1": x})

  def step(carry, i):
    params, extra = carry
    noise = 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(2), i), (2, *x.shape))
    batch = {"view1": x + noise[0], "view2": x + noise[1]}
    (_, (extra, metrics)), grads = jax.value_and_grad(method.loss, has_aux=True)(params, extra, batch, jax.random.key(0), i)
    params = jax.tree.map(lambda p, g: p - lr * g, params, grads)
    return (params, method.post_update(params, extra, i)), metrics

  _, metrics = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))((params, extra))
  return {k: float(v[-1]) for k, v in metrics.items()}


def test_without_predictor_the_embeddings_contract_to_less_than_a_third():
  healthy, bare = train(make(momentum=0.9)), train(make(momentum=0.9, predictor_layers=0))
  assert healthy["std"] > 0.9 and bare["std"] < healthy["std"] / 3, (healthy["std"], bare["std"])
  assert bare["regression"] < healthy["regression"] / 3  # and the loss looks better


def test_a_planted_constant_embedding_is_called_collapsed(tiny):
  method, params, extra, batch = tiny
  head = params["encoder"]["head"]
  constant = head | {"bn1": jax.tree.map(jnp.zeros_like, head["bn1"]) | {"bias": jnp.ones(32)}}
  for tree, wanted in ((head, "healthy"), (constant, "collapsed")):
    planted = params | {"encoder": params["encoder"] | {"head": tree}}
    loss, (_, metrics) = loss_of(method, planted, extra, batch)
    verdict = health.judge({k: float(v) for k, v in metrics.items()} | {"loss": float(loss)}, thresholds=health.HealthConfig())
    assert verdict.state == wanted, verdict


@pytest.mark.parametrize(
  "field,value,message",
  [
    ("momentum", 1.5, "config.method.momentum=1.5"),
    ("momentum_final", -0.1, "config.method.momentum_final=-0.1"),
    ("projector_layers", 0, "projector_layers=0"),
    ("predictor_layers", -1, "predictor_layers=-1"),
    ("output_dim", 0, "output_dim=0"),
    ("gray", 1.5, "config.method.gray=1.5"),
    ("mean", (0.5,), "3 channels"),
  ],
)
def test_impossible_options_are_clear_errors(field, value, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(make(), **{field: value})
