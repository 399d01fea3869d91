"""LOCA's losses: the public code's values and gradients, on one device and on two, and what must not matter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.types import UserError
from big_ssl.losses import location


def rows(array, devices, batch, views):
  """[devices, views * batch (view-major), T, K] -> [devices * batch, views * T, K]."""
  array = array.reshape(devices, views, batch, *array.shape[2:])
  return np.moveaxis(array, 1, 2).reshape(devices * batch, -1, array.shape[-1])


def load(z):
  """Logits, cosines, teacher cosines [B, ., .] and positions [B, M], image-major over all devices."""
  devices, batch = z["q0_target_grid"].shape[:2]
  views = z["focal_target_grids"].shape[1]
  focal = lambda name: rows(z[f"{name}"], devices, batch, views)
  query = lambda name: z[name].reshape(devices * batch, -1, z[name].shape[-1])
  both = lambda prefix, kind: jnp.concatenate([query(f"{prefix}q0_{kind}"), focal(f"{prefix}focal_{kind}")], axis=1)
  q0 = z["q0_target_grid"].reshape(devices * batch, -1)[:, z["q0_kept_tokens"]]
  targets = z["focal_target_grids"]  # [devices, views, batch, h, w]
  targets = np.moveaxis(targets, 1, 2).reshape(devices * batch, -1)
  teacher = z["teacher_cluster_logits"].reshape(devices * batch, -1, z["teacher_cluster_logits"].shape[-1])
  return devices, both, jnp.asarray(teacher), jnp.concatenate([q0, targets], axis=1)


def terms(logits, cosines, teacher, y, groups):
  place = location.position_loss(logits, y, groups=groups)
  clusters = location.patch_cluster_loss(cosines, teacher, y, groups=groups)
  return place.loss, clusters.ce + clusters.memax


@pytest.mark.parametrize("name", ["loca_loss", "loca_loss_2dev"])
def test_values_and_gradients_are_those_of_the_public_code(golden, name):
  z = golden(name)
  devices, both, teacher, y = load(z)
  logits, cosines = both("", "position_logits"), both("", "cluster_logits")
  position, cluster = terms(logits, cosines, teacher, y, devices)
  np.testing.assert_allclose(position, z["position_loss"], rtol=1e-5)
  np.testing.assert_allclose(cluster, z["cluster_loss"], rtol=1e-5)
  grads = jax.grad(lambda a, b: sum(terms(a, b, teacher, y, devices)), argnums=(0, 1))(logits, cosines)
  np.testing.assert_allclose(grads[0], both("grad_", "position_logits"), atol=1e-5)
  np.testing.assert_allclose(grads[1], both("grad_", "cluster_logits"), atol=1e-5)


def test_one_group_divides_by_the_valid_patches_of_the_whole_batch(golden):
  z = golden("loca_loss_2dev")
  _, both, _, y = load(z)
  logits, half = both("", "position_logits"), y.shape[0] // 2
  parts = [location.position_loss(logits[s], y[s]).loss for s in (slice(None, half), slice(half, None))]
  np.testing.assert_allclose(parts, z["position_loss_per_device"], rtol=1e-5)
  valid = np.array([(y[:half] >= 0).sum(), (y[half:] >= 0).sum()])
  assert valid[0] != valid[1]
  np.testing.assert_allclose(location.position_loss(logits, y).loss, np.average(parts, weights=valid), rtol=1e-5)
  np.testing.assert_allclose(location.position_loss(logits, y, groups=2).loss, np.mean(parts), rtol=1e-5)


@pytest.fixture(scope="module")
def random_case():
  rng = np.random.default_rng(0)
  cosines, teacher = (jnp.asarray(rng.uniform(-1, 1, (4, n, 6)), jnp.float32) for n in (5, 9))
  y = jnp.asarray(rng.integers(-1, 9, (4, 5)), jnp.int32).at[0, 0].set(-1).at[1, 1].set(3)
  return jnp.asarray(rng.normal(size=(4, 5, 9)), jnp.float32), cosines, teacher, y


def test_patches_outside_the_reference_do_not_matter(random_case):
  logits, cosines, teacher, y = random_case
  outside = (y < 0)[..., None]
  position = location.position_loss(logits, y)
  changed = location.position_loss(jnp.where(outside, 50.0 * logits[..., ::-1], logits), y)
  assert position.loss == changed.loss and position.accuracy == changed.accuracy
  other = jnp.where(outside, -cosines, cosines)
  assert location.patch_cluster_loss(cosines, teacher, y).ce == location.patch_cluster_loss(other, teacher, y).ce
  grad = jax.grad(lambda x: location.position_loss(x, y).loss)(logits)
  assert not np.any(np.where(outside, grad, 0.0)) and np.any(grad)


def test_a_permutation_of_the_prototypes_leaves_the_loss(random_case):
  _, cosines, teacher, y = random_case
  order = np.array([3, 0, 5, 1, 4, 2])
  a, b = location.patch_cluster_loss(cosines, teacher, y), location.patch_cluster_loss(cosines[..., order], teacher[..., order], y)
  np.testing.assert_allclose([a.ce, a.memax], [b.ce, b.memax], rtol=1e-6)
  wrong = location.patch_cluster_loss(cosines[..., order], teacher, y)
  assert abs(float(wrong.ce - a.ce)) > 1e-3


def test_only_numbers_per_prototype_travel_between_devices(mesh8):
  split = NamedSharding(mesh8, P(("data", "fsdp")))
  shapes = (((16, 34, 49), jnp.float32), ((16, 34, 24), jnp.float32), ((16, 49, 24), jnp.float32), ((16, 34), jnp.int32))
  given = [jax.ShapeDtypeStruct(shape, dtype, sharding=split) for shape, dtype in shapes]
  step = jax.jit(jax.value_and_grad(lambda *x: sum(terms(*x, 1)), argnums=(0, 1)))
  text = step.lower(*given).compile().as_text()
  moved = re.findall(r"= (.*) (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text)
  sizes = {size for shape, _ in moved for size in re.findall(r"\[([0-9,]*)\]", shape)}
  assert moved and sizes <= {"", "1", "24"}, moved


def test_no_gradient_reaches_the_teacher(random_case):
  _, cosines, teacher, y = random_case
  assert not np.any(jax.grad(lambda t: location.patch_cluster_loss(cosines, t, y).ce)(teacher))


def test_a_batch_without_any_valid_patch_costs_nothing(random_case):
  logits, cosines, teacher, y = random_case
  nothing = jnp.full_like(y, -1)
  place = location.position_loss(logits, nothing)
  assert place.loss == 0 and place.accuracy == 0 and place.valid == 0
  assert location.patch_cluster_loss(cosines, teacher, nothing).ce == 0
  assert not np.any(jax.grad(lambda x: location.position_loss(x, nothing).loss)(logits))


def test_a_dead_prototype_keeps_loss_and_gradient_finite(random_case):
  _, cosines, teacher, y = random_case
  dead = cosines.at[..., 2].set(-200.0)
  loss = lambda x: location.patch_cluster_loss(x, teacher, y).memax
  assert np.isfinite(loss(dead)) and np.isfinite(jax.grad(loss)(dead)).all()


def test_groups_that_do_not_divide_the_batch_are_a_clear_error(random_case):
  logits, _, _, y = random_case
  with pytest.raises(UserError, match="config.method.loss_groups=3.*4 images"):
    location.position_loss(logits, y, groups=3)
