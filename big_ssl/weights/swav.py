"""Key map of the released SwAV and DeepCluster-v2 networks: a torchvision trunk, `projection_head`, `prototypes`."""

from __future__ import annotations

import re

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.weights.resnet import export_resnet, import_resnet
from big_ssl.weights.vit import Weights

_HEAD = {"0": "fc1", "1": "bn1", "3": "fc2"}  # Linear, BN, ReLU, Linear
_LEAF = {"fc": {"weight": "kernel", "bias": "bias"}, "bn": {"weight": "scale", "bias": "bias"}}
_STATS = {"running_mean": "mean", "running_var": "var"}


def import_swav(state: dict[str, np.ndarray]) -> Weights:
  """A state dict as {"encoder": {"backbone", "head"}, "prototypes": {"head0", ...}} and the encoder's batch statistics.

  A "module." in front of the names, which the released files have, is removed. Files without head or prototypes give
  trees without them.

  Raises:
    UserError: a tensor that belongs to no place of the network.
  """
  trunk, head, stats, prototypes = {}, {}, {}, {}
  for name, value in state.items():
    name = name.removeprefix("module.")
    if match := re.fullmatch(r"prototypes\.(?:prototypes(\d+)\.)?weight", name):
      prototypes[f"head{match[1] or 0}"] = value
    elif match := re.fullmatch(r"projection_head\.([013])\.(weight|bias|running_mean|running_var|num_batches_tracked)", name):
      layer, kind = _HEAD[match[1]], match[2]
      if kind in _STATS:
        stats.setdefault(layer, {})[_STATS[kind]] = value
      elif kind in ("weight", "bias"):
        head.setdefault(layer, {})[_LEAF[layer[:2]][kind]] = value.T
    else:
      trunk[name] = value
  weights = import_resnet(trunk)
  encoder, batch_stats = {"backbone": weights.params}, {"backbone": weights.batch_stats}
  if head:
    encoder["head"], batch_stats["head"] = head, stats
  if head and stats.keys() != {"bn1"}:
    raise UserError("weights: 'projection_head' must be Linear, BN, ReLU, Linear; the running statistics of 'projection_head.1' are missing.")
  params = {"encoder": encoder} | ({"prototypes": prototypes} if prototypes else {})
  return Weights(params, batch_stats)


def export_swav(weights: Weights) -> dict[str, np.ndarray]:
  """The inverse of `import_swav`; one prototype matrix is `prototypes.weight`, several are `prototypes.prototypes0.weight` and so on."""
  encoder = weights.params["encoder"]
  out = export_resnet(Weights(encoder["backbone"], weights.batch_stats["backbone"]))
  for number, layer in _HEAD.items():
    for kind, leaf in _LEAF[layer[:2]].items() if "head" in encoder else ():
      out[f"projection_head.{number}.{kind}"] = np.asarray(encoder["head"][layer][leaf]).T
  for kind, leaf in _STATS.items() if "head" in encoder else ():
    out[f"projection_head.1.{kind}"] = np.asarray(weights.batch_stats["head"]["bn1"][leaf])
  prototypes = weights.params.get("prototypes", {})
  for head, value in prototypes.items():
    name = "prototypes.weight" if len(prototypes) == 1 else f"prototypes.prototypes{head.removeprefix('head')}.weight"
    out[name] = np.asarray(value)
  return out
