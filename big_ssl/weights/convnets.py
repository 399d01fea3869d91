"""Key maps of the AlexNets and VGGs of DeepCluster, SeLa and DeeperCluster: state dicts to flax trees and back.

Bit for bit, but for the counters of seen batches, which nothing reads.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from big_ssl.core.types import PyTree, UserError
from big_ssl.models.alexnet import WIDTHS, AlexNet
from big_ssl.models.sobel import HORIZONTAL, VERTICAL
from big_ssl.models.vgg import DEPTHS, VGG
from big_ssl.weights.vit import Weights, flatten, nest

_ALEXNET_POOLS = {"imagenet": (1, 2, 5), "cifar": (2, 5)}  # convolutions followed by a pool
_VGG_POOLS = tuple(int(n) for n in np.cumsum(DEPTHS))
_PLACE = re.compile(r"(?:body\.)?(features|classifier)\.(\d+)\.(weight|bias|running_mean|running_var)")
_HEAD = re.compile(r"(top_layer\d*|pred_layer|sub_class_pred_layer|super_class_pred_layer)\.(weight|bias)")
_SOBEL = {
  "sobel.0.weight": np.full((1, 3, 1, 1), 1 / 3, np.float32),
  "sobel.0.bias": np.zeros(1, np.float32),
  "sobel.1.weight": np.stack([HORIZONTAL, VERTICAL])[:, None],
  "sobel.1.bias": np.zeros(2, np.float32),
}


@dataclasses.dataclass(frozen=True)
class ConvNet:
  """A checkpoint: the network's config, its trees and its classifiers.

  Attributes:
    model: fields of `config.model` for these weights: name, variant or widths, fc, sobel, channels, image_size.
    weights: of that backbone.
    heads: {"top_layer": {"kernel": [D, K], "bias": [K]}} or top_layer0, ...; K is the number of clusters of the run.
  """

  model: dict[str, Any]
  weights: Weights
  heads: dict[str, dict[str, np.ndarray]]

  def backbone(self, **changes: Any) -> AlexNet | VGG:
    fields = self.model | changes
    return {"alexnet": AlexNet, "vgg": VGG}[fields.pop("name")](**fields)


def import_convnet(state: dict[str, np.ndarray]) -> ConvNet:
  """A state dict of the public code; widths, Sobel front end and clusters are read off the tensors.

  Args:
    state: "features.module.0.weight" (DeepCluster: parallel over the convolutions only), "features.0.weight" (SeLa),
      "module.body.features.0.weight" (DeeperCluster); values in torch's layouts.

  Raises:
    UserError: a tensor without a place, a layer without one of its tensors, a Sobel front end with other filters, or
      neither 5 nor 13 convolutions.
  """
  state = {_strip(name): value for name, value in state.items() if not name.endswith("num_batches_tracked")}
  layers: dict[str, dict[int, dict[str, np.ndarray]]] = {"features": {}, "classifier": {}}
  heads: dict[str, dict[str, np.ndarray]] = {}
  for name, value in state.items():
    if match := _PLACE.fullmatch(name):
      layers[match[1]].setdefault(int(match[2]), {})[match[3]] = value
    elif match := _HEAD.fullmatch(name):
      heads.setdefault(match[1], {})["kernel" if match[2] == "weight" else "bias"] = (
        value.T if match[2] == "weight" else value
      )
    elif name not in _SOBEL:
      raise UserError(
        f"weights: '{name}' {value.shape} belongs to no place of an AlexNet or VGG of the clustering papers."
      )
  sobel = "sobel.0.weight" in state
  if sobel and not all(k in state and np.array_equal(state[k], v) for k, v in _SOBEL.items()):
    raise UserError("weights: 'sobel.*' are not the fixed Sobel filters.")
  _check_complete(layers, heads)
  params, stats, kernels = {}, {}, {}
  for _, layer in sorted(layers["features"].items()):
    if layer["weight"].ndim == 4:
      number = len(kernels) + 1
      kernels[number] = layer["weight"]
      params |= {f"conv{number}/kernel": layer["weight"].transpose(2, 3, 1, 0), f"conv{number}/bias": layer["bias"]}
    else:
      params |= {f"bn{number}/scale": layer["weight"], f"bn{number}/bias": layer["bias"]}
      stats |= {f"bn{number}/mean": layer["running_mean"], f"bn{number}/var": layer["running_var"]}
  linears = [layer for _, layer in sorted(layers["classifier"].items())]
  if len(kernels) not in (5, 13) or len(linears) != 2:
    raise UserError(
      f"weights: {len(kernels)} convolutions, {len(linears)} linear layers; an AlexNet has 5 and 2, a VGG-16 13 and 2."
    )
  for name, layer in zip(("fc6", "fc7"), linears, strict=True):
    params |= {f"{name}/kernel": layer["weight"].T, f"{name}/bias": layer["bias"]}
  body = any(name.startswith("body.") for name in state)
  model = _model(kernels, linears[0]["weight"], sobel=sobel, body=body)
  return ConvNet(model, Weights(nest(params), nest(stats)), heads)


def _check_complete(
  layers: dict[str, dict[int, dict[str, np.ndarray]]], heads: dict[str, dict[str, np.ndarray]]
) -> None:
  """Every layer has all of its tensors: a convolution or linear layer two, BN four."""
  found = [(f"{part}.{index}", layer) for part, numbered in layers.items() for index, layer in numbered.items()]
  for name, layer in found:
    norm = name.startswith("features") and np.ndim(layer.get("weight", 0)) < 2
    for leaf in ("weight", "bias", *(("running_mean", "running_var") if norm else ())):
      if leaf not in layer:
        raise UserError(f"weights: '{name}.{leaf}' is missing.")
  for name, head in heads.items():
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
      if ours not in head:
        raise UserError(f"weights: '{name}.{theirs}' is missing.")


def _strip(name: str) -> str:
  """Without "module.", at the start and after "features."."""
  return name.removeprefix("module.").replace("features.module.", "features.")


def _model(kernels: dict[int, np.ndarray], fc6: np.ndarray, *, sobel: bool, body: bool) -> dict[str, Any]:
  widths = tuple(k.shape[0] for k in kernels.values())
  model = {"fc": fc6.shape[0], "sobel": sobel, "channels": 3 if sobel else kernels[1].shape[1]}
  if len(widths) == 5:
    variant = next((name for name, w in WIDTHS.items() if w == widths), None)
    model |= {"name": "alexnet", "stem": "imagenet" if kernels[1].shape[-1] == 11 else "cifar"}
    model |= {"widths": widths} if variant is None else {"variant": variant}
  else:
    model |= {
      "name": "vgg",
      "variant": "deepercluster" if body else "deepcluster",
      "widths": tuple(widths[i - 1] for i in _VGG_POOLS),
    }
  last = round((fc6.shape[1] / widths[-1]) ** 0.5)
  network = {"alexnet": AlexNet, "vgg": VGG}[model["name"]](**{k: v for k, v in model.items() if k != "name"})
  sizes = [side for side in (224, *range(1, 1024)) if network.map_size(side) == last]
  if not sizes or last**2 * widths[-1] != fc6.shape[1]:
    raise UserError(f"weights: fc6 {fc6.shape} does not fit to a square map of {widths[-1]} channels.")
  return model | {"image_size": sizes[0]}


def export_convnet(net: ConvNet) -> dict[str, np.ndarray]:
  """The inverse of `import_convnet`, without "module."; public loaders know a Sobel front end by its filters."""
  alexnet = net.model["name"] == "alexnet"
  pools = _ALEXNET_POOLS[net.model.get("stem", "imagenet")] if alexnet else _VGG_POOLS
  fc = {"fc6": 1, "fc7": 4} if alexnet else {"fc6": 0, "fc7": 3}
  prefix = "body." if net.model.get("variant") == "deepercluster" else ""
  leaf = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
  out = dict(_SOBEL) if net.model.get("sobel") else {}
  for path, value in (flatten(net.weights.params) | flatten(net.weights.batch_stats)).items():
    layer, kind = path.split("/")
    value = np.asarray(value)
    if layer in fc:
      out[f"{prefix}classifier.{fc[layer]}.{leaf[kind]}"] = value.T if kind == "kernel" else value
      continue
    number = int(layer.removeprefix("conv").removeprefix("bn"))
    index = 3 * (number - 1) + sum(p < number for p in pools) + layer.startswith("bn")  # conv, BN, ReLU [, pool]
    out[f"{prefix}features.{index}.{leaf[kind]}"] = value.transpose(3, 2, 0, 1) if kind == "kernel" else value
  for name, head in net.heads.items():
    out |= {f"{name}.weight": np.asarray(head["kernel"]).T, f"{name}.bias": np.asarray(head["bias"])}
  return out


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
