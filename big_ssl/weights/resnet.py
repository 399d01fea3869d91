"""Key map of torchvision ResNets: state dicts to flax trees and back, bit for bit."""

from __future__ import annotations

import re

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.weights.vit import Weights, flatten, nest


def import_resnet(state: dict[str, np.ndarray]) -> Weights:
  """A torchvision state dict as trees of `models.resnet.ResNet`; the classifier "fc" is left out.

  Raises:
    UserError: a tensor that belongs to no place of a ResNet.
  """
  params, stats = {}, {}
  for name, value in state.items():
    if name.startswith("fc.") or name.endswith("num_batches_tracked"):
      continue
    match = re.fullmatch(
      r"(?:(layer\d)\.(\d+)\.)?(conv\d|bn\d|downsample\.[01])\.(weight|bias|running_mean|running_var)", name
    )
    if match is None:
      raise UserError(f"weights: '{name}' {value.shape} belongs to no place of a ResNet.")
    layer, index, part, kind = match.groups()
    part = {"downsample.0": "downsample_conv", "downsample.1": "downsample_bn"}.get(part, part)
    path = f"{layer}_{index}/{part}" if layer else part
    if kind.startswith("running_"):
      stats[f"{path}/{kind.removeprefix('running_')}"] = value
    elif value.ndim == 4:
      params[f"{path}/kernel"] = value.transpose(2, 3, 1, 0)
    else:
      params[f"{path}/{'scale' if kind == 'weight' else 'bias'}"] = value
  return Weights(nest(params), nest(stats))


def export_resnet(weights: Weights) -> dict[str, np.ndarray]:
  """The inverse of `import_resnet`, without the classifier."""
  leaf = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
  out = {}
  for path, value in (flatten(weights.params) | flatten(weights.batch_stats)).items():
    *parts, kind = path.split("/")
    name = ".".join(parts).replace("downsample_conv", "downsample.0").replace("downsample_bn", "downsample.1")
    name = re.sub(r"^(layer\d)_(\d+)", r"\1.\2", name)
    value = np.asarray(value)
    out[f"{name}.{leaf[kind]}"] = value.transpose(3, 2, 0, 1) if kind == "kernel" else value
  return out
