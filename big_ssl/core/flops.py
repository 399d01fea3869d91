"""FLOPs of the matrix products and convolutions of a traced function: what utilization is counted by.

XLA counts the body of a loop once, counts what is computed again for the gradient, and knows nothing of the kernels that it
calls; so scanned layers, rematerialized ones and fused attention would each make utilization wrong. Here loops count as
often as they run, and the caller traces a model that computes nothing twice (model FLOPs utilization, arXiv 2204.02311,
appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax.extend.core

_FUSED_ATTENTION = "dot_product_attention_"  # cuDNN's kernels: two products forward, five backward, of which one is done again


def count(jaxpr: Any) -> float:
  """FLOPs of a jaxpr, two per multiplication and addition, over all devices; of a loop whose end is not known, one pass."""
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval
    per_output = kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    # The gradient of a strided convolution reads an input with zeros in between, which nothing is multiplied with.
    return 2.0 * equation.outvars[0].aval.size * per_output / math.prod(params["lhs_dilation"])
  if name.startswith(_FUSED_ATTENTION):
    query, key = (v.aval for v in equation.invars[:2])  # [B, T, N, d], [B, S, N, d]
    return (4.0 if "fwd" in name else 8.0) * query.size * key.shape[1]
  parts = [count(inner) for inner in _inner(params)]
  if name == "cond":
    return max(parts, default=0.0)
  return sum(parts) * (params["length"] if name == "scan" else 1)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
  """The jaxprs among the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, (list, tuple)) else (value,):
      if isinstance(item, jax.extend.core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, jax.extend.core.Jaxpr):
        yield item
