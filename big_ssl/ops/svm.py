"""Linear support vector machines with a squared hinge: many binary problems at once, to convergence, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np

POSITIVE_WEIGHT = 2.0  # of a positive's hinge beside a negative's 1 (arXiv 1905.01235, public code)


@dataclasses.dataclass(frozen=True)
class Svm:
  """P machines.

  Attributes:
    weights: [D, P] float64.
    intercepts: [P].
    objective: [P], at the minimum.
    gradient: [P], norm of the gradient there beside that at zero.
  """

  weights: np.ndarray
  intercepts: np.ndarray
  objective: np.ndarray
  gradient: np.ndarray

  def decide(self, x: np.ndarray) -> np.ndarray:
    """Scores [n, P] of x [n, D]; positive is present."""
    return np.asarray(x, np.float64) @ self.weights + self.intercepts


def normalize(x: np.ndarray) -> np.ndarray:
  """x / (||x|| + 1e-5) for the rows of x [n, D], float64 (arXiv 1905.01235, public code)."""
  x = np.asarray(x, np.float64)
  return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)


def costs(present: np.ndarray, *, c: float | np.ndarray) -> np.ndarray:
  """C c_i of the rows, [n, P] float64: twice as much for what is present [n, P] bool; c may be one per problem."""
  return c * np.where(present, POSITIVE_WEIGHT, 1.0)


def fit(
  x: np.ndarray, *, present: np.ndarray, cost: np.ndarray, start: Svm | None = None, tolerance: float = 1e-8
) -> Svm:
  """The unique minima of (||w||^2 + b^2) / 2 + sum_i cost_i max(0, 1 - y_i (w x_i + b))^2, y = 1 or -1.

  This is scikit-learn's LinearSVC (liblinear), whose intercept is penalized too. The P problems share x and are solved
  side by side by Newton's method: the Hessian, identity + 2 sum over the rows inside the margin of cost_i x_i x_i^T, is
  met by conjugate gradients, and no matrix larger than x is formed. With fewer rows than dimensions everything happens
  in the space of the rows.

  Args:
    x: [n, D] features, finite.
    present: [n, P] bool, y = 1.
    cost: [n, P], at least 0; a row of cost 0 takes no part in that problem.
    start: near the minima, to be there sooner; they do not depend on it.
    tolerance: of the gradient's norm beside the one at zero, but at least beside a millionth of the costs' sum.

  Raises:
    ArithmeticError: no convergence, which only features of absurd scale should bring about.
  """
  data = np.concatenate([np.asarray(x, np.float64), np.ones((len(x), 1))], axis=1)
  sign = np.where(present, 1.0, -1.0)
  weights = np.zeros((data.shape[1], sign.shape[1]))
  if start is not None:
    weights = np.concatenate([start.weights, start.intercepts[None]])
  basis = None
  if data.shape[0] < data.shape[1]:
    basis, triangle = np.linalg.qr(data.T)
    data, weights = triangle.T, basis.T @ weights
  weights, gradient = _newton(data, sign, cost, weights, tolerance)
  hinge = np.maximum(0.0, 1 - sign * (data @ weights))
  objective = 0.5 * np.sum(weights**2, axis=0) + np.sum(cost * hinge**2, axis=0)
  weights = weights if basis is None else basis @ weights
  return Svm(weights[:-1], weights[-1], objective, gradient)


def _newton(
  x: np.ndarray, sign: np.ndarray, cost: np.ndarray, weights: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
  """The minima [D, P] and their relative gradients [P]; solved problems drop out as they go."""
  # Where the costs of both kinds of rows are equal and features are next to 0, that at zero is next to nothing.
  floor = np.maximum(1e-6 * cost.sum(axis=0), 1e-300)
  scale = np.maximum(np.linalg.norm(2 * x.T @ (cost * sign), axis=0), floor)
  relative = np.full(len(scale), np.inf)
  rest = np.arange(len(scale))
  for _ in range(200):
    w, s, c = weights[:, rest], sign[:, rest], cost[:, rest]
    slack = 1 - s * (x @ w)
    inside = (slack > 0) * c
    gradient = w - 2 * x.T @ (inside * s * slack)
    relative[rest] = np.linalg.norm(gradient, axis=0) / scale[rest]
    wanted = relative[rest] > tolerance
    if not wanted.any():
      return weights, relative
    rest, w, s, c, slack, inside, gradient = (v[..., wanted] for v in (rest, w, s, c, slack, inside, gradient))
    accuracy = np.clip(0.1 * np.sqrt(relative[rest]), 1e-6, 0.1)
    direction = _conjugate_gradients(x, 2 * inside, -gradient, accuracy)
    weights[:, rest] = w + _length(w, direction, slack, s * (x @ direction), c) * direction
  raise ArithmeticError(f"SVM: {len(rest)} problems did not converge, gradient {relative.max():.1e} of that at zero")


def _conjugate_gradients(x: np.ndarray, curvature: np.ndarray, target: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
  """(I + X^T diag(curvature) X)^-1 target to a relative residual, a column per problem; the diagonal preconditions."""
  diagonal = 1 + (x**2).T @ curvature
  found, residual = np.zeros_like(target), target.copy()
  scaled = residual / diagonal
  direction, product = scaled, np.sum(residual * scaled, axis=0)
  goal = accuracy * np.linalg.norm(target, axis=0)
  for _ in range(10 * len(x) + 100):
    going = np.linalg.norm(residual, axis=0) > goal
    if not going.any():
      break
    moved = direction + x.T @ (curvature * (x @ direction))
    length = going * product / np.maximum(np.sum(direction * moved, axis=0), 1e-300)
    found, residual = found + length * direction, residual - length * moved
    scaled = residual / diagonal
    product, before = np.sum(residual * scaled, axis=0), product
    direction = scaled + product / np.maximum(before, 1e-300) * direction
  return found


def _length(
  weights: np.ndarray, direction: np.ndarray, slack: np.ndarray, speed: np.ndarray, cost: np.ndarray
) -> np.ndarray:
  """How far to go, [P]: the zero of the derivative along the direction, which is piecewise linear and rising.

  Args:
    weights, direction: [D, P].
    slack, speed: [n, P], 1 - y (w x + b) and how fast it falls.
    cost: [n, P].
  """
  linear, square = np.sum(weights * direction, axis=0), np.sum(direction**2, axis=0)
  low, high, at = np.zeros(len(square)), np.full(len(square), np.inf), np.ones(len(square))
  for _ in range(30):
    left = slack - at * speed
    inside = (left > 0) * cost * speed
    slope = linear + at * square - 2 * np.sum(inside * left, axis=0)
    low, high = np.where(slope <= 0, at, low), np.where(slope > 0, at, high)
    newton = at - slope / np.maximum(square + 2 * np.sum(inside * speed, axis=0), 1e-300)
    middle = np.where(np.isfinite(high), 0.5 * (low + high), 2 * at)
    following = np.where((newton > low) & (newton < high), newton, middle)
    if np.all(np.abs(following - at) <= 1e-12 * at):
      break
    at = following
  return at


def stratified_folds(present: np.ndarray, *, folds: int, used: np.ndarray | None = None) -> np.ndarray:
  """Fold [n, K] of every row for each class: scikit-learn's StratifiedKFold without shuffling, on present [n, K] bool.

  Rows that are not `used` [n, K] are in fold -1.

  Of each of the two kinds of rows the first go to fold 0, the next to fold 1; which fold gets the row that is left over
  follows from the rows sorted by kind, counted in turn, the kind of row 0 first.
  """
  count, classes = present.shape
  out = np.full((count, classes), -1, np.int32)
  for k in range(classes):
    rows = np.arange(count) if used is None else np.flatnonzero(used[:, k])
    kind = (present[rows, k] != present[rows[:1], k]).astype(int)
    ordered = np.sort(kind)
    for value in (0, 1):
      sizes = [int(np.sum(ordered[i::folds] == value)) for i in range(folds)]
      out[rows[kind == value], k] = np.repeat(np.arange(folds), sizes)
  return out
