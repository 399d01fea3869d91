"""Key map of the PAWS release (facebookresearch/suncet): state dicts to the method's trees and back, bit for bit."""

from __future__ import annotations

import re

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.weights.resnet import export_resnet, import_resnet
from big_ssl.weights.vit import Weights, flatten, nest

_HEADS = {"fc": "encoder/head", "pred": "predictor"}
_LEAF = {"running_mean": "mean", "running_var": "var", "bias": "bias"}
_SHORTCUT = ("shortcut.0.", "downsample.0.")  # the wide ResNet's name, the ResNet's


def import_paws(state: dict[str, np.ndarray]) -> Weights:
  """A ResNet or wide ResNet with its heads, as `methods.paws` keeps them: {"encoder": {"backbone", "head"}, "predictor"}.

  Args:
    state: official names, such as "layer1.0.conv1.weight", "fc.bn1.bias" and "pred.fc1.weight", all with or without the
      "module." of a distributed run.

  Raises:
    UserError: a tensor that belongs to no place of such a network.
  """
  trunk, params, stats = {}, {}, {}
  for full, value in state.items():
    name = full.removeprefix("module.")
    top = name.split(".")[0]
    if name.endswith("num_batches_tracked"):
      continue
    if top not in _HEADS:
      trunk[name.replace(*_SHORTCUT)] = value
      continue
    match = re.fullmatch(r"\w+\.((?:fc|bn)\d)\.(weight|bias|running_mean|running_var)", name)
    if match is None:
      raise UserError(f"weights: '{full}' {value.shape} belongs to no place of a PAWS head.")
    layer, kind = match.groups()
    path = f"{_HEADS[top]}/{layer}"
    if kind.startswith("running_"):
      stats[f"{path}/{_LEAF[kind]}"] = value
    elif kind == "weight":
      params[f"{path}/{'kernel' if value.ndim == 2 else 'scale'}"] = value.T
    else:
      params[f"{path}/bias"] = value
  backbone = import_resnet(trunk)
  trees = [nest(params), nest(stats)]
  for tree, part in zip(trees, (backbone.params, backbone.batch_stats), strict=True):
    tree.setdefault("encoder", {})["backbone"] = part
    tree.setdefault("predictor", {})
  return Weights(*trees)


def export_paws(weights: Weights) -> dict[str, np.ndarray]:
  """The inverse of `import_paws`, without prefix; a 1x1 shortcut with a bias gets the wide ResNet's name."""
  trunk = Weights(weights.params.get("encoder", {}).get("backbone", {}), weights.batch_stats["encoder"]["backbone"])
  out = export_resnet(trunk)
  wide = [k.removesuffix("bias") for k in out if k.endswith(_SHORTCUT[1] + "bias")]
  for prefix in wide:
    for kind in ("weight", "bias"):
      out[prefix.replace(*reversed(_SHORTCUT)) + kind] = out.pop(prefix + kind)
  leaf = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
  for path, value in (flatten(weights.params) | flatten(weights.batch_stats)).items():
    for theirs, ours in _HEADS.items():
      if path.startswith(ours + "/"):
        layer, kind = path.removeprefix(ours + "/").split("/")
        out[f"{theirs}.{layer}.{leaf[kind]}"] = np.asarray(value).T
  return out
