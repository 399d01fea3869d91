"""PI-resize of a patch embedding (FlexiViT, arXiv 2212.08013, section 3.4): one kernel for every patch size.

Let B be bilinear resizing from old to new patches. The new kernel w' minimizes the difference of <x, w> and <B x, w'> over
patches x: w' = pinv(B^T) w, exact when enlarging. B is the Kronecker product of the two axes, and so is its
pseudo-inverse: w' = P_h w P_w^T with P = pinv(B_axis^T), two tiny matrices in float64 that depend on static sizes only.
Where one axis grows and the other shrinks, the full matrix in float32 of the public code has no usable rank; the
axes by themselves have.
"""

from __future__ import annotations

import functools

import numpy as np


def bilinear_matrix(old: int, *, new: int) -> np.ndarray:
  """[new, old] float64: linear interpolation with half-pixel centers, clamped at the border, without antialiasing."""
  source = (np.arange(new) + 0.5) * old / new - 0.5
  first = np.floor(source)
  share = source - first
  matrix = np.zeros((new, old))
  for offset, weight in ((0, 1 - share), (1, share)):
    columns = np.clip(first + offset, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new), columns), weight)
  return matrix


@functools.cache
def pi_matrix(old: int, *, new: int) -> np.ndarray:
  """[new, old] float64: pinv(B^T) of one axis; read-only, since it is shared."""
  matrix = np.linalg.pinv(bilinear_matrix(old, new=new).T)
  matrix.flags.writeable = False
  return matrix


def resize_kernel(kernel: np.ndarray, *, size: tuple[int, int], xp=np) -> np.ndarray:
  """A kernel [h, w, ...] for patches of `size`; the same kernel where the size is its own.

  Never resize what was resized: shrinking loses what enlarging cannot bring back.

  Args:
    kernel: its dtype is that of the result; keep it float32 under jax.
    xp: numpy, or jax.numpy, where gradients flow to the stored kernel.
  """
  if tuple(kernel.shape[:2]) == tuple(size):
    return kernel
  rows, columns = (xp.asarray(pi_matrix(o, new=n), kernel.dtype) for o, n in zip(kernel.shape, size, strict=False))
  kwargs = {} if xp is np else {"precision": "highest"}
  return xp.einsum("ih,jw,hw...->ij...", rows, columns, kernel, **kwargs)
