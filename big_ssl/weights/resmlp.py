"""Names of ResMLP: facebookresearch/deit ("official") and timm's."""

from __future__ import annotations

from typing import Literal

from big_ssl.weights.heads import classifier
from big_ssl.weights.keymap import Keep, Rule, conv, linear, tensor
from big_ssl.weights.moves import SAME, leading


def resmlp_rules(*, dialect: Literal["official", "timm"] = "official") -> tuple[Rule | Keep, ...]:
  """Trunk and, where there is one, classifier <-> `models.resmlp.ResMLP` and `models.heads.Linear`.

  timm's affine maps are [1, 1, D], the official ones [D].
  """
  timm = dialect == "timm"
  block, rank = "backbone/block_{i}", leading(2) if timm else SAME
  scale = "ls{}" if timm else "gamma_{}"

  def affine(theirs: str, ours: str) -> tuple[Rule, ...]:
    return tensor(f"{theirs}.alpha", f"{ours}/scale", rank) + tensor(f"{theirs}.beta", f"{ours}/bias", rank)

  channels = "blocks.{i}.mlp_channels" if timm else "blocks.{i}.mlp"
  return (
    *conv("stem.proj" if timm else "patch_embed.proj", "backbone/patch_embed/conv"),
    *tensor("blocks.{i}." + scale.format(1), f"{block}/ls1/scale"),
    *tensor("blocks.{i}." + scale.format(2), f"{block}/ls2/scale"),
    *affine("blocks.{i}.norm1", f"{block}/norm1"),
    *affine("blocks.{i}.norm2", f"{block}/norm2"),
    *linear("blocks.{i}.linear_tokens" if timm else "blocks.{i}.attn", f"{block}/mix"),
    *linear(f"{channels}.fc1", f"{block}/mlp/fc1"),
    *linear(f"{channels}.fc2", f"{block}/mlp/fc2"),
    *affine("norm", "backbone/norm"),
    *classifier("head"),
  )
