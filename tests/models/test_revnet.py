"""RevNet against the public code, and its backward pass that stores no activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.revnet import Bottleneck, RevNet, inverse_units, reversible_units, units
from big_ssl.weights.keymap import KeyMap
from big_ssl.weights.revisiting import revnet_rules


def state_of(z):
  return {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}


def test_the_public_network_is_reproduced_at_every_end_point(golden):
  z = golden("revisiting_revnet")
  state = state_of(z)
  keymap = KeyMap("RevNet", revnet_rules(blocks=(1, 2, 1, 1)))
  weights = keymap.load(state)
  again = keymap.dump(weights)
  assert again.keys() == state.keys() and all(np.array_equal(again[k], state[k]) for k in state)
  model = RevNet(filters_factor=1, blocks=(1, 2, 1, 1))
  variables = {"params": weights.params["backbone"], "batch_stats": weights.batch_stats["backbone"]}
  out = model.apply(variables, jnp.asarray(z["input"]), train=False)
  for i, name in enumerate(("after_root", "block1", "block2", "block3", "block4")):
    np.testing.assert_allclose(out["stages"][i], z[f"output/{name}"], atol=1e-4, err_msg=name)
  np.testing.assert_allclose(out["pooled"], z["output/pre_logits"], atol=1e-4)
  head = weights.params["head"]["fc"]
  np.testing.assert_allclose(out["pooled"] @ head["kernel"] + head["bias"], z["output/logits"], atol=1e-4)


@pytest.fixture(scope="module")
def tiny():
  model = RevNet(filters_factor=0.25, blocks=(2, 2), strides=(2,))
  images = jax.random.normal(jax.random.key(0), (8, 20, 12, 3))
  return model, jax.jit(model.init, static_argnames="train")(jax.random.key(1), images, train=False), images


def gradients(model, variables, images, train):
  def loss(params, images):
    tree = variables | {"params": params}
    out, updated = model.apply(tree, images, train=train, mutable=["batch_stats"])
    return jnp.mean(out["pooled"] ** 2) + jnp.mean(out["stages"][1] ** 2), updated

  return jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], images)


@pytest.mark.parametrize("train", [True, False])
def test_rebuilt_activations_give_the_gradients_and_statistics_of_stored_ones(tiny, train):
  model, variables, images = tiny
  run = jax.jit(gradients, static_argnums=(0, 3))
  rebuilt, stored = (run(m, variables, images, train) for m in (model, model.clone(reversible=False)))
  assert jax.tree.structure(rebuilt) == jax.tree.structure(stored)
  for a, b in zip(jax.tree.leaves(rebuilt), jax.tree.leaves(stored), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (rebuilt[1]["batch_stats"], variables["batch_stats"])))]
  assert all(moved) if train else not any(moved)


@pytest.mark.parametrize("train", [True, False])
def test_inputs_are_recovered_from_the_outputs_of_a_stage(train):
  module = Bottleneck(1, "float32")
  x = jax.random.normal(jax.random.key(0), (4, 6, 5, 16))
  trees = [module.init(jax.random.key(i), x[..., :8], train=False) for i in range(6)]
  params, stats = (tuple(t[k] for t in trees) for k in ("params", "batch_stats"))

  def residual(p, s, x):
    y, updated = module.apply({"params": p, "batch_stats": s}, x, train=train, mutable=["batch_stats"])
    return y, updated.get("batch_stats", s)

  out, _ = units(residual, params, stats, x)
  assert np.abs(out - x).max() > 0.1
  np.testing.assert_allclose(inverse_units(residual, params, stats, out), x, atol=1e-4)


def stored_for_backward(model, images):
  """Values of the size of an activation that the forward pass hands to the backward pass."""
  variables = jax.eval_shape(lambda: model.init(jax.random.key(1), images, train=False))

  def residuals(variables):
    loss = lambda p: model.apply(variables | {"params": p}, images, train=True, mutable=["batch_stats"])[0]["pooled"]
    return jax.vjp(loss, variables["params"])[1]

  kept = jax.tree.leaves(jax.eval_shape(residuals, variables))
  return sum(x.size for x in kept if x.ndim == 4 and x.shape[0] == len(images))


def test_stored_activations_do_not_grow_with_the_depth():
  images = jnp.zeros((8, 32, 32, 3))
  size = lambda depth, reversible: stored_for_backward(
    RevNet(filters_factor=0.25, blocks=(depth,), strides=(), reversible=reversible), images
  )
  assert size(6, True) == size(2, True)
  stream = 8 * 8 * 8 * 16
  assert size(6, False) - size(2, False) > 4 * stream


def test_compiled_memory_does_not_grow_with_the_depth():
  module, x = Bottleneck(1, "float32"), jnp.zeros((16, 16, 16, 32))
  tree = jax.eval_shape(lambda: module.init(jax.random.key(0), x[..., :16], train=False))

  def residual(p, s, x):
    y, updated = module.apply({"params": p, "batch_stats": s}, x, train=True, mutable=["batch_stats"])
    return y, updated["batch_stats"]

  def temporary(run, depth):
    loss = lambda p, s, x: jnp.sum(run(residual, p, s, x)[0] ** 2)
    step = jax.jit(jax.grad(loss, argnums=(0, 2)))
    compiled = step.lower((tree["params"],) * depth, (tree["batch_stats"],) * depth, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  stream = x.size * 4  # bytes
  assert temporary(reversible_units, 6) - temporary(reversible_units, 2) < stream
  assert temporary(units, 6) - temporary(units, 2) > 4 * stream


def test_widening_multiplies_the_parameters_and_the_feature():
  def count(k):
    model = RevNet(filters_factor=k)
    out, variables = jax.eval_shape(
      lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    )
    assert out["pooled"].shape == (1, 512 * k)
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables["params"]))

  assert 3.8 < count(8) / count(4) < 4.0


def test_patch_strides_keep_the_resolution_and_odd_sides_are_rounded_up(tiny):
  model, _, _ = tiny

  def maps(model, shape):
    out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, *shape)), train=False)[0])
    return [s.shape[1:3] for s in out["stages"]]

  assert maps(model.clone(root_stride=1, strides=(1,)), (64, 64, 3)) == [(32, 32)] * 3
  assert maps(model.clone(channels=5), (37, 22, 5)) == [(10, 6), (10, 6), (5, 3)]
  assert maps(model.clone(channels=1), (36, 10, 1)) == [(9, 3), (9, 3), (5, 2)]


def test_options_have_an_effect(tiny):
  model, variables, images = tiny
  run = lambda m, train=False: m.apply(variables, images, train=train, mutable=["batch_stats"])[0]["pooled"]
  assert run(model).min() >= 0 > run(model.clone(last_relu=False)).min()
  assert np.abs(run(model, True) - run(model.clone(bn_groups=4), True)).max() > 1e-3
  half = model.clone(dtype="bfloat16")
  np.testing.assert_allclose(run(half), run(model), atol=0.05)
  assert half.apply(variables, images, train=False)["stages"][-1].dtype == jnp.float32


def test_eight_devices_give_the_output_gradients_and_statistics_of_one(tiny, mesh8):
  model, variables, images = tiny
  run = jax.jit(gradients, static_argnums=(0, 3))
  one = run(model, variables, images, True)
  place = lambda *spec: jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec(*spec))
  with jax.set_mesh(mesh8):
    eight = run(model, jax.device_put(variables, place()), jax.device_put(images, place("data")), True)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"filters_factor": 0.3}, "config.model.filters_factor=0.3"),
    ({"blocks": (3, 0, 6, 3)}, "config.model.blocks"),
    ({"strides": (2, 2)}, "config.model.strides=.*expected 3"),
    ({"channels": 4}, "config.model.channels=4"),
  ],
)
def test_wrong_fields_are_clear_errors(changes, message):
  with pytest.raises(UserError, match=message):
    jax.eval_shape(lambda: RevNet(**changes).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
