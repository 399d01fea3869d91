"""FLOPs are those of the model: loops as often as they run, nothing twice, no products with inserted zeros."""

import dataclasses

import engine
import jax
import jax.numpy as jnp
import pytest

from big_ssl.core.flops import count
from big_ssl.models.layers import with_fields
from big_ssl.models.vit import ViT


def of(function, *args) -> float:
  return count(jax.make_jaxpr(function)(*args).jaxpr)


def test_a_product_counts_two_per_multiplication_and_addition_and_a_loop_as_often_as_it_runs():
  x, w = jnp.ones((3, 5)), jnp.ones((5, 5))
  assert of(jnp.matmul, x, w) == 2 * 3 * 5 * 5
  assert of(lambda x, w: jnp.einsum("bthd,bshd->bhts", x, w), jnp.ones((2, 7, 3, 4)), jnp.ones((2, 6, 3, 4))) == 2 * 2 * 3 * 7 * 6 * 4
  assert of(lambda x, w: jax.lax.fori_loop(0, 9, lambda _, y: y @ w, x), x, w) == 9 * 2 * 3 * 5 * 5
  assert of(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), x, w) == 2 * 2 * 3 * 5 * 5


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (2, 4)])
def test_the_gradient_of_a_convolution_costs_twice_the_convolution(stride, groups):
  x, kernel = jnp.ones((2, 16, 16, 8)), jnp.ones((2, 2, 8 // groups, 12))
  convolve = lambda x, k: jax.lax.conv_general_dilated(
    x, k, (stride, stride), "SAME" if stride == 1 else "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
  )
  forward = 2 * 2 * (16 // stride) ** 2 * 12 * (2 * 2 * 8 // groups)
  assert of(convolve, x, kernel) == forward
  both = of(jax.grad(lambda x, k: jnp.sum(convolve(x, k) ** 2), argnums=(0, 1)), x, kernel)
  assert both == pytest.approx(3 * forward, rel=0.2)  # the borders are padded by more


def test_scanning_and_recomputing_layers_changes_nothing():
  model = ViT(variant="custom", width=16, depth=3, heads=2, mlp_dim=32, patch=8, image_size=16)
  images = jnp.ones((2, 16, 16, 3))

  def cost(model: ViT) -> float:
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return of(jax.grad(lambda p: jnp.sum(model.apply(p, images, train=False)["pooled"])), params)

  once = cost(model)
  per_block = 2 * 10 * (4 * 16**2 + 2 * 16 * 32) + 2 * 4 * 5 * 5 * 16  # 2 images of 4 patches and a class token
  assert once == 3 * 3 * per_block + 2 * (2 * 8 * 3 * 64 * 16)  # patches: no gradient of the images
  assert cost(model.clone(scan=True)) == once < cost(model.clone(remat="full"))
  assert cost(with_fields(model.clone(remat="full"), remat="none", reversible=False)) == once


def test_a_step_is_counted_without_what_is_recomputed_and_shared_by_the_devices():
  run, four = (engine.compiled(engine.small("msn"), devices=n).run for n in (1, 4))
  flops = run.step_flops(run.trace_steps())
  again = dataclasses.replace(run.method, model=run.method.model.clone(remat="full"))
  heavier = dataclasses.replace(run, methods={0: again})
  assert count(heavier.trace_steps()[0].jaxpr) > flops == heavier.step_flops(heavier.trace_steps()) > 0
  assert four.step_flops(four.trace_steps()) == flops / 4
