"""Attention: one function whatever computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models import attention as lib


def heads(tokens=5, dtype=jnp.float32):
  return [jax.random.normal(k, (2, tokens, 3, 8), dtype) for k in jax.random.split(jax.random.key(0), 3)]


def reference(q, k, v, mask=None):
  logits = np.einsum("btnd,bsnd->bnts", *(np.asarray(x, np.float64) for x in (q, k))) / np.sqrt(q.shape[-1])
  logits = logits if mask is None else np.where(mask, logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  return weights, np.einsum("bnts,bsnd->btnd", weights, np.asarray(v, np.float64))


@pytest.mark.parametrize("masked", [False, True])
def test_output_and_weights_are_those_of_the_formula(masked):
  q, k, v = heads()
  mask = np.tril(np.ones((5, 5), bool))[None, None] if masked else None
  weights, out = reference(q, k, v, mask)
  np.testing.assert_allclose(lib.attention(q, k, v, mask=mask), out, atol=2e-6)
  np.testing.assert_allclose(lib.attention_weights(q, k, mask=mask), weights, atol=1e-6)


def test_what_a_mask_hides_changes_nothing():
  q, k, v = heads()
  mask = jnp.arange(5)[None, None, None] < 3
  whole = lib.attention(q, k, v, mask=mask)
  short = lib.attention(q, k[:, :3], v[:, :3])
  np.testing.assert_allclose(whole, short, atol=1e-6)


def test_softmax_is_float32_under_bfloat16():
  q, k, v = heads(dtype=jnp.bfloat16)
  weights = lib.attention_weights(q, k)
  assert weights.dtype == jnp.float32 and lib.attention(q, k, v).dtype == jnp.bfloat16
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
  np.testing.assert_allclose(weights, reference(q, k, v)[0], atol=1e-5)


def test_a_fused_kernel_that_does_not_compile_is_found_out_while_the_step_is_traced(monkeypatch):
  """The stand-in can be traced and differentiated but not compiled: the outer function must be rid of it by then."""
  q, k, v = heads(tokens=7, dtype=jnp.bfloat16)
  real, asked = jax.nn.dot_product_attention, []

  @jax.custom_vjp
  def missing(q):
    return jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct(q.shape, q.dtype))(q)

  missing.defvjp(lambda q: (missing(q), None), lambda _, g: (g,))

  def fake(q, k, v, *, implementation, **kwargs):
    asked.append(implementation)
    return missing(q) if implementation == "cudnn" else real(q, k, v, implementation=implementation, **kwargs)

  lib.cudnn_works.cache_clear()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
  try:
    out = jax.jit(lib.attention)(q, k, v)
  finally:
    monkeypatch.undo()
    lib.cudnn_works.cache_clear()
  assert asked[0] == "cudnn" and asked[-1] == "xla"
  np.testing.assert_allclose(np.asarray(out, np.float32), reference(q, k, v)[1], atol=2e-2)


def test_a_fused_kernel_is_chosen_for_half_precision_only(monkeypatch):
  asked = []
  monkeypatch.setattr(lib, "cudnn_works", lambda *shapes: True)
  monkeypatch.setattr(
    jax.nn, "dot_product_attention", lambda q, k, v, *, implementation, **_: asked.append(implementation) or q
  )
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    lib.attention(*heads(dtype=dtype))
  assert asked == ["cudnn", "cudnn", "xla"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (6, 6), (1, 6), (6, 5)])
def test_attention_of_even_length_is_that_of_the_tokens_alone(queries, keys, masked):
  rng = np.random.default_rng(queries + keys)
  q, k, v = (jnp.asarray(rng.normal(size=(2, n, 3, 8)), jnp.float32) for n in (queries, keys, keys))
  mask = jnp.asarray(rng.random((2, 3, queries, keys)) < 0.7).at[..., 0].set(True) if masked else None
  weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

  def both(function):
    total = lambda q, k, v: jnp.sum(function(q, k, v) * weight)
    return function(q, k, v), jax.grad(total, argnums=(0, 1, 2))(q, k, v)

  seen = []
  even = lambda *qkv: lib.of_even_length(*qkv, mask=mask, implementation="xla")
  real = jax.nn.dot_product_attention
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **kw: seen.append((q.shape[1], k.shape[1])) or real(q, k, v, **kw))
    found = both(even)
  assert not np.any(np.array(seen) % 2)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(both(lambda *qkv: lib.attention(*qkv, mask=mask))), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_module_returns_the_weights_that_make_its_output():
  x = jax.random.normal(jax.random.key(0), (2, 5, 24))
  layer = lib.MultiHeadAttention(heads=3)
  params = layer.init(jax.random.key(1), x)["params"]
  out, weights = layer.apply({"params": params}, x, return_weights=True)
  value = jnp.einsum("btd,dnh->btnh", x, params["value"]["kernel"]) + params["value"]["bias"]
  mixed = jnp.einsum("bnts,bsnh->btnh", weights, value)
  wanted = jnp.einsum("btnh,nhd->btd", mixed, params["out"]["kernel"]) + params["out"]["bias"]
  np.testing.assert_allclose(out, wanted, atol=1e-6)
  assert layer.apply({"params": params}, x)[1] is None


def test_packed_segments_attend_as_if_they_were_alone():
  q, k, v = heads(tokens=6)
  segments = jnp.array([[0, 0, 1, 1, 1, -1], [3, 3, 3, 3, -1, -2]])
  mask = lib.segment_mask(segments)
  assert mask.shape == (2, 1, 6, 6)
  packed = lib.attention(q, k, v, mask=mask)
  for row, start, stop in ((0, 0, 2), (0, 2, 5), (1, 0, 4)):
    alone = lib.attention(*(x[row : row + 1, start:stop] for x in (q, k, v)))
    np.testing.assert_allclose(packed[row, start:stop], alone[0], atol=1e-6)
  assert np.all(np.isfinite(packed))


def test_segments_of_keys_may_be_others_than_those_of_queries():
  mask = lib.segment_mask(jnp.array([[0, 1]]), context=jnp.array([[0, 0, 1, -1]]))
  np.testing.assert_array_equal(mask[0, 0], [[True, True, False, False], [False, False, True, False]])


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_query_and_key_norms_are_over_the_width_of_a_head(kind):
  x = jax.random.normal(jax.random.key(0), (2, 5, 24))
  layer = lib.MultiHeadAttention(heads=3, qkv_bias=False, qk_norm=kind, norm_bias=False)
  params = layer.init(jax.random.key(1), x)["params"]
  assert params["query"].keys() == {"kernel"} and params["query_norm"]["norm"].keys() == {"scale"}
  params["key_norm"]["norm"]["scale"] = jnp.linspace(0.5, 2, 8)
  _, weights = layer.apply({"params": params}, x, return_weights=True)

  def normed(name):
    y = np.einsum("btd,dnh->btnh", x, params[name]["kernel"])
    y = y - y.mean(-1, keepdims=True) if kind == "layernorm" else y
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * params[f"{name}_norm"]["norm"]["scale"]

  np.testing.assert_allclose(weights, reference(normed("query"), normed("key"), np.zeros((2, 5, 3, 8)))[0], atol=1e-5)


def test_a_width_without_whole_heads_is_a_clear_error():
  with pytest.raises(UserError, match="config.model.heads=5: must divide the width 24"):
    lib.MultiHeadAttention(heads=5).init(jax.random.key(0), jnp.zeros((1, 2, 24)))
