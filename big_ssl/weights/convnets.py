"""Rules of the AlexNets and VGGs of DeepCluster, SeLa and DeeperCluster."""

from __future__ import annotations

import numpy as np

from big_ssl.core.types import PyTree
from big_ssl.models.sobel import HORIZONTAL, VERTICAL
from big_ssl.models.vgg import DEPTHS
from big_ssl.weights.heads import classifier, classifiers
from big_ssl.weights.keymap import Keep, Rule, batch_norm, conv, linear

_POOLS = {"imagenet": (1, 2, 5), "cifar": (2, 5), "vgg": tuple(int(n) for n in np.cumsum(DEPTHS))}
_SOBEL = {
  "sobel.0.weight": np.full((1, 3, 1, 1), 1 / 3, np.float32),
  "sobel.0.bias": np.zeros(1, np.float32),
  "sobel.1.weight": np.stack([HORIZONTAL, VERTICAL])[:, None],
  "sobel.1.bias": np.zeros(2, np.float32),
}


def convnet(
  *, kind: str, prefix: str = "", sobel: bool = False, heads: int = 0, top: str = "top_layer"
) -> tuple[Rule | Keep, ...]:
  """Sequential features and classifier; each convolution is followed by BN and ReLU, some by a pool.

  Args:
    kind: "imagenet" or "cifar" of an AlexNet, or "vgg".
    prefix: "body." in DeeperCluster.
    sobel: whether the network reads Sobel gradients; an export writes the fixed filters then.
    heads: of SeLa's `top_layer0`, `top_layer1` ...; 0 for one classifier.
    top: name of the one classifier: "pred_layer" in DeeperCluster.
  """
  pools, convolutions = _POOLS[kind], 13 if kind == "vgg" else 5
  rules: list[Rule | Keep] = []
  for number in range(1, convolutions + 1):
    index = 3 * (number - 1) + sum(p < number for p in pools)
    rules += conv(f"{prefix}features.{index}", f"backbone/conv{number}")
    rules += batch_norm(f"{prefix}features.{index + 1}", f"backbone/bn{number}")
  for name, index in (("fc6", 0), ("fc7", 3)) if kind == "vgg" else (("fc6", 1), ("fc7", 4)):
    rules += linear(f"{prefix}classifier.{index}", f"backbone/{name}")
  beside = "params/backbone/conv1/kernel" if sobel else None
  rules += [Keep(name, "fixed Sobel filters", constant=value, beside=beside) for name, value in _SOBEL.items()]
  last = classifiers("top_layer", heads=heads) if heads else classifier(top)
  splits = (("sub_class_pred_layer", "sub_class"), ("super_class_pred_layer", "super_class"))
  return (*rules, *last, *(rule for theirs, ours in splits for rule in classifier(theirs, f"head/{ours}")))


def fold_sobel(kernel: PyTree) -> np.ndarray:
  """The Sobel filters and a 3x3 kernel [3, 3, 2, D] after them as one 5x5 kernel on colors [5, 5, 3, D].

  Equal but at the border. DeeperCluster fine-tunes so, with a padding of 1 on the image; its public code (sobel2RGB)
  fills the upper left 3x3 of the 25 places only.
  """
  out = np.zeros((5, 5, 3, kernel.shape[-1]), kernel.dtype)
  for channel, sobel in enumerate((HORIZONTAL, VERTICAL)):
    for y, x in np.ndindex(3, 3):
      out[y : y + 3, x : x + 3] += sobel[y, x] * kernel[:, :, channel, None] / 3
  return out
