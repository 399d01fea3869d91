"""Fields of `config.model` that the names and shapes of a file imply; what a file does not say is left to the layout."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from big_ssl.core.types import UserError
from big_ssl.models import regnet as regnet_lib
from big_ssl.models import resmlp as resmlp_lib
from big_ssl.models import vit as vit_lib
from big_ssl.models import xcit as xcit_lib
from big_ssl.models.alexnet import WIDTHS, AlexNet
from big_ssl.models.resnet import BLOCKS
from big_ssl.models.vgg import DEPTHS, VGG

Shapes = Mapping[str, tuple[int, ...]]
Fields = dict[str, Any]


def count(names: Iterable[str], pattern: str) -> int:
  """1 + the largest integer that group 1 of `pattern` matches (`re.match`), 0 without any."""
  return max((int(m[1]) + 1 for m in map(re.compile(pattern).match, names) if m is not None), default=0)


def matches(names: Iterable[str], pattern: str) -> bool:
  """Whether one of the names begins with `pattern`."""
  return any(re.match(pattern, name) for name in names)


def side(tokens: int, *, what: str) -> int:
  root = math.isqrt(tokens)
  if root * root != tokens:
    raise UserError(f"weights: '{what}' has {tokens} positions, not a square; give --model.image_size=HEIGHT,WIDTH.")
  return root


def heads_of(width: int) -> int:
  """Heads of 64, as every release but the smallest and largest has them; 0 where the width has none."""
  return width // 64 if width % 64 == 0 else 0


def vit_fields(
  *, width: int, depth: int, mlp_dim: int, heads: int, patch: int, channels: int, image_size: Any
) -> Fields:
  """A named variant where there is one; `heads` of 0 is the variant's, or 64 wide."""
  sizes = vit_lib.SIZES.items()
  same = (width, depth, mlp_dim)
  variant = next((n for n, s in sizes if (s.width, s.depth, s.mlp_dim) == same and heads in (0, s.heads)), None)
  fields = {"name": "vit", "patch": patch, "image_size": image_size}
  if variant is None:
    heads = heads or heads_of(width)
    if not heads:
      raise UserError(f"weights: a width of {width} does not say the number of heads; give --model.heads=N.")
    fields |= {"variant": "custom", "width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
  else:
    fields["variant"] = variant
  return fields if channels == 3 else fields | {"channels": channels}


def torch_vit(shapes: Shapes, *, names: Mapping[str, str], given: Fields) -> Fields:
  """Of a ViT in a torch file; `names` says where its parts are, `given` what the user says."""
  width, channels, patch, _ = shapes[names["patch"]]
  table = shapes.get(names["positions"])
  mlp_dim = _mlp_dim(shapes, names, width=width)
  if not mlp_dim or table is None:
    absent = names["positions"] if table is None else names["fc1"]
    raise UserError(f"weights: missing 1: {absent}; a ViT cannot be described without it.")
  depth = count(shapes, re.escape(names["block"]).replace("0", r"(\d+)", 1))
  cls = names["cls"] in shapes
  slot = cls and math.isqrt(table[1]) ** 2 != table[1]  # no square has another square as its neighbor
  size = given.get("image_size") or patch * side(_patches(table[1], shapes, names) - int(slot), what=names["positions"])
  if given.get("image_size"):
    height, width_ = (size, size) if isinstance(size, int) else size
    slot = cls and table[1] == (height // patch) * (width_ // patch) + 1
  of_head = shapes.get(names.get("qk_norm", ""))
  heads = given.get("heads", 0) or (width // of_head[0] if of_head else 0)
  sizes = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "heads": heads}
  fields = vit_fields(**sizes, patch=patch, channels=channels, image_size=size)
  if cls and not slot:
    fields["class_position"] = False
  if not cls:
    fields["class_token"] = False
  if _swiglu(shapes, names):
    fields["mlp"] = "swiglu"
  if names["registers"] in shapes:
    fields["registers"] = shapes[names["registers"]][1]
  return fields | _vit_options(shapes, names)


def _swiglu(shapes: Shapes, names: Mapping[str, str]) -> bool:
  """Whether the MLPs are gated: by the name of their first layer or, in timm, by twice the rows that the second reads."""
  fc1, fc2 = shapes.get(names["fc1"]), shapes.get(names.get("fc2", ""))
  return names["swiglu"] in shapes or (fc1 is not None and fc2 is not None and fc1[0] == 2 * fc2[1])


def _mlp_dim(shapes: Shapes, names: Mapping[str, str], *, width: int) -> int:
  """Width between the layers of an MLP; 0 where the file does not say."""
  if names.get("fused") in shapes:  # [mlp | q | k | v]
    return shapes[names["fused"]][0] - 3 * width
  hidden = shapes.get(names["fc1"]) or shapes.get(names["swiglu"]) or (0,)
  return hidden[0] // 2 if _swiglu(shapes, names) else hidden[0]


def _patches(positions: int, shapes: Shapes, names: Mapping[str, str]) -> int:
  """`positions`; raises `UserError` where the registers have some too."""
  registers = shapes[names["registers"]][1] if names["registers"] in shapes else 0
  rest = positions - registers - int(names["cls"] in shapes)
  if registers and rest > 0 and math.isqrt(rest) ** 2 == rest and math.isqrt(positions) ** 2 != positions:
    raise UserError(
      f"weights: '{names['positions']}' has {positions} positions, those of {registers} registers among them; registers"
      " have none here (in timm, no_embed_class=True)."
    )
  return positions


def _vit_options(shapes: Shapes, names: Mapping[str, str]) -> Fields:
  """Norms, biases, LayerScale and pooling, as far as they are not the defaults."""
  fields: Fields = {}
  if "fc_norm.weight" in shapes:
    fields |= {"pool": "mean", "final_norm": "pooled"}
  if "attn_pool.latent" in shapes:
    fields["pool"] = "map"
  if any(name in shapes for name in names["scale"].split()):
    fields["layer_scale"] = 1.0
  if not _in_a_block(names["qkv_bias"], shapes):
    fields["qkv_bias"] = False
  if names.get("qk_norm", "") in shapes:
    fields["qk_norm"] = "layernorm" if names["qk_norm"].replace("weight", "bias") in shapes else "rmsnorm"
  if "norm_pre.weight" in shapes:
    fields["pre_norm"] = True
    if names["patch"].replace("weight", "bias") not in shapes:  # timm's rule; else it is missing
      fields["patch_bias"] = False
  if names["norm"] in shapes and not _in_a_block(names["norm"].replace("weight", "bias"), shapes):
    fields["norm"] = "rmsnorm"
  return fields


def _in_a_block(name: str, shapes: Shapes) -> bool:
  """Whether any block has the tensor that is called `name` in block 0: what one block lacks is missing."""
  return matches(shapes, re.escape(name).replace(r"\.0\.", r"\.\d+\.", 1) + "$")


OFFICIAL = {
  **{"patch": "patch_embed.proj.weight", "positions": "pos_embed", "cls": "cls_token", "block": "blocks.0."},
  **{"fc1": "blocks.0.mlp.fc1.weight", "swiglu": "blocks.0.mlp.w12.weight", "qkv_bias": "blocks.0.attn.qkv.bias"},
  **{"registers": "register_tokens", "norm": "blocks.0.norm1.weight", "scale": "blocks.0.ls1.gamma blocks.0.gamma_1"},
}
TIMM = OFFICIAL | {"registers": "reg_token", "fc2": "blocks.0.mlp.fc2.weight", "qk_norm": "blocks.0.attn.q_norm.weight"}
TIMM_PARALLEL = TIMM | {
  **{"fused": "blocks.0.in_proj.weight", "qkv_bias": "blocks.0.in_proj.bias", "qk_norm": "blocks.0.q_norm.weight"},
  **{"norm": "blocks.0.in_norm.weight", "scale": "blocks.0.ls.gamma"},
}
_LAYER = "encoder.layer.0"
HUGGING_FACE = {
  **{"patch": "embeddings.patch_embeddings.projection.weight", "positions": "embeddings.position_embeddings"},
  **{"cls": "embeddings.cls_token", "block": f"{_LAYER}.", "fc1": f"{_LAYER}.intermediate.dense.weight"},
  **{"swiglu": f"{_LAYER}.mlp.weights_in.weight", "scale": f"{_LAYER}.layer_scale1.lambda1"},
  **{"registers": "embeddings.register_tokens", "qkv_bias": f"{_LAYER}.attention.attention.query.bias"},
  "norm": f"{_LAYER}.layernorm_before.weight",
}
DINOV2_HF = HUGGING_FACE | {"fc1": f"{_LAYER}.mlp.fc1.weight", "norm": f"{_LAYER}.norm1.weight"}
_FIRST = "encoder.layers.encoder_layer_0"
TORCHVISION = {
  **{"patch": "conv_proj.weight", "positions": "encoder.pos_embedding", "cls": "class_token", "block": f"{_FIRST}."},
  **{"fc1": f"{_FIRST}.mlp.0.weight", "qkv_bias": f"{_FIRST}.self_attention.in_proj_bias", "norm": f"{_FIRST}.ln_1.weight"},
  **dict.fromkeys(("swiglu", "registers", "scale"), ""),
}


def flax_vit(shapes: Shapes, *, table: str, block: str, scanned: bool, patch: str, given: Fields) -> Fields:
  """Of a big_vision or scenic ViT, whose kernels say the heads."""
  height, _, channels, width = shapes[f"{patch}/kernel"]
  first = block if scanned else f"{block}_0"
  kernel = next(s for n, s in shapes.items() if n.startswith(f"{first}/Multi") and n.endswith("/query/kernel"))
  fc1 = next(s for n, s in shapes.items() if n.startswith(f"{first}/Mlp") and n.endswith("/Dense_0/kernel"))
  depth = kernel[0] if scanned else count(shapes, re.escape(block) + r"_(\d+)/")
  size = given.get("image_size")
  if table in shapes and size is None:
    positions = shapes[table]
    slot = "cls" in shapes and table.startswith("Transformer/")
    grid = positions[1:3] if len(positions) == 4 else (side(positions[1] - int(slot), what=table),) * 2
    size = height * grid[0] if grid[0] == grid[1] else (height * grid[0], height * grid[1])
  sizes = {"width": width, "depth": depth, "mlp_dim": fc1[-1], "heads": kernel[-2]}
  fields = vit_fields(**sizes, patch=height, channels=channels, image_size=size or 224)
  fields |= {"gelu": "tanh", "class_token": "cls" in shapes}
  if "cls" in shapes and not table.startswith("Transformer/"):
    fields["class_position"] = False
  if any(name.startswith("MAPHead_0/") for name in shapes):
    fields["pool"] = "map"
  return fields if table in shapes else fields | {"pos_table": "sincos2d"}


def resnet(shapes: Shapes) -> Fields:
  """Of a torchvision ResNet; the stem's width counts in 64s where it can."""
  blocks = tuple(count(shapes, rf"layer{i}\.(\d+)\.") for i in range(1, 5))
  blocks = tuple(n for n in blocks if n)
  stem, channels, kernel, _ = shapes["conv1.weight"]
  bottleneck = "layer1.0.conv3.weight" in shapes
  depth = next((d for d, b in BLOCKS.items() if b == blocks and (d >= 50) == bottleneck), 50 if bottleneck else 18)
  inner = shapes["layer1.0.conv1.weight"][0]
  groups = inner // shapes["layer1.0.conv2.weight"][1] if bottleneck else 1
  fields: Fields = {"name": "resnet", "depth": depth, "stem": "imagenet" if kernel == 7 else "cifar"}
  if blocks != BLOCKS[depth]:
    fields["blocks"] = blocks
  if stem % 64 == 0:
    fields["width"] = stem // 64
  else:
    fields["stem_width"] = stem
  if groups > 1:  # resnext50_32x4d
    fields["groups"] = groups
  if inner != stem * groups:  # wide_resnet50_2: twice the inner width of bottlenecks alone
    fields["width_per_group"] = 64 * inner // (stem * groups)
  return fields if channels == 3 else fields | {"channels": channels}


def wide_resnet(shapes: Shapes) -> Fields:
  """Of PAWS's wide ResNet."""
  return {
    "name": "wide_resnet",
    "depth": 6 * count(shapes, r"layer1\.(\d+)\.") + 4,
    "width": shapes["layer1.0.conv1.weight"][0] // 16,
    "channels": shapes["conv1.weight"][1],
  }


def convnet(shapes: Shapes) -> Fields:
  """Of an AlexNet or VGG, with the image size for which its first linear layer is."""
  prefix = "body." if any(name.startswith("body.") for name in shapes) else ""
  kernels = [shapes[n] for n in sorted(shapes, key=_index) if "features." in n and len(shapes[n]) == 4]
  linears = [shapes[n] for n in sorted(shapes, key=_index) if "classifier." in n and len(shapes[n]) == 2]
  if len(kernels) not in (5, 13) or len(linears) != 2:
    raise UserError(
      f"weights: {len(kernels)} convolutions, {len(linears)} linear layers; an AlexNet has 5 and 2, a VGG-16 13 and 2."
    )
  widths, sobel, fc6 = tuple(k[0] for k in kernels), "sobel.0.weight" in shapes, linears[0]
  fields: Fields = {"fc": fc6[0], "sobel": sobel, "channels": 3 if sobel else kernels[0][1]}
  if len(widths) == 5:
    variant = next((name for name, w in WIDTHS.items() if w == widths), None)
    fields |= {"name": "alexnet", "stem": "imagenet" if kernels[0][-1] == 11 else "cifar"}
    fields |= {"widths": widths} if variant is None else {"variant": variant}
  else:
    ends = [sum(DEPTHS[: i + 1]) - 1 for i in range(len(DEPTHS))]
    fields |= {"name": "vgg", "variant": "deepercluster" if prefix else "deepcluster"}
    fields["widths"] = tuple(widths[i] for i in ends)
  last = math.isqrt(fc6[1] // widths[-1])
  network = {"alexnet": AlexNet, "vgg": VGG}[fields["name"]](**{k: v for k, v in fields.items() if k != "name"})
  sizes = [size for size in (224, *range(1, 1024)) if network.map_size(size) == last]
  if not sizes or last**2 * widths[-1] != fc6[1]:
    raise UserError(f"weights: fc6 {fc6} does not fit to a square map of {widths[-1]} channels.")
  return fields | {"image_size": sizes[0]}


def _index(name: str) -> int:
  return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def xcit(shapes: Shapes, *, positions: str) -> Fields:
  """Of an XCiT; the nano variant is told by its width."""
  width, depth = shapes["norm.weight"][0], count(shapes, r"blocks\.(\d+)\.")
  heads = shapes["blocks.0.attn.temperature"][0]
  convolutions = count(shapes, r"patch_embed\.proj\.(\d+)\.0\.weight") // 2 + 1
  sizes = xcit_lib.SIZES.items()
  variant = next((n for n, s in sizes if (s.width, s.depth, s.heads) == (width, depth, heads)), None)
  fields: Fields = {"name": "xcit", "patch": 2**convolutions}
  fields |= {"variant": variant} if variant else {"variant": "custom", "width": width, "depth": depth, "heads": heads}
  if f"{positions}.token_projection.weight" not in shapes:
    fields["positions"] = False
  layers = count(shapes, r"cls_attn_blocks\.(\d+)\.")
  ratio = shapes["blocks.0.mlp.fc1.weight"][0] / width
  extra = {"class_layers": (layers, 2), "mlp_ratio": (ratio, 4.0)}
  channels = shapes["patch_embed.proj.0.0.weight"][1]
  return (
    fields | {k: v for k, (v, usual) in extra.items() if v != usual} | ({"channels": channels} if channels != 3 else {})
  )


def resmlp(shapes: Shapes, *, stem: str, mix: str, fc1: str, given: Fields) -> Fields:
  """Of a ResMLP."""
  width, channels, patch, _ = shapes[f"{stem}.proj.weight"]
  depth, ratio = count(shapes, r"blocks\.(\d+)\."), shapes[f"blocks.0.{fc1}.weight"][0] / width
  size = given.get("image_size") or patch * side(shapes[f"blocks.0.{mix}.weight"][0], what=f"blocks.0.{mix}.weight")
  sizes = resmlp_lib.SIZES.items()
  variant = next((n for n, s in sizes if (s.width, s.depth, s.patch) == (width, depth, patch)), None)
  fields: Fields = {"name": "resmlp", "image_size": size, "patch": patch}
  fields |= {"variant": variant} if variant else {"variant": "custom", "width": width, "depth": depth}
  fields |= {"mlp_ratio": ratio} if ratio != 4 else {}
  return fields if channels == 3 else fields | {"channels": channels}


def regnet(shapes: Shapes, *, stem: str, first: str) -> Fields:
  """Of a RegNetY or, without squeeze-and-excitation, a RegNetX.

  Args:
    stem: name of the stem's convolution.
    first: regular expression of the second convolution of a block; groups are stage and block.
  """
  pattern = re.compile(first)
  found = {(int(m[1]), int(m[2])): shapes[n] for n in shapes if (m := pattern.fullmatch(n)) is not None}
  stages = sorted({stage for stage, _ in found})
  widths = tuple(next(s[0] for (stage, _), s in found.items() if stage == n) for n in stages)
  depths = tuple(sum(stage == n for stage, _ in found) for n in stages)
  group = next(iter(found.values()))[1]
  listed = tuple(zip(widths, depths, strict=True))
  fields: Fields = {"name": "regnet"}
  for variant in (*regnet_lib.LINES, *regnet_lib.STAGES):
    for rounding in ("classy", "torchvision"):
      stages_ = regnet_lib.RegNet(variant=variant, rounding=rounding).stages()
      if tuple((s.width, s.depth) for s in stages_) == listed and stages_[-1].group_width == group:
        fields |= {"variant": variant} | ({"rounding": rounding} if rounding != "classy" else {})
        break
    if "variant" in fields:
      break
  else:
    fields |= {"variant": "custom", "widths": widths, "depths": depths, "group_width": group}
  if not any(".se." in name or ".attention." in name for name in shapes):
    fields["se_ratio"] = 0.0  # RegNetX
  width, channels, *_ = shapes[stem]
  defaults = {f.name: f.default for f in dataclasses.fields(regnet_lib.RegNet)}
  return fields | {k: v for k, v in (("stem_width", width), ("channels", channels)) if v != defaults[k]}
