"""Key map of LOCA's scenic parameters (params or ema_params of the released checkpoints) to our trees and back."""

from __future__ import annotations

import re

import numpy as np

from big_ssl.core.types import PyTree, UserError
from big_ssl.weights.vit import flatten, nest

_ATTENTION = "MultiHeadDotProductAttention_0"
# (scenic, ours), as regular expression and as replacement of the other direction.
_NAMES = (
  ("ToTokenSequence_0/embedding/", "encoder/backbone/patch_embed/conv/"),
  ("ToTokenSequence_0/posembed_input", "encoder/backbone/pos_embed"),
  ("encoder_norm/", "encoder/backbone/norm/norm/"),
  ("projection_head_for_clustering_prediction/prototypes/", "encoder/head/prototypes/"),
  ("final_norm/", "position_head/norm/norm/"),
  ("position_predictor/", "position_head/predictor/"),
  (f"cross_attention_block/{_ATTENTION}/", "position_head/attention/"),
)
_CROSS_NORMS = {"0": "norm_query", "1": "norm_reference", "2": "norm_mlp"}
_DENSE = "projection_head_for_clustering_prediction/Dense_"


def import_loca(state: dict[str, np.ndarray]) -> PyTree:
  """Scenic's flat names ("encoderblock_0/LayerNorm_0/scale") as {"encoder": {"backbone", "head"}, "position_head"}.

  The position grid [1, h, w, D] becomes the table [1, h * w, D] of `models.vit.ViT`; all else keeps its shape.

  Raises:
    UserError: a tensor that belongs to no known place.
  """
  out = {}
  for name, value in state.items():
    ours = _ours(name)
    if ours is None:
      raise UserError(f"weights: '{name}' {value.shape} belongs to no place of LOCA's network.")
    out[ours] = value.reshape(1, -1, value.shape[-1]) if name.endswith("posembed_input") else value
  return nest(out)


def export_loca(params: PyTree, *, grid: tuple[int, int]) -> dict[str, np.ndarray]:
  """The inverse of `import_loca`; `grid` is that of the position table."""
  out = {}
  for path, value in flatten(params).items():
    value = np.asarray(value)
    name = _theirs(path)
    out[name] = value.reshape(1, *grid, value.shape[-1]) if name.endswith("posembed_input") else value
  return out


def _ours(name: str) -> str | None:
  for theirs, ours in _NAMES:
    if name.startswith(theirs):
      return ours + name.removeprefix(theirs)
  if match := re.fullmatch(r"encoderblock_(\d+)/(.+)", name):
    inner = _block(match[2], {"0": "norm1", "1": "norm2"})
    return inner and f"encoder/backbone/block_{match[1]}/{inner}"
  if match := re.fullmatch(r"cross_attention_block/(.+)", name):
    inner = _block(match[1], _CROSS_NORMS)
    return inner and f"position_head/{inner}"
  if match := re.fullmatch(_DENSE + r"(\d+)/(kernel|bias)", name):
    return f"encoder/head/fc{int(match[1]) + 1}/{match[2]}"
  return None


def _block(name: str, norms: dict[str, str]) -> str | None:
  if match := re.fullmatch(r"LayerNorm_(\d)/(scale|bias)", name):
    return f"{norms[match[1]]}/norm/{match[2]}" if match[1] in norms else None
  if match := re.fullmatch(r"MlpBlock_0/Dense_([01])/(kernel|bias)", name):
    return f"mlp/fc{int(match[1]) + 1}/{match[2]}"
  if match := re.fullmatch(_ATTENTION + r"/((?:query|key|value|out)/(?:kernel|bias))", name):
    return f"attention/{match[1]}"
  return None


def _theirs(path: str) -> str:
  for theirs, ours in _NAMES:
    if path.startswith(ours):
      return theirs + path.removeprefix(ours)
  if match := re.fullmatch(r"encoder/head/fc(\d+)/(kernel|bias)", path):
    return f"{_DENSE}{int(match[1]) - 1}/{match[2]}"
  if match := re.fullmatch(r"encoder/backbone/block_(\d+)/(.+)", path):
    prefix, inner, norms = f"encoderblock_{match[1]}", match[2], {"norm1": "0", "norm2": "1"}
  else:
    prefix, inner = "cross_attention_block", path.removeprefix("position_head/")
    norms = {ours: theirs for theirs, ours in _CROSS_NORMS.items()}
  part, *rest = inner.split("/")
  if part in norms:
    return f"{prefix}/LayerNorm_{norms[part]}/{rest[-1]}"
  if part == "mlp":
    return f"{prefix}/MlpBlock_0/Dense_{int(rest[0].removeprefix('fc')) - 1}/{rest[1]}"
  return f"{prefix}/{_ATTENTION}/{'/'.join(rest)}"
