"""Rules of Vision Transformers in torch files: DINO, MSN, DINOv2, timm, torchvision, and Hugging Face's ViT, ViTMSN and Dinov2."""

from __future__ import annotations

from big_ssl.weights.heads import classifier
from big_ssl.weights.keymap import QKV, Keep, Rule, conv, fused_attention, linear, norm, split_attention, tensor
from big_ssl.weights.moves import LINEAR, chain, heads_bias, heads_kernel, out_kernel, rows

MASK = "only the pretraining that masks patches reads it"


def official(
  *, heads: int, registers: str = "register_tokens", timm_swiglu: bool = False, scale: str = "ls{}.gamma"
) -> tuple[Rule | Keep, ...]:
  """The names of DINO, MSN, DINOv2 and timm, which differ in little; heads on top are rules of their own.

  Args:
    heads: attention heads, which no file says.
    registers: "register_tokens" (DINOv2) or "reg_token" (timm).
    timm_swiglu: fc1 and fc2 are the two layers of a SwiGLU, which DINOv2 calls w12 and w3.
    scale: of LayerScale; "gamma_{}" in DeiT-III.
  """
  block, ours = "blocks.{i}", "backbone/block_{i}"
  swiglu = ("mlp.fc1", "mlp.fc2") if timm_swiglu else ("mlp.w12", "mlp.w3")
  return (
    *_tokens("cls_token", "pos_embed", registers),
    Keep("mask_token", MASK),
    *conv("patch_embed.proj", "backbone/patch_embed/conv", bias=None),
    *norm("norm", "backbone/norm/norm"),
    *norm("fc_norm", "backbone/fc_norm/norm"),
    *norm(f"{block}.norm1", f"{ours}/norm1/norm"),
    *norm(f"{block}.norm2", f"{ours}/norm2/norm"),
    *fused_attention(f"{block}.attn.qkv", f"{block}.attn.proj", f"{ours}/attention", heads=heads),
    *_swiglu(*(f"{block}.{name}" for name in swiglu), f"{ours}/mlp"),
    *linear(f"{block}.mlp.fc1", f"{ours}/mlp/fc1"),
    *linear(f"{block}.mlp.fc2", f"{ours}/mlp/fc2"),
    *(rule for i in (1, 2) for rule in tensor(f"{block}.{scale.format(i)}", f"{ours}/ls{i}/scale")),
  )


def more_norms() -> tuple[Rule | Keep, ...]:
  """Norms that only timm's ViTs have: of queries and keys, and before the blocks."""
  theirs, ours = "blocks.{i}.attn", "backbone/block_{i}/attention"
  pairs = ((f"{theirs}.q_norm", f"{ours}/query_norm"), (f"{theirs}.k_norm", f"{ours}/key_norm"))
  return (*norm("norm_pre", "backbone/norm_pre/norm"), *(rule for a, b in pairs for rule in norm(a, f"{b}/norm")))


def attention_pool(*, heads: int) -> tuple[Rule | Keep, ...]:
  """timm's `AttentionPoolLatent` <-> `models.vit_blocks.MapHead`."""
  head, pool = "backbone/map_head", "backbone/map_head/attention"
  pair = lambda leaf: tuple(f"params/{pool}/{name}/{leaf}" for name in QKV[1:])
  return (
    *tensor("attn_pool.latent", f"{head}/probe"),
    *tensor("attn_pool.q.weight", f"{pool}/query/kernel", heads_kernel(heads)),
    *tensor("attn_pool.q.bias", f"{pool}/query/bias", heads_bias(heads)),
    Rule("attn_pool.kv.weight", pair("kernel"), chain(rows(2), heads_kernel(heads))),
    Rule("attn_pool.kv.bias", pair("bias"), chain(rows(2), heads_bias(heads))),
    *tensor("attn_pool.proj.weight", f"{pool}/out/kernel", out_kernel(heads)),
    *tensor("attn_pool.proj.bias", f"{pool}/out/bias"),
    *norm("attn_pool.norm", f"{head}/norm/norm"),
    *linear("attn_pool.mlp.fc{j}", f"{head}/mlp/fc{{j}}"),
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


def torchvision(*, heads: int) -> tuple[Rule | Keep, ...]:
  """The names of torchvision's `VisionTransformer`; those of its first files are others (`mlp.linear_1`)."""
  block, ours = "encoder.layers.encoder_layer_{i}", "backbone/block_{i}"
  attention = f"{block}.self_attention"
  return (
    *_tokens("class_token", "encoder.pos_embedding"),
    *conv("conv_proj", "backbone/patch_embed/conv"),
    *norm("encoder.ln", "backbone/norm/norm"),
    *norm(f"{block}.ln_1", f"{ours}/norm1/norm"),
    *norm(f"{block}.ln_2", f"{ours}/norm2/norm"),
    *fused_attention(f"{attention}.in_proj", f"{attention}.out_proj", f"{ours}/attention", heads=heads, joint="_"),
    *linear(f"{block}.mlp.0", f"{ours}/mlp/fc1"),
    *linear(f"{block}.mlp.3", f"{ours}/mlp/fc2"),
    *classifier("heads.head"),
  )


def _tokens(cls: str, positions: str, registers: str = "") -> tuple[Rule, ...]:
  names = {cls: "cls_token", positions: "pos_embed", registers: "registers"}
  return tuple(rule for theirs, ours in names.items() if theirs for rule in tensor(theirs, f"backbone/{ours}"))


def _swiglu(first: str, last: str, ours: str) -> tuple[Rule, ...]:
  """Rows [gate; value] of one layer, and the layer after the product."""
  part = lambda leaf: tuple(f"params/{ours}/{name}/{leaf}" for name in ("gate", "value"))
  return (
    Rule(f"{first}.weight", part("kernel"), chain(rows(2), LINEAR)),
    Rule(f"{first}.bias", part("bias"), rows(2)),
    *linear(last, f"{ours}/out"),
  )
