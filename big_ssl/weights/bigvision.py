"""Rules of flax Vision Transformers: big_vision's `.npz` in its three layouts, and the blocks of scenic."""

from __future__ import annotations

import dataclasses

from big_ssl.weights.keymap import QKV, Keep, Rule, tensor
from big_ssl.weights.moves import SAME, STACK


@dataclasses.dataclass(frozen=True)
class Children:
  """Names of the modules of a block; those of the first google-research files count all children through."""

  norm1: str = "LayerNorm_0"
  attention: str = "MultiHeadDotProductAttention_0"
  norm2: str = "LayerNorm_1"
  mlp: str = "MlpBlock_0"


OLD = Children(attention="MultiHeadDotProductAttention_1", norm2="LayerNorm_2", mlp="MlpBlock_3")


def leaves(theirs: str, ours: str, *, names: tuple[str, ...] = ("kernel", "bias")) -> tuple[Rule, ...]:
  """A flax layer <-> the same of ours."""
  return tuple(rule for name in names for rule in tensor(f"{theirs}/{name}", f"{ours}/{name}"))


def layer_norm(theirs: str, ours: str) -> tuple[Rule, ...]:
  return leaves(theirs, f"{ours}/norm", names=("scale", "bias"))


def attention(theirs: str, ours: str) -> tuple[Rule, ...]:
  return tuple(rule for name in (*QKV, "out") for rule in leaves(f"{theirs}/{name}", f"{ours}/{name}"))


def mlp(theirs: str, ours: str) -> tuple[Rule, ...]:
  return leaves(f"{theirs}/Dense_0", f"{ours}/fc1") + leaves(f"{theirs}/Dense_1", f"{ours}/fc2")


def block(theirs: str, ours: str, *, children: Children = Children()) -> tuple[Rule, ...]:
  """A pre-norm block <-> `models.vit.Block`."""
  return (
    *layer_norm(f"{theirs}/{children.norm1}", f"{ours}/norm1"),
    *attention(f"{theirs}/{children.attention}", f"{ours}/attention"),
    *layer_norm(f"{theirs}/{children.norm2}", f"{ours}/norm2"),
    *mlp(f"{theirs}/{children.mlp}", f"{ours}/mlp"),
  )


def scanned(rules: tuple[Rule, ...], *, depth: int) -> tuple[Rule, ...]:
  """`rules` whose ours have an {i}, for files with one tensor [depth, ...] of all blocks."""
  every = lambda path: tuple(path.replace("{i}", str(i)) for i in range(depth))
  return tuple(Rule(rule.theirs, every(rule.ours), STACK) for rule in rules)


def big_vision(*, depth: int = 0, old: bool = False) -> tuple[Rule | Keep, ...]:
  """big_vision's ViT, without "params/", "opt/target/" or "img/" in front.

  Args:
    depth: of a scanned file; 0 for one module per block.
    old: the google-research layout: other children, and positions that have a slot for CLS.
  """
  children = OLD if old else Children()
  table = "Transformer/posembed_input/pos_embedding" if old else "pos_embedding"
  ours = "backbone/block_{i}"
  blocks = (
    scanned(block("Transformer/encoderblock", ours, children=children), depth=depth)
    if depth
    else block("Transformer/encoderblock_{i}", ours, children=children)
  )
  head = "MAPHead_0"
  return (
    *tensor("cls", "backbone/cls_token"),
    *tensor(table, "backbone/pos_embed", SAME),
    *leaves("embedding", "backbone/patch_embed/conv"),
    *layer_norm("Transformer/encoder_norm", "backbone/norm"),
    *blocks,
    *tensor(f"{head}/probe", "backbone/map_head/probe"),
    *layer_norm(f"{head}/LayerNorm_0", "backbone/map_head/norm"),
    *attention(f"{head}/MultiHeadDotProductAttention_0", "backbone/map_head/attention"),
    *mlp(f"{head}/MlpBlock_0", "backbone/map_head/mlp"),
    *leaves("pre_logits", "head/pre_logits"),
    *leaves("head", "head/fc"),
  )
