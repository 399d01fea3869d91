"""Layouts of convolutional networks, XCiT and ResMLP: torchvision, SwAV, PAWS, DeepCluster, SEER, timm, Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Collection

from big_ssl.weights import convnets, describe, heads, regnet, resmlp, resnet, xcit
from big_ssl.weights.describe import Fields
from big_ssl.weights.family import DDP, HF_NAMES, WRAPPED, Layout, Rules, prefixes

_RESNET = ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight")
_FSDP = re.compile(r"(_fsdp_wrapped_module|_fpw_module)\.")


def _swav(fields: Fields, names: Collection[str]) -> Rules:
  norms = describe.matches(names, r"projection_head\.1\.running_mean|batch_stats/head/bn1")
  several = describe.matches(names, r"prototypes\.prototypes\d|params/prototypes/head1")
  return resnet.resnet() + heads.swav_head(batch_norms=norms, heads=2 if several else 1)


def _paws(fields: Fields, names: Collection[str]) -> Rules:
  shortcut = "shortcut.0" if fields.get("name") == "wide_resnet" else "downsample.0"
  tuned = (
    describe.matches(names, r"fc\.fc2\.")
    and not describe.matches(names, r"fc\.bn2\.")
    or describe.matches(names, "params/head/fc/kernel")
  )
  top = heads.classifier("fc.fc2") if tuned else ()
  return (
    *resnet.resnet(shortcut=shortcut),
    *top,
    *heads.projection("fc", "head"),
    *heads.projection("pred", "predictor"),
  )


def _convnet(fields: Fields, names: Collection[str]) -> Rules:
  kind = "vgg" if fields.get("name", "vgg") == "vgg" else fields.get("stem", "imagenet")
  prefix = "body." if fields.get("variant") == "deepercluster" or describe.matches(names, "body") else ""
  top = "pred_layer" if prefix or "pred_layer.weight" in names else "top_layer"
  count = describe.count(names, r"top_layer(\d+)\.")
  if "params/head/kernel" in names:
    count = fields.get("heads", 0)
  return convnets.convnet(kind=kind, prefix=prefix, sobel=bool(fields.get("sobel")), heads=count, top=top)


def _features(name: str) -> str:
  return prefixes("module.")(name).replace("features.module.", "features.", 1)


def _seer(fields: Fields, names: Collection[str]) -> Rules:
  norms = describe.matches(names, r"heads\.0\.projection_head\.1\.running_mean|batch_stats/head/bn1")
  trunk = regnet.regnet_rules(dialect="vissl", parts=regnet.seer_parts(names))
  return trunk + regnet.seer_head_rules(batch_norms=norms) + heads.classifier("heads.0.clf.0")


def _vissl_name(name: str) -> str:
  name = name.removeprefix("trunk/").replace("heads/", "heads.", 1)
  return _FSDP.sub("", prefixes("base_model.", "_feature_blocks.")(name))


def _xcit_heads(fields: Fields) -> int:
  size = describe.xcit_lib.SIZES.get(fields.get("variant", ""))
  return fields.get("heads") or (size.heads if size else 0)


_RESNETS = {"model": "resnet", "marks": _RESNET, "fields": lambda shapes, given: describe.resnet(shapes)}
_CONVNET = {
  "fields": lambda shapes, given: describe.convnet(shapes),
  "rules": _convnet,
  "format": "official",
  "clean": _features,
}

CONVNET_LAYOUTS: tuple[Layout, ...] = (
  Layout(
    name="torchvision_resnet",
    title="torchvision ResNet",
    format="torchvision",
    clean=prefixes(*DDP, "_feature_blocks."),
    lacks=("head.last_layer.weight_v", "prototypes.weight", "fc.fc1.weight"),
    rules=lambda fields, names: resnet.torchvision(),
    **_RESNETS,
  ),
  Layout(
    name="dino_resnet",
    title="DINO ResNet",
    format="official",
    clean=WRAPPED,
    hints=("teacher", "student"),
    rules=lambda fields, names: resnet.resnet() + heads.dino_head_of(names),
    **_RESNETS,
  ),
  Layout(
    name="swav",
    title="SwAV or DeepCluster-v2 ResNet",
    format="official",
    clean=prefixes(*DDP),
    rules=_swav,
    **_RESNETS,
  ),
  Layout(
    name="paws",
    title="PAWS ResNet",
    format="official",
    clean=prefixes(*DDP),
    hints=("encoder",),
    rules=_paws,
    **_RESNETS,
  ),
  Layout(
    name="paws_wide_resnet",
    title="PAWS wide ResNet",
    format="official",
    model="wide_resnet",
    marks=("conv1.weight", "layer1.0.conv1.bias", "layer2.0.shortcut.0.weight"),
    clean=prefixes(*DDP),
    fields=lambda shapes, given: describe.wide_resnet(shapes),
    rules=lambda fields, names: _paws(fields | {"name": "wide_resnet"}, names),
    normalization=None,
  ),
  Layout(
    name="alexnet",
    title="DeepCluster or SeLa AlexNet",
    model="alexnet",
    marks=("features.0.weight", "classifier.1.weight"),
    **_CONVNET,
  ),
  Layout(
    name="vgg", title="DeepCluster VGG-16", model="vgg", marks=("features.40.weight", "classifier.0.weight"), **_CONVNET
  ),
  Layout(
    name="deepercluster", title="DeeperCluster VGG-16", model="vgg", marks=("body.features.40.weight",), **_CONVNET
  ),
  *(
    Layout(
      name=name,
      title=title,
      format=form,
      model="xcit",
      marks=("patch_embed.proj.0.0.weight", mark),
      clean=WRAPPED,
      fields=lambda shapes, given, positions=positions: describe.xcit(shapes, positions=positions),
      rules=rules,
    )
    for name, title, form, mark, positions, rules in (
      (
        *("xcit", "XCiT", "official", "cls_attn_blocks.0.attn.qkv.weight", "pos_embeder"),
        lambda fields, names: xcit.xcit_rules(heads=_xcit_heads(fields)) + heads.dino_head_of(names),
      ),
      (
        *("timm_xcit", "timm XCiT", "timm", "cls_attn_blocks.0.attn.q.weight", "pos_embed"),
        lambda fields, names: xcit.xcit_rules(heads=_xcit_heads(fields), dialect="timm"),
      ),
    )
  ),
  Layout(
    name="resmlp",
    title="ResMLP",
    format="official",
    model="resmlp",
    marks=("patch_embed.proj.weight", "blocks.0.gamma_1", "blocks.0.norm1.alpha"),
    fields=lambda shapes, given: describe.resmlp(shapes, stem="patch_embed", mix="attn", fc1="mlp.fc1", given=given),
    rules=lambda fields, names: resmlp.resmlp_rules(),
  ),
  Layout(
    name="timm_resmlp",
    title="timm ResMLP",
    format="timm",
    model="resmlp",
    marks=("stem.proj.weight", "blocks.0.ls1", "blocks.0.linear_tokens.weight"),
    fields=lambda shapes, given: describe.resmlp(
      shapes, stem="stem", mix="linear_tokens", fc1="mlp_channels.fc1", given=given
    ),
    rules=lambda fields, names: resmlp.resmlp_rules(dialect="timm"),
  ),
  Layout(
    name="seer",
    title="SEER RegNetY of VISSL",
    format="official",
    model="regnet",
    marks=("conv1.stem.0.weight",),
    clean=_vissl_name,
    hints=("classy_state_dict",),
    fields=lambda shapes, given: describe.regnet(
      shapes, stem="conv1.stem.0.weight", first=r"res\d+\.(?:block\d+-part\d+\.)?block(\d+)-(\d+)\.f\.b\.0\.weight"
    ),
    rules=_seer,
  ),
  *(
    Layout(
      name=f"{form}_regnet",
      title=f"{title} RegNet",
      format=form,
      model="regnet",
      marks=(stem, mark),
      clean=HF_NAMES if form == "hf" else prefixes(*DDP),
      fields=lambda shapes, given, stem=stem, first=first: describe.regnet(shapes, stem=stem, first=first),
      rules=lambda fields, names, form=form: regnet.regnet_rules(dialect=form, se=fields.get("se_ratio", 0.25) > 0),
    )
    for form, title, stem, mark, first in (
      ("timm", "timm", "stem.conv.weight", "s1.b1.conv2.conv.weight", r"s(\d)\.b(\d+)\.conv2\.conv\.weight"),
      (
        *("hf", "Hugging Face", "embedder.embedder.convolution.weight"),
        "encoder.stages.0.layers.0.layer.1.convolution.weight",
        r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.1\.convolution\.weight",
      ),
      (
        *("torchvision", "torchvision", "stem.0.weight", "trunk_output.block1.block1-0.f.b.0.weight"),
        r"trunk_output\.block\d\.block(\d)-(\d+)\.f\.b\.0\.weight",
      ),
    )
  ),
)
