"""Rules of LOCA's scenic parameters, params or ema_params of a TrainState."""

from __future__ import annotations

from big_ssl.weights.bigvision import attention, block, layer_norm, leaves, mlp
from big_ssl.weights.keymap import Rule, tensor
from big_ssl.weights.moves import grid

_CROSS, _CLUSTERS = "cross_attention_block", "projection_head_for_clustering_prediction"


def loca(*, table: tuple[int, int]) -> tuple[Rule, ...]:
  """The encoder with its cluster head, and what `methods.loca` calls the position head.

  Args:
    table: grid (height, width) of the positions, which are [1, h, w, D] there and [1, h*w, D] here.
  """
  return (
    *leaves("ToTokenSequence_0/embedding", "backbone/patch_embed/conv"),
    *tensor("ToTokenSequence_0/posembed_input", "backbone/pos_embed", grid(table)),
    *block("encoderblock_{i}", "backbone/block_{i}"),
    *layer_norm("encoder_norm", "backbone/norm"),
    *leaves(f"{_CLUSTERS}/Dense_{{i-1}}", "head/fc{i}"),
    *leaves(f"{_CLUSTERS}/prototypes", "head/prototypes"),
    *attention(f"{_CROSS}/MultiHeadDotProductAttention_0", "position_head/attention"),
    *layer_norm(f"{_CROSS}/LayerNorm_0", "position_head/norm_query"),
    *layer_norm(f"{_CROSS}/LayerNorm_1", "position_head/norm_reference"),
    *layer_norm(f"{_CROSS}/LayerNorm_2", "position_head/norm_mlp"),
    *mlp(f"{_CROSS}/MlpBlock_0", "position_head/mlp"),
    *layer_norm("final_norm", "position_head/norm"),
    *leaves("position_predictor", "position_head/predictor"),
  )
