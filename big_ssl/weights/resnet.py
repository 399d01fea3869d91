"""Rules of torchvision's ResNets and of PAWS's wide ResNets."""

from __future__ import annotations

from big_ssl.weights.heads import classifier
from big_ssl.weights.keymap import Keep, Rule, batch_norm, conv


def resnet(*, shortcut: str = "downsample.0") -> tuple[Rule | Keep, ...]:
  """A trunk, without the classifier.

  Args:
    shortcut: name of the convolution beside a block; "shortcut.0" in PAWS's wide ResNet, which has no BN there.
  """
  block, ours = "layer{i}.{j}", "backbone/layer{i}_{j}"
  return (
    *conv("conv1", "backbone/conv1", bias=None),  # PAWS's wide ResNet has biases
    *batch_norm("bn1", "backbone/bn1"),
    *conv(f"{block}.conv{{k}}", f"{ours}/conv{{k}}", bias=None),
    *batch_norm(f"{block}.bn{{k}}", f"{ours}/bn{{k}}"),
    *conv(f"{block}.{shortcut}", f"{ours}/downsample_conv", bias=None),
    *batch_norm(f"{block}.downsample.1", f"{ours}/downsample_bn"),
  )


def torchvision() -> tuple[Rule | Keep, ...]:
  """A trunk with its classifier."""
  return resnet() + classifier("fc")
