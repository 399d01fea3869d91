"""ViT-22B (arXiv 2302.05442): the block that trains at 22 billion parameters, at that size and at smaller ones.

Attention and MLP in parallel, queries and keys normalized, RMS norms, no biases of queries, keys, values and norms; 256
tokens without CLS, pooled by attention. All of it is `models.vit.ViT`; here are the defaults. There is no public code:
layout and numerics follow timm's `ParallelScalingBlock`.
"""

from __future__ import annotations

from typing import Literal

from big_ssl.models.vit import ViT


class ViT22B(ViT):
  """ViT-22B/14: width 6144, 48 blocks, 48 heads, MLP 24576 (Table 1); compiled as one block, recomputed in the backward pass.

  Smaller ones: config.model.variant=e (4 billion), G (2 billion), or custom. On several devices set config.mesh.fsdp and
  config.mesh.tensor; tensor must divide the heads.
  """

  variant: str = "22B"
  patch: int = 14
  class_token: bool = False
  pool: Literal["auto", "cls", "mean", "map"] = "map"
  block: Literal["sequential", "parallel"] = "parallel"
  norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
  qkv_bias: bool = False
  qk_norm: Literal["none", "layernorm", "rmsnorm"] = "rmsnorm"
  patch_init: Literal["dino", "msn", "dinov2", "loca", "big_vision", "flexivit", "moco_v3"] = "big_vision"
  pos_rule: str = "antialias"
  scan: bool = True
  remat: Literal["none", "full", "dots"] = "full"
  dtype: Literal["float32", "bfloat16"] = "bfloat16"
