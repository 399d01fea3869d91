"""Layouts of Vision Transformers: DINO, MSN, DINOv2, timm, torchvision, Hugging Face, big_vision, LOCA."""

from __future__ import annotations

import re
from collections.abc import Collection

from big_ssl.weights import bigvision, describe, heads, loca, vit, vit22b
from big_ssl.weights.describe import Fields
from big_ssl.weights.family import DDP, HF_NAMES, UNIT, WRAPPED, Layout, Rules, heads_of, prefixes
from big_ssl.weights.keymap import Keep, tensor

_TIMM_VIT = ("pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
_TORCH_VIT = ("cls_token", *_TIMM_VIT)
_HF_VIT = ("embeddings.cls_token", "embeddings.patch_embeddings.projection.weight")
_LINEAR = re.compile(r"\.mlp\.linear_([12])\.")
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")


def _dino(fields: Fields, names: Collection[str]) -> Rules:
  return vit.official(heads=heads_of(fields)) + heads.dino_head_of(names)


def _msn(fields: Fields, names: Collection[str]) -> Rules:
  return vit.official(heads=heads_of(fields)) + heads.projection("fc", "head") + tensor("prototypes", "prototypes")


def _dinov2(fields: Fields, names: Collection[str]) -> Rules:
  loss = "a head of DINOv2's pretraining, which is no method here"
  return (*vit.official(heads=heads_of(fields)), Keep("dino_head.*", loss), Keep("ibot_head.*", loss))


def _dinov2_name(name: str) -> str:
  return _CHUNK.sub(r"blocks.\1.", prefixes(*DDP, "backbone.")(name))


def _timm_vit(fields: Fields, names: Collection[str]) -> Rules:
  swiglu, count = fields.get("mlp") == "swiglu", heads_of(fields)
  scale = "gamma_{}" if describe.matches(names, r"blocks\.\d+\.gamma_1") else "ls{}.gamma"
  rules = vit.official(heads=count, registers="reg_token", timm_swiglu=swiglu, scale=scale)
  return rules + vit.more_norms() + vit.attention_pool(heads=count) + heads.classifier("head")


def _torchvision_name(name: str) -> str:
  return _LINEAR.sub(lambda m: f".mlp.{3 * int(m[1]) - 3}.", prefixes(*DDP)(name))


def _timm_parallel(fields: Fields, names: Collection[str]) -> Rules:
  return vit22b.parallel(heads=heads_of(fields), qkv_bias=fields.get("qkv_bias", True))


def _bigvision(fields: Fields, names: Collection[str]) -> Rules:
  scanned = describe.matches(names, "Transformer/encoderblock/")
  return bigvision.big_vision(
    depth=_depth(fields) if scanned else 0, old=describe.matches(names, "Transformer/posembed_input")
  )


def _depth(fields: Fields) -> int:
  size = describe.vit_lib.SIZES.get(fields.get("variant", ""))
  return fields.get("depth") or (size.depth if size else 0)


def _loca(fields: Fields, names: Collection[str]) -> Rules:
  size, patch = fields["image_size"], fields["patch"]
  height, width = (size, size) if isinstance(size, int) else size
  return loca.loca(table=(height // patch, width // patch))


def _bigvision_fields(shapes: describe.Shapes, given: Fields) -> Fields:
  table = "Transformer/posembed_input/pos_embedding"
  table = table if table in shapes else "pos_embedding"
  scanned = any(name.startswith("Transformer/encoderblock/") for name in shapes)
  block = "Transformer/encoderblock"
  return describe.flax_vit(shapes, table=table, block=block, scanned=scanned, patch="embedding", given=given)


def _torch_vit(names: dict[str, str]):
  return lambda shapes, given: describe.torch_vit(shapes, names=names, given=given)


_VIT = {"model": "vit", "fields": _torch_vit(describe.OFFICIAL)}

VIT_LAYOUTS: tuple[Layout, ...] = (
  Layout(
    name="dino",
    title="DINO ViT",
    format="official",
    marks=_TORCH_VIT,
    lacks=("reg_token", "fc_norm.weight", "head.weight"),
    hints=("torch", "teacher", "student"),
    rules=_dino,
    clean=WRAPPED,
    fixed={"pos_rule": "dino"},
    **_VIT,
  ),
  Layout(
    name="msn",
    title="MSN ViT",
    format="official",
    marks=_TORCH_VIT,
    lacks=("blocks.0.ls1.gamma", "head.weight"),
    hints=("torch", "target_encoder", "encoder"),
    rules=_msn,
    clean=prefixes(*DDP),
    fixed={"pos_rule": "msn"},
    **_VIT,
  ),
  Layout(
    name="dinov2",
    title="DINOv2 ViT",
    format="official",
    marks=(*_TORCH_VIT, "blocks.0.ls1.gamma", "mask_token"),
    lacks=("register_tokens",),
    hints=("torch", "teacher"),
    rules=_dinov2,
    clean=_dinov2_name,
    fixed={"pos_rule": "dino"},
    **_VIT,
  ),
  Layout(
    name="dinov2_registers",
    title="DINOv2 ViT with registers",
    format="official",
    marks=(*_TORCH_VIT, "blocks.0.ls1.gamma", "mask_token", "register_tokens"),
    hints=("torch", "teacher"),
    rules=_dinov2,
    clean=_dinov2_name,
    fixed={"pos_rule": "antialias"},
    **_VIT,
  ),
  Layout(
    name="timm_vit",
    title="timm ViT",
    format="timm",
    model="vit",
    marks=_TIMM_VIT,
    lacks=("mask_token",),
    hints=("safetensors",),
    fields=_torch_vit(describe.TIMM),
    rules=_timm_vit,
    fixed={"pos_rule": "antialias"},
    normalization=None,
  ),
  Layout(
    name="timm_parallel_vit",
    title="timm ViT of parallel blocks",
    format="timm",
    model="vit",
    marks=("pos_embed", "patch_embed.proj.weight", "blocks.0.in_proj.weight"),
    fields=_torch_vit(describe.TIMM_PARALLEL),
    rules=_timm_parallel,
    fixed={"pos_rule": "antialias", "block": "parallel"},
    normalization=None,
  ),
  Layout(
    name="torchvision_vit",
    title="torchvision ViT",
    format="torchvision",
    model="vit",
    marks=("class_token", "conv_proj.weight", "encoder.pos_embedding", "encoder.layers.encoder_layer_0.ln_1.weight"),
    clean=_torchvision_name,
    fields=_torch_vit(describe.TORCHVISION),
    rules=lambda fields, names: vit.torchvision(heads=heads_of(fields)),
    fixed={"pos_rule": "hf"},
  ),
  Layout(
    name="hf_vit",
    title="Hugging Face ViT or ViTMSN",
    format="hf",
    model="vit",
    marks=(*_HF_VIT, "encoder.layer.0.layernorm_before.weight"),
    hints=("safetensors",),
    clean=HF_NAMES,
    fields=_torch_vit(describe.HUGGING_FACE),
    rules=lambda fields, names: vit.hugging_face(heads=heads_of(fields), dinov2=False),
    fixed={"pos_rule": "hf"},
  ),
  Layout(
    name="hf_dinov2",
    title="Hugging Face Dinov2",
    format="hf",
    model="vit",
    marks=(*_HF_VIT, "encoder.layer.0.norm1.weight"),
    lacks=("embeddings.register_tokens",),
    clean=HF_NAMES,
    fields=_torch_vit(describe.DINOV2_HF),
    rules=lambda fields, names: vit.hugging_face(heads=heads_of(fields), dinov2=True),
    fixed={"pos_rule": "hf"},
  ),
  Layout(
    name="hf_dinov2_registers",
    title="Hugging Face Dinov2 with registers",
    format="hf",
    model="vit",
    marks=(*_HF_VIT, "encoder.layer.0.norm1.weight", "embeddings.register_tokens"),
    clean=HF_NAMES,
    fields=_torch_vit(describe.DINOV2_HF),
    rules=lambda fields, names: vit.hugging_face(heads=heads_of(fields), dinov2=True),
    fixed={"pos_rule": "antialias"},
  ),
  Layout(
    name="bigvision",
    title="big_vision ViT",
    format="bigvision",
    model="vit",
    marks=("embedding/kernel", "Transformer/encoder_norm/scale"),
    shaped=lambda shapes: len(shapes["embedding/kernel"]) == 4,
    hints=("npz",),
    fields=_bigvision_fields,
    rules=_bigvision,
    fixed={"pos_rule": "linear"},
    normalization=UNIT,
  ),
  Layout(
    name="loca",
    title="LOCA ViT",
    format="official",
    model="vit",
    marks=("ToTokenSequence_0/embedding/kernel", "ToTokenSequence_0/posembed_input"),
    hints=("msgpack",),
    fields=lambda shapes, given: describe.flax_vit(
      shapes,
      table="ToTokenSequence_0/posembed_input",
      block="encoderblock",
      scanned=False,
      patch="ToTokenSequence_0/embedding",
      given=given,
    ),
    rules=_loca,
    fixed={"pos_rule": "linear"},
  ),
)
