"""The chunked contrastive loss: the public losses and their gradients, any chunk, any number of devices, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.losses.contrastive import pair_loss

KINDS = ["softmax", "sigmoid"]


def embeddings(rows, seed=0, valid_share=1.0):
  rng = np.random.default_rng(seed)
  a, b = (jnp.asarray(rng.normal(size=(rows, 12)), jnp.float32) for _ in range(2))
  return a, a + b, jnp.asarray(rng.random(rows) < valid_share)


def dense(a, b, scale, bias, *, kind, valid):
  """Written anew, with the whole matrix."""
  keep = np.flatnonzero(np.asarray(valid))
  a, b = a[keep] / jnp.linalg.norm(a[keep], axis=1, keepdims=True), b[keep] / jnp.linalg.norm(b[keep], axis=1, keepdims=True)
  logits = scale * jnp.matmul(a, b.T, precision="highest") + bias
  if kind == "softmax":
    rows, columns = (jnp.diag(jax.nn.log_softmax(logits, axis=i)) for i in (0, 1))
    return -jnp.mean(rows + columns) / 2
  return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(logits * (2 * jnp.eye(len(keep)) - 1)), axis=1))


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_public_losses_and_their_gradients(golden, kind, chunk):
  z = golden(f"clip_{kind}_loss")
  bias = jnp.asarray(z.get("bias", np.float32(0)))

  def loss(a, b, log_scale, bias):
    return pair_loss(a, b, scale=jnp.exp(log_scale), bias=bias, kind=kind, chunk=chunk).loss

  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*(jnp.asarray(z[k]) for k in ("image_raw", "text_raw", "log_scale")), bias)
  np.testing.assert_allclose(value, z["loss"], rtol=1e-6)
  for grad, name in zip(grads, ("image_raw", "text_raw", "log_scale", "bias"), strict=True):
    if f"grad_{name}" in z:
      np.testing.assert_allclose(grad, z[f"grad_{name}"], rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("chunk", [1, 3, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_any_chunk_equals_the_dense_form_with_padding(kind, chunk):
  a, b, valid = embeddings(16, valid_share=0.7)
  assert 0 < int(valid.sum()) < 16
  chunked = lambda a, b, s, t: pair_loss(a, b, scale=s, bias=t, kind=kind, valid=valid, chunk=chunk).loss
  whole = lambda a, b, s, t: dense(a, b, s, t, kind=kind, valid=valid)
  ours, theirs = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(a, b, 7.0, -2.0) for f in (chunked, whole))
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
  for mine, wanted, name in zip(ours[1], theirs[1], ("a", "b", "scale", "bias"), strict=True):
    np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_may_hold_anything_and_gets_no_gradient(kind):
  a, b, valid = embeddings(8, valid_share=0.6)
  filled = jnp.where(valid[:, None], a, jnp.nan)
  loss = lambda a: pair_loss(a, b, scale=5.0, kind=kind, valid=valid, chunk=3).loss
  assert loss(filled) == loss(a)
  grad = jax.grad(loss)(a)
  assert np.isfinite(grad).all() and not np.any(grad[~valid])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_valid_pair_is_zero(kind):
  a, b, _ = embeddings(4)
  value, grad = jax.value_and_grad(lambda a: pair_loss(a, b, scale=5.0, kind=kind, valid=jnp.zeros(4, bool), chunk=2).loss)(a)
  assert value == 0 and not np.any(grad)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_equal_one(kind, mesh8):
  a, b, valid = embeddings(32, valid_share=0.8)
  loss = jax.jit(jax.value_and_grad(lambda a, b: pair_loss(a, b, scale=7.0, bias=-1.0, kind=kind, valid=valid, chunk=8).loss, argnums=(0, 1)))
  one = loss(a, b)
  with jax.set_mesh(mesh8):
    eight = loss(*jax.device_put((a, b), NamedSharding(mesh8, P(("data", "fsdp")))))
  for x, y in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_large_logits_stay_finite():
  a, b, _ = embeddings(8)
  value, grad = jax.value_and_grad(lambda a: pair_loss(a, b, scale=1e4, chunk=2).loss)(a)
  assert np.isfinite(value) and np.isfinite(grad).all()


def test_accuracy_counts_the_valid_pairs_that_are_found():
  a, valid = jnp.eye(6), jnp.arange(6) < 4
  b = a[jnp.array([0, 1, 3, 2, 4, 5])]
  out = pair_loss(a, b, scale=3.0, valid=valid, chunk=4)
  assert out.count == 4 and out.accuracy == 0.5
  assert pair_loss(jnp.ones((4, 3)), jnp.ones((4, 3)), scale=3.0).accuracy == 0  # all alike: nothing is found


@pytest.mark.parametrize("kind", KINDS)
def test_no_array_of_all_pairs_exists(kind):
  a, b, _ = embeddings(64)
  grad = jax.grad(lambda a: pair_loss(a, b, scale=5.0, kind=kind, chunk=4).loss)
  compiled = jax.jit(grad).lower(a).compile().as_text()
  assert "f32[64,4]" in compiled and "f32[64,64]" not in compiled


@pytest.mark.parametrize("change", [{"kind": "hinge"}, {"chunk": -1}, {"valid": np.ones(3, bool)}])
def test_a_wrong_call_is_refused(change):
  a, b, _ = embeddings(4)
  with pytest.raises(ValueError, match="pair_loss"):
    functools.partial(pair_loss, a, b, scale=1.0)(**change)
