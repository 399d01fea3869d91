"""config.json and preprocessor_config.json beside a file of Hugging Face's layout, written and read."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from big_ssl.core.types import UserError, sides
from big_ssl.models.regnet import RegNet
from big_ssl.models.vit import ViT
from big_ssl.weights.describe import Fields

_KINDS = {
  "hf_vit": ("vit", "ViTModel"),
  "hf_dinov2": ("dinov2", "Dinov2Model"),
  "hf_dinov2_registers": ("dinov2_with_registers", "Dinov2WithRegistersModel"),
  "hf_regnet": ("regnet", "RegNetModel"),
}


_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh")  # one function, computed in several ways
_EXACT = ("gelu", "gelu_python")
_ACTIVATIONS = {
  **dict.fromkeys(("vit", "vit_msn", "dinov2", "dinov2_with_registers"), (*_EXACT, *_TANH)),
  "regnet": ("relu",),
}


def model_config(layout: str, model: ViT | RegNet, *, msn: bool = False, classes: int = 0) -> dict[str, Any]:
  """The content of config.json; LayerNorm's epsilon is the one of training.

  Args:
    layout: name of the layout.
    model: backbone.
    msn: whether the ViT is MSN's, which transformers has as a class of its own without a pooler.
    classes: of the classifier in the file; 0 is none.

  Raises:
    UserError: a network that transformers does not have.
  """
  kind, architecture = ("vit_msn", "ViTMSNModel") if msn else _KINDS[layout]
  labels = {f"LABEL_{i}": i for i in range(classes)}
  if classes:
    architecture = architecture.removesuffix("Model") + "ForImageClassification"
  common = {"model_type": kind, "architectures": [architecture], "num_channels": model.channels}
  common |= {"label2id": labels, "id2label": {i: name for name, i in labels.items()}} if classes else {}
  if isinstance(model, RegNet):
    stages = model.stages()
    sizes = {"depths": [s.depth for s in stages], "hidden_sizes": [s.width for s in stages]}
    groups = {"groups_width": stages[-1].group_width, "embedding_size": model.stem_width}
    groups["layer_type"] = "y" if model.se_ratio else "x"
    return common | sizes | groups | {"hidden_act": "relu"}
  if not isinstance(model.image_size, int) and layout != "hf_vit":
    raise UserError(
      f"config.model.image_size={model.image_size}: transformers' Dinov2 has square position tables alone."
    )
  size = model.size()
  swiglu = model.mlp == "swiglu"
  sizes = {"hidden_size": size.width, "num_hidden_layers": size.depth, "num_attention_heads": size.heads}
  shared = {
    "hidden_act": "gelu" if model.gelu == "exact" else "gelu_pytorch_tanh",
    "layer_norm_eps": model.layernorm_eps,
    "image_size": model.image_size,
    "patch_size": model.patch,
    "qkv_bias": model.qkv_bias,
  }
  if layout == "hf_vit":
    return common | sizes | shared | {"intermediate_size": size.mlp_dim}
  ratio = _ratio(size.width, size.mlp_dim, swiglu=swiglu)
  dinov2 = {"mlp_ratio": ratio, "use_swiglu_ffn": swiglu, "layerscale_value": model.layer_scale}
  registers = {"num_register_tokens": model.registers} if model.registers else {}
  return common | sizes | shared | dinov2 | registers


def _ratio(width: int, mlp_dim: int, *, swiglu: bool) -> int:
  """The `mlp_ratio` from which transformers' Dinov2 gets an MLP as wide as `mlp_dim`."""
  for ratio in range(1, 4 * mlp_dim // width + 2):
    if mlp_dim == ((2 * ratio * width // 3 + 7) // 8 * 8 if swiglu else ratio * width):
      return ratio
  raise UserError(f"config.model.mlp_dim={mlp_dim}: transformers' Dinov2 has multiples of the width {width} alone.")


def preprocessor_config(
  size: int | tuple[int, int], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, Any]:
  """The content of preprocessor_config.json: resize, center crop, and normalization, which is off where `mean` is ()."""
  crop = dict(zip(("height", "width"), sides(size), strict=True))
  normalization = {"image_mean": list(mean), "image_std": list(std)} if mean else {}
  return {
    **{"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": crop, "resample": 3},
    **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": bool(mean)},
    **normalization,
  }


def given_beside(path: pathlib.Path) -> Fields:
  """Fields of `config.model` that the config.json beside a file states and its shapes do not.

  Raises:
    UserError: not JSON, or an activation that the networks here do not have.
  """
  file = path.parent / "config.json"
  if not file.is_file():
    return {}
  try:
    config = json.loads(file.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"{file}: not readable as JSON ({error}).") from None
  if not isinstance(config, dict) or "model_type" not in config:
    return {}
  names = {"num_attention_heads": "heads", "layer_norm_eps": "layernorm_eps"}
  fields = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
  size, activation = config.get("image_size"), config.get("hidden_act")
  if isinstance(size, list) and len(set(size)) > 1:  # the shape of a position table does not tell a rectangle
    fields["image_size"] = tuple(size)
  if activation is None or config["model_type"] not in _ACTIVATIONS or config.get("use_swiglu_ffn"):
    return fields
  if activation not in (accepted := _ACTIVATIONS[config["model_type"]]):
    raise UserError(f"{file}: hidden_act={activation!r}; the network here has one of {', '.join(accepted)}.")
  return fields | ({"gelu": "tanh"} if activation in _TANH else {})
