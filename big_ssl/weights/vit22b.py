"""Rules of timm's ViTs with parallel blocks (`ParallelScalingBlock`, attention pooling), the public form of ViT-22B."""

from __future__ import annotations

import numpy as np

from big_ssl.weights.heads import classifier
from big_ssl.weights.keymap import QKV, Keep, Rule, conv, linear, tensor
from big_ssl.weights.moves import LINEAR, Arrays, Move, chain, heads_bias, heads_kernel, out_kernel, rows


def parallel(*, heads: int) -> tuple[Rule | Keep, ...]:
  """All of the network and its classifier; RMS norms have no bias, LayerNorms do."""
  block, ours = "blocks.{i}", "backbone/block_{i}"
  norms = {
    f"{block}.in_norm": f"{ours}/norm",
    f"{block}.q_norm": f"{ours}/attention/query_norm",
    f"{block}.k_norm": f"{ours}/attention/key_norm",
    "norm_pre": "backbone/norm_pre",
    "norm": "backbone/norm",
    "attn_pool.norm": "backbone/map_head/norm",
  }
  pool = "backbone/map_head/attention"
  pair = lambda leaf: tuple(f"params/{pool}/{name}/{leaf}" for name in QKV[1:])
  return (
    *tensor("pos_embed", "backbone/pos_embed"),
    *conv("patch_embed.proj", "backbone/patch_embed/conv"),
    *(rule for theirs, path in norms.items() for rule in _norm(theirs, path)),
    Rule(f"{block}.in_proj.weight", _parts(ours, "kernel"), _fused_kernel(heads)),
    Rule(f"{block}.in_proj.bias", _parts(ours, "bias", mlp=False), chain(rows(3), heads_bias(heads))),
    *tensor(f"{block}.mlp_bias", f"{ours}/mlp/fc1/bias"),
    *tensor(f"{block}.attn_out_proj.weight", f"{ours}/attention/out/kernel", out_kernel(heads)),
    *tensor(f"{block}.attn_out_proj.bias", f"{ours}/attention/out/bias"),
    *linear(f"{block}.mlp_out_proj", f"{ours}/mlp/fc2"),
    *tensor(f"{block}.ls.gamma", f"{ours}/ls/scale"),
    *tensor("attn_pool.latent", "backbone/map_head/probe"),
    *tensor("attn_pool.q.weight", f"{pool}/query/kernel", heads_kernel(heads)),
    *tensor("attn_pool.q.bias", f"{pool}/query/bias", heads_bias(heads)),
    Rule("attn_pool.kv.weight", pair("kernel"), chain(rows(2), heads_kernel(heads))),
    Rule("attn_pool.kv.bias", pair("bias"), chain(rows(2), heads_bias(heads))),
    *tensor("attn_pool.proj.weight", f"{pool}/out/kernel", out_kernel(heads)),
    *tensor("attn_pool.proj.bias", f"{pool}/out/bias"),
    *linear("attn_pool.mlp.fc{j}", "backbone/map_head/mlp/fc{j}"),
    *classifier("head"),
  )


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
  return tensor(f"{theirs}.weight", f"{ours}/norm/scale") + tensor(f"{theirs}.bias", f"{ours}/norm/bias")


def _parts(ours: str, leaf: str, *, mlp: bool = True) -> tuple[str, ...]:
  projections = tuple(f"params/{ours}/attention/{name}/{leaf}" for name in QKV)
  return ((f"params/{ours}/mlp/fc1/{leaf}",) if mlp else ()) + projections


def _fused_kernel(heads: int) -> Move:
  """Rows [mlp | q | k | v] of one matrix [mlp_dim + 3 D, D] <-> fc1 [D, mlp_dim] and three [D, heads, d]."""
  split = heads_kernel(heads)

  def load(arrays: Arrays) -> Arrays:
    fused = arrays[0]
    mlp, attention = np.split(fused, [fused.shape[0] - 3 * fused.shape[1]])
    return LINEAR.load((mlp,)) + split.load(tuple(np.split(attention, 3)))

  def dump(arrays: Arrays) -> Arrays:
    return (np.concatenate(LINEAR.dump(arrays[:1]) + split.dump(arrays[1:])),)

  return Move(load, dump)
