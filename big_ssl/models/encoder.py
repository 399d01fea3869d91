"""Backbone and head as one module, so that student, teacher and EMA trees are the same tree."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from big_ssl.core.types import Array, Params, PyTree


class Encoder(nn.Module):
  """`head(backbone(images)[output])`; parameters {"backbone": ..., "head": ...}.

  Attributes:
    backbone: a `Backbone`.
    head: any module called as `head(features, train=...)`, or None.
    output: the backbone output that the head reads.
  """

  backbone: nn.Module
  head: nn.Module | None = None
  output: str = "pooled"

  def __call__(self, images: Array, *, train: bool, **kwargs: Any) -> dict[str, Array]:
    """Returns the backbone's outputs, and "projection" where there is a head. images: [N, H, W, C]."""
    out = self.backbone(images, train=train, **kwargs)
    if self.head is not None:
      out = out | {"projection": self.head(out[self.output], train=train)}
    return out


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Outputs of an encoder, and its batch statistics afterwards."""

  out: dict[str, Any]
  batch_stats: PyTree


def encode(
  encoder: Encoder,
  params: Params,
  batch_stats: PyTree,
  images: Array,
  *,
  train: bool,
  rng: Array | None = None,
  **kwargs: Any,
) -> Encoded:
  """Applies an encoder as a pure function; in training the batch statistics move, otherwise they are used as they are.

  Args:
    images: [N, H, W, C].
    rng: key of stochastic depth; needed only where the backbone has some.
    **kwargs: passed to the backbone, such as keep=indices.
  """
  rngs = {"drop_path": rng} if rng is not None else {}
  variables = {"params": params, "batch_stats": batch_stats}
  if not train:
    return Encoded(encoder.apply(variables, images, train=False, rngs=rngs, **kwargs), batch_stats)
  out, updated = encoder.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"], **kwargs)
  return Encoded(out, updated.get("batch_stats", {}))
