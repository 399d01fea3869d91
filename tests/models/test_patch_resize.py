"""PI-resize: the public numbers, and what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.models.patch_resize import bilinear_matrix, pi_matrix, resize_kernel


def test_kernels_are_those_of_the_public_code_and_of_the_closed_form(golden):
  z = golden("flexivit_pi_resize")
  names = sorted(key.split("/")[1] for key in z if key.startswith("f64/"))
  assert len(names) >= 10
  for name in names:
    size = tuple(int(n) for n in name.split("_to_")[1].split("x"))
    kernel = z[f"{name}/kernel"]
    exact = resize_kernel(kernel.astype(np.float64), size=size)
    np.testing.assert_allclose(exact, z[f"f64/{name}"], atol=1e-9, rtol=0, err_msg=name)
    if f"{name}/resampled" in z:
      ours = resize_kernel(jnp.asarray(kernel), size=size, xp=jnp)
      np.testing.assert_allclose(ours, z[f"{name}/resampled"], atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("old,new", [((8, 8), (16, 16)), ((5, 7), (9, 12)), ((4, 4), (6, 8))])
def test_enlarged_kernels_give_enlarged_patches_the_same_tokens(old, new):
  rng = np.random.default_rng(0)
  patch, kernel = rng.normal(size=old), rng.normal(size=(*old, 3))
  rows, columns = (bilinear_matrix(o, new=n) for o, n in zip(old, new, strict=True))
  large = rows @ patch @ columns.T
  resized = resize_kernel(kernel, size=new)
  np.testing.assert_allclose(np.tensordot(large, resized, 2), np.tensordot(patch, kernel, 2), atol=1e-10)


def test_halving_adds_two_by_two_blocks():
  kernel = np.random.default_rng(0).normal(size=(16, 16, 3, 4))
  blocks = kernel.reshape(8, 2, 8, 2, 3, 4).sum((1, 3))
  np.testing.assert_allclose(resize_kernel(kernel, size=(8, 8)), blocks, atol=1e-12)


def test_a_kernel_of_the_size_asked_for_is_itself_and_shared_matrices_cannot_be_changed():
  kernel = np.ones((4, 4, 1))
  assert resize_kernel(kernel, size=(4, 4)) is kernel
  with pytest.raises(ValueError, match="read-only"):
    pi_matrix(4, new=6)[0, 0] = 1


def test_gradients_flow_to_the_stored_kernel():
  kernel = jnp.ones((4, 4, 1, 2))
  grad = jax.grad(lambda k: jnp.sum(resize_kernel(k, size=(6, 3), xp=jnp) ** 2))(kernel)
  assert grad.shape == kernel.shape and np.all(np.isfinite(grad)) and np.any(grad)
