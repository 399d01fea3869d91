"""Rules of timm's ViTs with parallel blocks (`ParallelScalingBlock`, attention pooling), the public form of ViT-22B."""

from __future__ import annotations

import numpy as np

from big_ssl.weights.heads import classifier
from big_ssl.weights.keymap import QKV, Keep, Rule, conv, linear, norm, tensor
from big_ssl.weights.moves import LINEAR, Arrays, Move, heads_bias, heads_kernel, out_kernel
from big_ssl.weights.vit import attention_pool


def parallel(*, heads: int, qkv_bias: bool = False) -> tuple[Rule | Keep, ...]:
  """All of the network and its classifier; RMS norms have no bias, LayerNorms do.

  Args:
    heads: of all attention.
    qkv_bias: whether the fused matrix has a bias, that of the MLP in it; else the MLP's is a tensor of its own.
  """
  block, ours = "blocks.{i}", "backbone/block_{i}"
  norms = {
    f"{block}.in_norm": f"{ours}/norm",
    f"{block}.q_norm": f"{ours}/attention/query_norm",
    f"{block}.k_norm": f"{ours}/attention/key_norm",
    "norm_pre": "backbone/norm_pre",
    "norm": "backbone/norm",
    "fc_norm": "backbone/fc_norm",
  }
  fused = (f"{block}.in_proj.weight", f"{block}.in_proj.bias")
  projections = (
    (Rule(fused, _parts(ours, "kernel") + _parts(ours, "bias"), _fused(heads)),)
    if qkv_bias
    else (Rule(fused[0], _parts(ours, "kernel"), _fused_kernel(heads)), *tensor(f"{block}.mlp_bias", f"{ours}/mlp/fc1/bias"))
  )
  return (
    *tensor("cls_token", "backbone/cls_token"),
    *tensor("reg_token", "backbone/registers"),
    *tensor("pos_embed", "backbone/pos_embed"),
    *conv("patch_embed.proj", "backbone/patch_embed/conv", bias=None),
    *(rule for theirs, path in norms.items() for rule in norm(theirs, f"{path}/norm")),
    *projections,
    *tensor(f"{block}.attn_out_proj.weight", f"{ours}/attention/out/kernel", out_kernel(heads)),
    *tensor(f"{block}.attn_out_proj.bias", f"{ours}/attention/out/bias"),
    *linear(f"{block}.mlp_out_proj", f"{ours}/mlp/fc2"),
    *tensor(f"{block}.ls.gamma", f"{ours}/ls/scale"),
    *attention_pool(heads=heads),
    *classifier("head"),
  )


def _parts(ours: str, leaf: str) -> tuple[str, ...]:
  return (f"params/{ours}/mlp/fc1/{leaf}", *(f"params/{ours}/attention/{name}/{leaf}" for name in QKV))


def _fused(heads: int) -> Move:
  """As `_fused_kernel`, and the bias [mlp_dim + 3 D] with it: [mlp_dim] and three [heads, d]."""
  kernels, biases = _fused_kernel(heads), heads_bias(heads)

  def load(arrays: Arrays) -> Arrays:
    weight, bias = arrays
    width = weight.shape[1]
    mlp, attention = np.split(bias, [len(bias) - 3 * width])
    return kernels.load((weight,)) + (mlp,) + biases.load(tuple(np.split(attention, 3)))

  def dump(arrays: Arrays) -> Arrays:
    return (*kernels.dump(arrays[:4]), np.concatenate((arrays[4], *biases.dump(arrays[5:]))))

  return Move(load, dump)


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
