"""Layouts of packed and native-aspect ViTs: vit-pytorch's NaViT, timm's factorized NaFlexVit, big_vision's NaFlex."""

from __future__ import annotations

import math

from big_ssl.core.types import UserError
from big_ssl.weights import describe, navit
from big_ssl.weights.describe import Fields, Shapes
from big_ssl.weights.family import DDP, UNIT, Layout, heads_of, prefixes

_PLAIN = {"qk_norm": "none", "attention_bias": True, "norm_bias": True, "pool": "mean"}  # as ViTs are, not as the paper's


def _fields(
  *, width: int, depth: int, mlp_dim: int, heads: int, values: int, tables: tuple[int, int], given: Fields
) -> Fields:
  """`values` are those of a patch, `tables` the entries of the positions of rows and columns."""
  channels = given.get("channels", 3)
  patch = math.isqrt(values // channels)
  if patch**2 * channels != values:
    raise UserError(f"weights: patches of {values} values are no squares of {channels} channels; give --model.channels=N.")
  if tables[0] != tables[1]:
    raise UserError(f"weights: positions of {tables[0]} rows and {tables[1]} columns; a NaViT here has as many of both.")
  heads = heads or given.get("heads") or describe.heads_of(width)
  if not heads:
    raise UserError(f"weights: a width of {width} does not say the number of heads; give --model.heads=N.")
  sizes = {"width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
  return {"name": "navit", "variant": "custom"} | sizes | {"patch": patch, "image_size": patch * tables[0]}


def _vit_pytorch(shapes: Shapes, given: Fields) -> Fields:
  width, values = shapes["to_patch_embedding.1.weight"]
  return _fields(
    width=width,
    depth=describe.count(shapes, r"transformer\.layers\.(\d+)\."),
    mlp_dim=shapes["transformer.layers.0.1.1.weight"][0],
    heads=shapes["transformer.layers.0.0.q_norm.gamma"][0],
    values=values,
    tables=(shapes["pos_embed_height"][0], shapes["pos_embed_width"][0]),
    given=given,
  )


def _timm(shapes: Shapes, given: Fields) -> Fields:
  width, values = shapes["embeds.proj.weight"]
  return _fields(
    width=width,
    depth=describe.count(shapes, r"blocks\.(\d+)\."),
    mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
    heads=0,
    values=values,
    tables=(shapes["embeds.pos_embed_y"][1], shapes["embeds.pos_embed_x"][1]),
    given=given,
  )


def _big_vision(shapes: Shapes, given: Fields) -> Fields:
  values, width = shapes["embedding/kernel"]
  block = "Transformer/encoderblock_0"
  return _fields(
    width=width,
    depth=describe.count(shapes, r"Transformer/encoderblock_(\d+)/"),
    mlp_dim=shapes[f"{block}/MlpBlock_0/Dense_0/kernel"][-1],
    heads=shapes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"][-2],
    values=values,
    tables=shapes["pos_embedding"][:2],
    given=given,
  )


NAVIT_LAYOUTS: tuple[Layout, ...] = (
  Layout(
    name="vit_pytorch_navit",
    title="vit-pytorch NaViT",
    format="official",  # the paper's code is not public
    model="navit",
    marks=("to_patch_embedding.1.weight", "pos_embed_height", "attn_pool_queries", "transformer.layers.0.0.q_norm.gamma"),
    clean=prefixes(*DDP),
    fields=_vit_pytorch,
    rules=lambda fields, names: (
      navit.vit_pytorch(heads=heads_of(fields), patch=fields["patch"], channels=fields.get("channels", 3)).rules
    ),
    fixed={
      **{"qk_norm": "l2", "patch_norm": True, "pos_coordinates": "absolute", "pool_norm": True, "layernorm_eps": 1e-5},
    },
    normalization=None,
  ),
  Layout(
    name="timm_naflex",
    title="timm NaFlexVit of factorized positions",
    format="timm",
    model="navit",
    marks=("embeds.proj.weight", "embeds.pos_embed_y", "embeds.pos_embed_x", "blocks.0.attn.qkv.weight", "norm.weight"),
    clean=prefixes(*DDP),
    fields=_timm,
    rules=lambda fields, names: navit.timm_factorized(heads=heads_of(fields)).rules,
    fixed=_PLAIN,
    normalization=None,
  ),
  Layout(
    name="bigvision_naflex",
    title="big_vision NaFlex ViT",
    format="bigvision",
    model="navit",
    marks=("embedding/kernel", "pos_embedding", "Transformer/encoder_norm/scale"),
    shaped=lambda shapes: len(shapes["embedding/kernel"]) == 2,
    fields=_big_vision,
    rules=lambda fields, names: navit.big_vision_naflex().rules,
    fixed=_PLAIN | {"gelu": "tanh", "pos_kind": "table"},
    normalization=UNIT,
  ),
)
