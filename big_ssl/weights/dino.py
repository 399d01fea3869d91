"""Key map of DINO's training checkpoints: ViT or ResNet and head, to flax trees and back, bit for bit."""

from __future__ import annotations

import re

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.weights.resnet import export_resnet, import_resnet
from big_ssl.weights.vit import Weights, export_vit, flatten, import_vit, nest

_LEAF = {"weight": "kernel", "bias": "bias"}
_BATCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_LAST = {"last_layer.weight_g": "last_layer/g", "last_layer.weight_v": "last_layer/v"}


def import_dino(state: dict[str, np.ndarray], *, heads: int | None = None) -> Weights:
  """The entry "student" or "teacher" of a public checkpoint as trees of `models.encoder.Encoder` with a `DINOHead`.

  Args:
    state: names such as "module.backbone.blocks.0.attn.qkv.weight" and "head.mlp.0.weight".
    heads: attention heads, which the file does not say; needed for a ViT.

  Raises:
    UserError: a tensor that belongs to no known place, or a ViT without `heads`.
  """
  state = {name.removeprefix("module."): value for name, value in state.items()}
  head = {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}
  rest = {name: value for name, value in state.items() if not name.startswith("head.")}
  if "backbone.conv1.weight" in rest:
    resnet = import_resnet({name.removeprefix("backbone."): value for name, value in rest.items()})
    trunk = Weights({"backbone": resnet.params}, {"backbone": resnet.batch_stats})
  elif heads is None:
    raise UserError("heads=None: the number of attention heads is needed for a ViT; 6 for ViT-S, 12 for ViT-B.")
  else:
    trunk = import_vit(rest, heads=heads)
  top = import_dino_head(head)
  stats = trunk.batch_stats | ({"head": top.batch_stats} if top.batch_stats else {})
  return Weights(trunk.params | {"head": top.params}, stats)


def import_dino_head(state: dict[str, np.ndarray]) -> Weights:
  """Names such as "mlp.0.weight" and "last_layer.weight_v" as trees of `models.heads.DINOHead`."""
  params, stats = {}, {}
  places = _places(state)
  for name, value in state.items():
    if name.endswith("num_batches_tracked"):
      continue
    match = re.fullmatch(r"mlp\.(?:(\d+)\.)?(weight|bias|running_mean|running_var)", name)
    if name in _LAST:
      params[_LAST[name]] = value
    elif match is None:
      raise UserError(f"weights: 'head.{name}' {value.shape} belongs to no place of a DINO head.")
    else:
      place = places[int(match[1] or 0)]
      leaf = (_BATCH_NORM if place.startswith("bn") else _LEAF)[match[2]]
      tree = stats if match[2].startswith("running_") else params
      tree[f"mlp/{place}/{leaf}"] = value.T if leaf == "kernel" else value
  return Weights(nest(params), nest(stats))


def _places(state: dict[str, np.ndarray]) -> dict[int, str]:
  """fc<i> or bn<i> by the position in the sequence of linear layers, BN and activations."""
  found = {}
  for name, value in state.items():
    if match := re.fullmatch(r"mlp\.(?:(\d+)\.)?weight", name):
      found[int(match[1] or 0)] = value.ndim
  names, linear = {}, 0
  for index in sorted(found):
    linear += found[index] == 2
    names[index] = f"{'fc' if found[index] == 2 else 'bn'}{linear}"
  return names


def export_dino(weights: Weights) -> dict[str, np.ndarray]:
  """The inverse of `import_dino`, without "module."."""
  top = Weights(weights.params["head"], weights.batch_stats.get("head", {}))
  trunk = Weights(*({k: v for k, v in tree.items() if k != "head"} for tree in (weights.params, weights.batch_stats)))
  if "conv1" in trunk.params["backbone"]:
    named = export_resnet(Weights(trunk.params["backbone"], trunk.batch_stats["backbone"]))
  else:
    named = export_vit(trunk)
  out = {f"backbone.{name}": value for name, value in named.items()}
  return out | {f"head.{name}": value for name, value in export_dino_head(top).items()}


def export_dino_head(weights: Weights) -> dict[str, np.ndarray]:
  """The inverse of `import_dino_head`, without the counters of BN."""
  flat = {path: np.asarray(value) for path, value in flatten(weights.params).items()}
  stats = {path: np.asarray(value) for path, value in flatten(weights.batch_stats).items()}
  linear = {path.split("/")[1] for path in flat if re.match(r"mlp/fc\d", path)}
  stride = 3 if any(path.startswith("mlp/bn") for path in flat) else 2
  last = {ours: theirs for theirs, ours in _LAST.items()}
  kinds = {ours: theirs for table in (_LEAF, _BATCH_NORM) for theirs, ours in table.items()}
  out = {}
  for path, value in (flat | stats).items():
    if path in last:
      out[last[path]] = value
      continue
    _, place, leaf = path.split("/")
    index = stride * (int(place[2:]) - 1) + place.startswith("bn")
    name = "mlp" if len(linear) == 1 else f"mlp.{index}"
    out[f"{name}.{kinds[leaf]}"] = value.T if leaf == "kernel" else value
  return out
