"""Weights of packed and native-aspect ViTs: vit-pytorch's NaViT, timm's factorized NaFlexVit, big_vision's NaFlex."""

from __future__ import annotations

import functools

import numpy as np

from big_ssl.weights.keymap import Keep, KeyMap, Rule, fused_attention, linear, norm, tensor
from big_ssl.weights.moves import LINEAR, chain, heads_kernel, leading, out_kernel, rows, single


def vit_pytorch(*, heads: int, patch: int, channels: int = 3) -> KeyMap:
  """lucidrains' `na_vit.NaViT`: `models.navit.NaViT` with qk_norm "l2", patch_norm, absolute positions and pool_norm."""
  values = (channels, patch, patch)
  order = lambda x: np.moveaxis(x.reshape(*values, -1), 0, 2).reshape(x.shape)  # values (c, row, column) -> (row, column, c)
  back = lambda x: np.moveaxis(x.reshape(patch, patch, channels, -1), 2, 0).reshape(x.shape)
  pixels = single(order, back)
  rules: list[Rule | Keep] = [
    Keep("*.beta", "a buffer of zeros, its norms have no bias"),
    *tensor("pos_embed_height", "backbone/positions/y"),
    *tensor("pos_embed_width", "backbone/positions/x"),
    *tensor("attn_pool_queries", "backbone/probe"),
    *tensor("to_patch_embedding.0.gamma", "backbone/patch_norm/scale", pixels),
    *tensor("to_patch_embedding.1.weight", "backbone/patch_embed/kernel", chain(LINEAR, pixels)),
    *tensor("to_patch_embedding.1.bias", "backbone/patch_embed/bias"),
    *tensor("to_patch_embedding.2.gamma", "backbone/embed_norm/scale"),
    *tensor("transformer.layers.{i}.0.norm.gamma", "backbone/block_{i}/norm1/scale"),
    *_normed_attention("transformer.layers.{i}.0", "backbone/block_{i}/attention", heads=heads),
    *tensor("transformer.layers.{i}.1.0.gamma", "backbone/block_{i}/norm2/scale"),
    *linear("transformer.layers.{i}.1.1", "backbone/block_{i}/mlp/fc1"),
    *linear("transformer.layers.{i}.1.4", "backbone/block_{i}/mlp/fc2"),
    *tensor("transformer.norm.gamma", "backbone/norm/scale"),
    *tensor("attn_pool.norm.gamma", "backbone/pool_query_norm/scale"),
    *_normed_attention("attn_pool", "backbone/pool", heads=heads),
    *tensor("mlp_head.0.gamma", "backbone/pool_norm/scale"),
    *linear("mlp_head.1", "head/fc", bias=False),
  ]
  return KeyMap("NaViT of vit-pytorch", tuple(rules))


def _normed_attention(theirs: str, ours: str, *, heads: int) -> tuple[Rule, ...]:
  gamma = single(lambda g: g.reshape(heads, -1), lambda g: g[:, None])  # [H, 1, d] <-> [H, d]
  pair = tuple(f"params/{ours}/{name}/kernel" for name in ("key", "value"))
  return (
    *tensor(f"{theirs}.q_norm.gamma", f"{ours}/query_norm_scale", gamma),
    *tensor(f"{theirs}.k_norm.gamma", f"{ours}/key_norm_scale", gamma),
    *tensor(f"{theirs}.to_q.weight", f"{ours}/query/kernel", heads_kernel(heads)),
    Rule(f"{theirs}.to_kv.weight", pair, chain(rows(2), heads_kernel(heads))),
    *tensor(f"{theirs}.to_out.0.weight", f"{ours}/out/kernel", out_kernel(heads)),
  )


def timm_factorized(*, heads: int) -> KeyMap:
  """timm's NaFlexVit with factorized positions: qk_norm "none", biases, fractional positions, mean pooling."""
  return KeyMap(
    "NaFlexVit of timm with factorized positions",
    (
      *tensor("embeds.pos_embed_y", "backbone/positions/y", leading(1)),
      *tensor("embeds.pos_embed_x", "backbone/positions/x", leading(1)),
      *linear("embeds.proj", "backbone/patch_embed"),
      *norm("blocks.{i}.norm1", "backbone/block_{i}/norm1"),
      *fused_attention("blocks.{i}.attn.qkv", "blocks.{i}.attn.proj", "backbone/block_{i}/attention", heads=heads),
      *norm("blocks.{i}.norm2", "backbone/block_{i}/norm2"),
      *linear("blocks.{i}.mlp.fc1", "backbone/block_{i}/mlp/fc1"),
      *linear("blocks.{i}.mlp.fc2", "backbone/block_{i}/mlp/fc2"),
      *norm("norm", "backbone/norm"),
      *linear("head", "head/fc"),
    ),
  )


def big_vision_naflex() -> KeyMap:
  """big_vision's NaFlex ViT, average pooled: qk_norm "none", biases, position table, GELU "tanh"."""
  block, ours = "Transformer/encoderblock_{i}", "backbone/block_{i}"
  attention = f"{block}/MultiHeadDotProductAttention_0"
  both = lambda theirs, mine, leaves=("kernel", "bias"): tuple(
    rule for leaf in leaves for rule in tensor(f"{theirs}/{leaf}", f"{mine}/{leaf}")
  )
  affine = functools.partial(both, leaves=("scale", "bias"))
  return KeyMap(
    "NaFlex ViT of big_vision",
    (
      *tensor("pos_embedding", "backbone/positions/table"),
      *both("embedding", "backbone/patch_embed"),
      *affine(f"{block}/LayerNorm_0", f"{ours}/norm1"),
      *(r for name in ("query", "key", "value", "out") for r in both(f"{attention}/{name}", f"{ours}/attention/{name}")),
      *affine(f"{block}/LayerNorm_1", f"{ours}/norm2"),
      *both(f"{block}/MlpBlock_0/Dense_0", f"{ours}/mlp/fc1"),
      *both(f"{block}/MlpBlock_0/Dense_1", f"{ours}/mlp/fc2"),
      *affine("Transformer/encoder_norm", "backbone/norm"),
      *both("head", "head/fc"),
    ),
  )
