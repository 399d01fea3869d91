"""Rules of Vision Transformers in torch files: DINO, MSN, DINOv2, timm, and Hugging Face's ViT, ViTMSN and Dinov2."""

from __future__ import annotations

from big_ssl.weights.heads import classifier
from big_ssl.weights.keymap import Keep, Rule, conv, fused_attention, linear, norm, split_attention, tensor
from big_ssl.weights.moves import LINEAR, chain, rows

MASK = "only the pretraining that masks patches reads it"


def official(*, heads: int, registers: str = "register_tokens", timm_swiglu: bool = False) -> tuple[Rule | Keep, ...]:
  """The names of DINO, MSN, DINOv2 and timm, which differ in little; heads on top are rules of their own.

  Args:
    heads: attention heads, which no file says.
    registers: "register_tokens" (DINOv2) or "reg_token" (timm).
    timm_swiglu: fc1 and fc2 are the two layers of a SwiGLU, which DINOv2 calls w12 and w3.
  """
  block, ours = "blocks.{i}", "backbone/block_{i}"
  swiglu = ("mlp.fc1", "mlp.fc2") if timm_swiglu else ("mlp.w12", "mlp.w3")
  return (
    *_tokens("cls_token", "pos_embed", registers),
    Keep("mask_token", MASK),
    *conv("patch_embed.proj", "backbone/patch_embed/conv"),
    *norm("norm", "backbone/norm/norm"),
    *norm("fc_norm", "backbone/fc_norm/norm"),
    *norm(f"{block}.norm1", f"{ours}/norm1/norm"),
    *norm(f"{block}.norm2", f"{ours}/norm2/norm"),
    *fused_attention(f"{block}.attn.qkv", f"{block}.attn.proj", f"{ours}/attention", heads=heads),
    *_swiglu(*(f"{block}.{name}" for name in swiglu), f"{ours}/mlp"),
    *linear(f"{block}.mlp.fc1", f"{ours}/mlp/fc1"),
    *linear(f"{block}.mlp.fc2", f"{ours}/mlp/fc2"),
    *tensor(f"{block}.ls1.gamma", f"{ours}/ls1/scale"),
    *tensor(f"{block}.ls2.gamma", f"{ours}/ls2/scale"),
  )


def hugging_face(*, heads: int, dinov2: bool) -> tuple[Rule | Keep, ...]:
  """The names in files of transformers, without the model's prefix ("vit.", "dinov2.").

  Args:
    dinov2: whether blocks are named as in Dinov2 (norm1, mlp.fc1) or as in ViT (layernorm_before, intermediate.dense).
  """
  block, ours = "encoder.layer.{i}", "backbone/block_{i}"
  inner = f"{block}.attention.attention"
  projections = (f"{inner}.query", f"{inner}.key", f"{inner}.value", f"{block}.attention.output.dense")
  names = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")
  if not dinov2:
    names = ("layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")
  norm1, norm2, fc1, fc2 = (f"{block}.{name}" for name in names)
  return (
    *_tokens("embeddings.cls_token", "embeddings.position_embeddings", "embeddings.register_tokens"),
    Keep("embeddings.mask_token", MASK),
    Keep("pooler.dense.*", "a layer of transformers' that no pretraining here has had"),
    *conv("embeddings.patch_embeddings.projection", "backbone/patch_embed/conv"),
    *norm("layernorm", "backbone/norm/norm"),
    *norm(norm1, f"{ours}/norm1/norm"),
    *norm(norm2, f"{ours}/norm2/norm"),
    *split_attention(*projections, f"{ours}/attention", heads=heads),
    *linear(fc1, f"{ours}/mlp/fc1"),
    *linear(fc2, f"{ours}/mlp/fc2"),
    *_swiglu(f"{block}.mlp.weights_in", f"{block}.mlp.weights_out", f"{ours}/mlp"),
    *tensor(f"{block}.layer_scale1.lambda1", f"{ours}/ls1/scale"),
    *tensor(f"{block}.layer_scale2.lambda1", f"{ours}/ls2/scale"),
    *classifier("classifier"),
  )


def _tokens(cls: str, positions: str, registers: str) -> tuple[Rule, ...]:
  names = {cls: "cls_token", positions: "pos_embed", registers: "registers"}
  return tuple(rule for theirs, ours in names.items() for rule in tensor(theirs, f"backbone/{ours}"))


def _swiglu(first: str, last: str, ours: str) -> tuple[Rule, ...]:
  """Rows [gate; value] of one layer, and the layer after the product."""
  part = lambda leaf: tuple(f"params/{ours}/{name}/{leaf}" for name in ("gate", "value"))
  return (
    Rule(f"{first}.weight", part("kernel"), chain(rows(2), LINEAR)),
    Rule(f"{first}.bias", part("bias"), rows(2)),
    *linear(last, f"{ours}/out"),
  )
