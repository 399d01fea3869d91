"""Names of google/revisiting-self-supervised (TensorFlow 1): layers are numbered in the order of their creation."""

from __future__ import annotations

from collections.abc import Iterable

from big_ssl.weights.keymap import Keep, Rule, tensor
from big_ssl.weights.moves import leading

_BN = {"gamma": "scale", "beta": "bias"}
_STATISTICS = {"moving_mean": "mean", "moving_variance": "var"}


def revnet_rules(*, blocks: tuple[int, ...]) -> tuple[Rule | Keep, ...]:
  """Trunk and classifier <-> `models.revnet.RevNet` and `models.heads.Linear`."""
  units = _units(blocks)
  convs = ["conv1", *(f"{unit}/conv{i}" for unit in units for i in (1, 2, 3))]
  norms = [*(f"{unit}/bn{i}" for unit in units for i in (1, 2, 3)), "bn1"]
  return _numbered(convs, norms)


def resnet_rules(*, blocks: tuple[int, ...], preactivation: bool = False) -> tuple[Rule | Keep, ...]:
  """Trunk and classifier <-> `models.resnet.ResNet` of depth 50 with `bn_epsilon` 1e-3.

  The shortcut comes first in a block; with `preactivation`, of which no recorded file is known, after the first BN, and the
  last BN comes at the end.
  """
  convs, norms = ["conv1"], [] if preactivation else ["bn1"]
  for unit in _units(blocks):
    first = unit.endswith("_0")
    convs += [*([f"{unit}/downsample_conv"] if first else ()), *(f"{unit}/conv{i}" for i in (1, 2, 3))]
    norms += [*([f"{unit}/downsample_bn"] if first and not preactivation else ()), *(f"{unit}/bn{i}" for i in (1, 2, 3))]
  return _numbered(convs, norms + (["bn1"] if preactivation else []))


def _units(blocks: tuple[int, ...]) -> list[str]:
  return [f"layer{stage}_{i}" for stage, count in enumerate(blocks, 1) for i in range(count)]


def _numbered(convs: list[str], norms: list[str]) -> tuple[Rule | Keep, ...]:
  """TensorFlow's kernels are HWIO as ours are; the classifier is the last 1x1 convolution."""
  name = lambda kind, i: f"module/{kind}_{i}" if i else f"module/{kind}"
  rules: list[Rule] = []
  for i, ours in enumerate(convs):
    rules += tensor(f"{name('conv2d', i)}/kernel", f"backbone/{ours}/kernel")
  for i, ours in enumerate(norms):
    theirs = name("batch_normalization", i)
    rules += _all(theirs, f"params/backbone/{ours}", _BN.items())
    rules += _all(theirs, f"batch_stats/backbone/{ours}", _STATISTICS.items())
  head = name("conv2d", len(convs))
  return (*rules, *tensor(f"{head}/kernel", "head/fc/kernel", leading(2)), *tensor(f"{head}/bias", "head/fc/bias"))


def _all(theirs: str, ours: str, names: Iterable[tuple[str, str]]) -> list[Rule]:
  return [Rule(f"{theirs}/{a}", f"{ours}/{b}") for a, b in names]
