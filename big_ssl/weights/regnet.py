"""Names of RegNetY: VISSL's SEER releases, timm, transformers, torchvision."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal

from big_ssl.weights.heads import classifier, sequence
from big_ssl.weights.keymap import Keep, Rule, batch_norm, conv, tensor

_PART = re.compile(r"block(\d+)-part(\d+)\.block\1-(\d+)\.")


@dataclasses.dataclass(frozen=True)
class _Names:
  """Of one dialect: the stem's two layers, the places of a block, and the classifier.

  `block` is the template of a block, `layers` what follows for the three convolutions and their BN, the two layers of
  squeeze-and-excitation, and the shortcut's convolution and BN.
  """

  stem: tuple[str, str]
  block: str
  layers: tuple[str, ...]
  classifier: str


def _hugging_face(*, last: int) -> _Names:
  """transformers': it counts the layers of a block through, squeeze-and-excitation with them; `last` is the number of the last."""
  layers = (f"layer.{i}.{kind}" for i in (0, 1, last) for kind in ("convolution", "normalization"))
  return _Names(
    ("embedder.embedder.convolution", "embedder.embedder.normalization"),
    "encoder.stages.{i-1}.layers.{j}",
    (*layers, "layer.2.attention.0", "layer.2.attention.2", "shortcut.convolution", "shortcut.normalization"),
    "classifier.1",
  )


_DIALECTS = {
  "vissl": _Names(
    ("conv1.stem.0", "conv1.stem.1"),
    "res{i+1}.block{i}-{j}",
    ("f.a.0", "f.a.1", "f.b.0", "f.b.1", "f.c", "f.final_bn", "f.se.excitation.0", "f.se.excitation.2", "proj", "bn"),
    "",
  ),
  "timm": _Names(
    ("stem.conv", "stem.bn"),
    "s{i}.b{j+1}",
    (
      *("conv1.conv", "conv1.bn", "conv2.conv", "conv2.bn", "conv3.conv", "conv3.bn"),
      *("se.fc1", "se.fc2", "downsample.conv", "downsample.bn"),
    ),
    "head.fc",
  ),
  "hf": _hugging_face(last=3),
  "hf_x": _hugging_face(last=2),
  "torchvision": _Names(
    ("stem.0", "stem.1"),
    "trunk_output.block{i}.block{i}-{j}",
    ("f.a.0", "f.a.1", "f.b.0", "f.b.1", "f.c.0", "f.c.1", "f.se.fc1", "f.se.fc2", "proj.0", "proj.1"),
    "fc",
  ),
}


def regnet_rules(
  *,
  dialect: Literal["vissl", "timm", "hf", "torchvision"] = "vissl",
  trunk: str = "",
  se: bool = True,
  parts: Iterable[tuple[int, int, int]] = (),
) -> tuple[Rule | Keep, ...]:
  """Trunk and, where there is one, classifier <-> `models.regnet.RegNet` and `models.heads.Linear`.

  Args:
    trunk: what stands in front of the names of the trunk: "_feature_blocks." in SEER's files, "regnet." in those of
      transformers.
    se: whether there is squeeze-and-excitation; RegNetX has none, and transformers counts its layers through.
    parts: (stage, block, part) from `seer_parts`, for VISSL's files of 10 billion parameters.
  """
  names = _DIALECTS[dialect if se or dialect != "hf" else "hf_x"]
  stem, ours = tuple(f"{trunk}{name}" for name in names.stem), "backbone/layer{i}_{j}"
  blocks = _block(f"{trunk}{names.block}", ours, names.layers)
  if parts:
    blocks = tuple(
      rule
      for stage, block, part in parts
      for rule in _block(
        f"{trunk}res{stage + 1}.block{stage}-part{part}.block{stage}-{block}",
        f"backbone/layer{stage}_{block}",
        names.layers,
      )
    )
  return (
    *conv(stem[0], "backbone/conv1", bias=False),
    *batch_norm(stem[1], "backbone/bn1"),
    *blocks,
    *(classifier(names.classifier) if names.classifier else ()),
  )


def _block(theirs: str, ours: str, layers: tuple[str, ...]) -> tuple[Rule | Keep, ...]:
  conv1, bn1, conv2, bn2, conv3, bn3, fc1, fc2, proj, bn = (f"{theirs}.{layer}" for layer in layers)
  pairs = ((conv1, bn1, "1"), (conv2, bn2, "2"), (conv3, bn3, "3"))
  return (
    *(r for c, b, i in pairs for r in (*conv(c, f"{ours}/conv{i}", bias=False), *batch_norm(b, f"{ours}/bn{i}"))),
    *conv(fc1, f"{ours}/se/fc1"),
    *conv(fc2, f"{ours}/se/fc2"),
    *conv(proj, f"{ours}/downsample_conv", bias=False),
    *batch_norm(bn, f"{ours}/downsample_bn"),
  )


def seer_parts(names: Iterable[str]) -> tuple[tuple[int, int, int], ...]:
  """(stage, block, part) of every block, from names such as "res3.block2-part0.block2-1.proj.weight"; else ().

  VISSL's largest trunks are cut into parts that are recomputed together in the backward pass (`RegNet.remat_ends`), and
  the number of the part is in the names.
  """
  found = {(int(m[1]), int(m[3]), int(m[2])) for m in map(_PART.search, names) if m is not None}
  return tuple(sorted(found))


def seer_head_rules(*, batch_norms: bool, head: str = "heads.0.") -> tuple[Rule | Keep, ...]:
  """SEER's projection head and prototypes <-> `models.heads.ProjectionHead` and {"prototypes": {"head0": [K, D]}}.

  Args:
    batch_norms: after the hidden layers: true of 8, 16 and 32 GF, not of the larger ones.
    head: what stands in front of the names; the number is that of VISSL's head.
  """
  mlp = sequence(f"{head}projection_head", "head", batch_norms=batch_norms)
  return (*mlp, *tensor(f"{head}prototypes{{i}}.weight", "prototypes/head{i}"))
