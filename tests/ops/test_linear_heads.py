"""Linear heads by SGD: the recorded MSN steps, schedules, BN, and heads that are trained together as if alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_ssl.ops import linear_heads
from big_ssl.ops.linear_heads import Heads, Recipe

MSN = Recipe(norm="layer", unit=True, nesterov=True, lr_in_buffer=True, decayed="kernel")


def planted(count=60, shape=(6,), classes=3):
  rng = np.random.default_rng(0)
  labels = np.arange(count, dtype=np.int32) % classes
  x = 0.5 * rng.normal(size=(count, *shape)).astype(np.float32)
  x[np.arange(count), labels] += 2
  return x.reshape(count, -1), labels


def trained(recipe, *, lr, weight_decay=None, shape=(6,), steps=20, **kwargs):
  x, labels = planted(shape=shape)
  heads = linear_heads.init_heads(recipe, count=len(lr), shape=shape, classes=3)
  decay = np.zeros(len(lr)) if weight_decay is None else np.array(weight_decay)
  rates = np.tile(np.array(lr), (steps, 1))
  settings = {"recipe": recipe, "shape": shape, "batch_size": 8} | kwargs
  return linear_heads.train_heads(x, labels=labels, heads=heads, lr=rates, weight_decay=decay, **settings)


def test_three_steps_of_the_msn_probe_match_the_reference(golden):
  z = golden("msn_linear_probe")
  heads = linear_heads.init_heads(MSN, count=1, shape=(12,), classes=5)
  params = {
    "linear": {"kernel": z["state/linear.weight"].T, "bias": z["state/linear.bias"]},
    "norm": {"scale": z["state/norm.weight"], "bias": z["state/norm.bias"]},
  }
  heads = Heads(jax.tree.map(lambda v: jnp.asarray(v)[None], params), heads.stats, heads.buffer)
  x = np.concatenate([z[f"step{i}/features"] for i in range(3)])
  labels = np.concatenate([z[f"step{i}/labels"] for i in range(3)])
  rates = linear_heads.learning_rates([2.0], schedule="cosine_steps", steps=3, per_epoch=1)
  np.testing.assert_allclose(rates[:, 0], z["lr_used"], rtol=1e-12)
  decay = jnp.array([z["weight_decay"]])
  found, losses = linear_heads.train_segment(
    heads, x, labels, jnp.arange(27).reshape(3, 9), rates.astype(np.float32), decay, recipe=MSN, shape=(12,)
  )
  np.testing.assert_allclose(losses[:, 0], z["losses"], rtol=1e-5)
  for name, ours in (("linear", "kernel"), ("linear", "bias"), ("norm", "scale"), ("norm", "bias")):
    expected = z[f"state_final/{name}.{'bias' if ours == 'bias' else 'weight'}"]
    np.testing.assert_allclose(found.params[name][ours][0].T, expected, atol=1e-5)


def test_learning_rates_of_deepcluster_match_the_reference(golden):
  z = golden("deepcluster_voc_ap")
  steps, decay = int(z["lr_t"].max()) + 1, np.array([1e-7])
  found = linear_heads.learning_rates([0.01], schedule="inverse_sqrt", steps=steps, per_epoch=5000, weight_decay=decay)
  np.testing.assert_allclose(found[z["lr_t"], 0], z["lr_value"], rtol=1e-6)


def test_schedules_hold_during_an_epoch_or_move_with_every_step():
  rates = lambda schedule, **kw: linear_heads.learning_rates([2.0], schedule=schedule, steps=8, per_epoch=2, **kw)[:, 0]
  np.testing.assert_allclose(rates("cosine_epochs"), np.repeat(1 + np.cos(np.pi * np.arange(4) / 4), 2))
  np.testing.assert_allclose(rates("cosine_steps"), 1 + np.cos(np.pi * np.arange(8) / 8))
  np.testing.assert_allclose(rates("milestones", milestones=(0.25, 0.75)), [2, 2, 0.2, 0.2, 0.2, 0.2, 0.02, 0.02])


@pytest.mark.parametrize(
  "recipe", [Recipe(), Recipe(norm="batch", nesterov=True), Recipe(norm="batch_affine", decayed="linear"), MSN]
)
def test_heads_together_are_what_each_is_alone(recipe):
  lr, decay = (0.01, 0.1, 0.3), (0.0, 0.1, 0.2)
  together = trained(recipe, lr=lr, weight_decay=decay)
  for i in range(3):
    alone = trained(recipe, lr=lr[i : i + 1], weight_decay=decay[i : i + 1])
    jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b[0], atol=1e-5), together.params, alone.params)


def test_plain_sgd_is_that_of_optax():
  x, labels = planted()
  rows = np.random.default_rng((0, 0)).permutation(60)[:56].reshape(7, 8)
  found = trained(Recipe(), lr=(0.2,), weight_decay=(0.01,), steps=7)
  params = jax.tree.map(lambda v: v[0], linear_heads.init_heads(Recipe(), count=1, shape=(6,), classes=3).params)
  tx = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.2, momentum=0.9))
  state = tx.init(params)

  def loss(p, x, y):
    out = x @ p["linear"]["kernel"] + p["linear"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

  for chosen in rows:
    updates, state = tx.update(jax.grad(loss)(params, x[chosen], labels[chosen]), state, params)
    params = optax.apply_updates(params, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-5), found.params, params)


@pytest.mark.parametrize("recipe", [Recipe(norm="batch", nesterov=True), MSN])
def test_epochs_one_by_one_are_one_training(recipe):
  x, labels = planted()
  rates = linear_heads.learning_rates([0.3, 0.1], schedule="cosine_steps", steps=21, per_epoch=7)
  settings = {"recipe": recipe, "shape": (6,)}
  kwargs = settings | {"labels": labels, "weight_decay": np.array([0.0, 0.1]), "batch_size": 8, "seed": 5}
  start = lambda: linear_heads.init_heads(**settings, count=2, classes=3)
  whole, parts = linear_heads.train_heads(x, heads=start(), lr=rates, **kwargs), start()
  for epoch in range(3):
    parts = linear_heads.train_heads(x, heads=parts, lr=rates[7 * epoch :][:7], first_epoch=epoch, **kwargs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
  again = linear_heads.train_heads(x, heads=start(), lr=rates[:7], first_epoch=1, **kwargs)
  other = linear_heads.train_heads(x, heads=start(), lr=rates[:7], **kwargs)
  assert np.abs(again.params["linear"]["kernel"] - other.params["linear"]["kernel"]).max() > 1e-4


def test_features_that_do_not_fit_on_the_device_train_the_same_heads_in_segments():
  whole = trained(Recipe(), lr=(0.1,), steps=11)
  parts = trained(Recipe(), lr=(0.1,), steps=11, resident_bytes=0, segment_bytes=3 * 8 * 6 * 4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, parts.params)


def test_batch_norm_is_over_the_positions_of_a_channel_and_predicts_with_running_statistics():
  recipe, shape = Recipe(norm="batch"), (6, 4)
  heads = trained(recipe, lr=(0.1,), shape=shape, steps=60, batch_size=60)
  x, labels = planted(shape=shape)
  maps = x.reshape(60, 6, 4).astype(np.float64)
  share = 1 - 0.9**60
  np.testing.assert_allclose(heads.stats["mean"][0], share * maps.mean((0, 2)), rtol=1e-4, atol=1e-5)
  var = share * maps.transpose(1, 0, 2).reshape(6, -1).var(1, ddof=1) + 1 - share
  np.testing.assert_allclose(heads.stats["var"][0], var, rtol=1e-4)
  # Of other images' statistics nothing depends: one alone is predicted as among all.
  found = linear_heads.predict(heads, x, recipe=recipe, shape=shape)
  assert np.mean(found[0] == labels) > 0.95
  np.testing.assert_array_equal(linear_heads.predict(heads, x[:1], recipe=recipe, shape=shape), found[:, :1])


def test_prediction_in_chunks_is_that_of_all_rows():
  heads = trained(Recipe(), lr=(0.1, 0.01))
  x = planted()[0]
  settings = {"recipe": Recipe(), "shape": (6,)}
  np.testing.assert_array_equal(
    linear_heads.predict(heads, x, **settings, chunk=7), linear_heads.predict(heads, x, **settings)
  )
