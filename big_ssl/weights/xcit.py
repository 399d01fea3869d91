"""Names of XCiT: facebookresearch/xcit and the DINO releases ("official"), and timm's."""

from __future__ import annotations

from typing import Literal

from big_ssl.weights.heads import classifier
from big_ssl.weights.keymap import Keep, Rule, batch_norm, conv, fused_attention, linear, norm, split_attention, tensor


def xcit_rules(*, heads: int, dialect: Literal["official", "timm"] = "official") -> tuple[Rule | Keep, ...]:
  """Trunk and, where there is one, classifier <-> `models.xcit.XCiT` and `models.heads.Linear`.

  timm calls the projection of the positions `pos_embed` and splits query, key and value of class attention; the rest is
  the same. DINO's files have no classifier.

  Args:
    heads: of all attention, which a file says only in the shape of its temperatures.
  """
  block, of_class = "backbone/block_{i}", "backbone/class_block_{i}"
  theirs = "cls_attn_blocks.{i}"
  if dialect == "timm":
    names = tuple(f"{theirs}.attn.{n}" for n in ("q", "k", "v", "proj"))
    class_attention = split_attention(*names, f"{of_class}/attention", heads=heads)
  else:
    class_attention = fused_attention(f"{theirs}.attn.qkv", f"{theirs}.attn.proj", f"{of_class}/attention", heads=heads)
  positions = "pos_embed" if dialect == "timm" else "pos_embeder"
  gammas = tuple(rule for i in (1, 2, 3) for rule in tensor(f"blocks.{{i}}.gamma{i}", f"{block}/ls{i}/scale"))
  return (
    *tensor("cls_token", "backbone/cls_token"),
    *conv("patch_embed.proj.{2*i}.0", "backbone/patch_embed/conv_{i}", bias=False),
    *batch_norm("patch_embed.proj.{2*i}.1", "backbone/patch_embed/bn_{i}"),
    *conv(f"{positions}.token_projection", "backbone/pos_embed"),
    *gammas,
    *(rule for i in (1, 2, 3) for rule in norm(f"blocks.{{i}}.norm{i}", f"{block}/norm{i}/norm")),
    *tensor("blocks.{i}.attn.temperature", f"{block}/attention/temperature"),
    *fused_attention("blocks.{i}.attn.qkv", "blocks.{i}.attn.proj", f"{block}/attention", heads=heads),
    *conv("blocks.{i}.local_mp.conv1", f"{block}/local/conv1"),
    *batch_norm("blocks.{i}.local_mp.bn", f"{block}/local/bn"),
    *conv("blocks.{i}.local_mp.conv2", f"{block}/local/conv2"),
    *linear("blocks.{i}.mlp.fc1", f"{block}/mlp/fc1"),
    *linear("blocks.{i}.mlp.fc2", f"{block}/mlp/fc2"),
    *tensor(f"{theirs}.gamma1", f"{of_class}/ls1/scale"),
    *tensor(f"{theirs}.gamma2", f"{of_class}/ls2/scale"),
    *norm(f"{theirs}.norm1", f"{of_class}/norm1/norm"),
    *norm(f"{theirs}.norm2", f"{of_class}/norm2/norm"),
    *class_attention,
    *linear(f"{theirs}.mlp.fc1", f"{of_class}/mlp/fc1"),
    *linear(f"{theirs}.mlp.fc2", f"{of_class}/mlp/fc2"),
    *norm("norm", "backbone/norm/norm"),
    *classifier("head"),
  )
