"""Invertible changes of layout between the arrays of a file and ours."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Move:
  """An invertible change of layout; both functions take and return tuples of arrays in the order of the rule's names."""

  load: Callable[[Arrays], Arrays]
  dump: Callable[[Arrays], Arrays]


def single(load: Callable[[np.ndarray], np.ndarray], dump: Callable[[np.ndarray], np.ndarray]) -> Move:
  """A move of every array for itself."""
  return Move(lambda arrays: tuple(map(load, arrays)), lambda arrays: tuple(map(dump, arrays)))


def chain(*moves: Move) -> Move:
  """One move after the other on the way in, and back in reverse order."""

  def run(arrays: Arrays, steps: Iterable[Callable[[Arrays], Arrays]]) -> Arrays:
    return functools.reduce(lambda value, step: step(value), steps, arrays)

  return Move(lambda a: run(a, [m.load for m in moves]), lambda a: run(a, [m.dump for m in reversed(moves)]))


def _rank(value: np.ndarray, rank: int) -> np.ndarray:
  if value.ndim != rank:
    raise ValueError(f"{rank} axes are expected")
  return value


SAME = single(lambda x: x, lambda x: x)
LINEAR = single(lambda w: _rank(w, 2).T, lambda w: _rank(w, 2).T)  # [out, in] <-> [in, out]
CONV = single(lambda w: _rank(w, 4).transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))  # OIHW <-> HWIO
STACK = Move(lambda a: tuple(a[0]), lambda a: (np.stack(a),))  # [n, ...] <-> n arrays
UNSTACK = Move(STACK.dump, STACK.load)  # n arrays <-> [n, ...]


def rows(parts: int) -> Move:
  """One array whose first axis holds `parts` equal parts <-> these parts."""
  return Move(lambda a: tuple(np.split(a[0], parts)), lambda a: (np.concatenate(a),))


def leading(count: int) -> Move:
  """[1, ..., 1, D] with `count` leading ones <-> [D]."""
  return single(lambda x: x.reshape(x.shape[count:]), lambda x: x.reshape((1,) * count + x.shape))


def grid(shape: tuple[int, int]) -> Move:
  """A table [1, h, w, D] <-> [1, h*w, D]."""
  return single(lambda x: x.reshape(1, -1, x.shape[-1]), lambda x: x.reshape(1, *shape, x.shape[-1]))


def heads_kernel(heads: int) -> Move:
  """A torch projection [H*hd, D] <-> [D, H, hd]."""
  return single(lambda w: w.T.reshape(w.shape[1], heads, -1), lambda w: w.reshape(w.shape[0], -1).T)


def heads_bias(heads: int) -> Move:
  """[H*hd] <-> [H, hd]."""
  return single(lambda b: b.reshape(heads, -1), lambda b: b.reshape(-1))


def out_kernel(heads: int) -> Move:
  """A torch output projection [D, H*hd] <-> [H, hd, D]."""
  return single(lambda w: w.T.reshape(heads, -1, w.shape[0]), lambda w: w.reshape(-1, w.shape[-1]).T)
