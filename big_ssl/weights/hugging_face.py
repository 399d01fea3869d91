"""config.json and preprocessor_config.json beside a file of Hugging Face's layout, written and read."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from big_ssl.core.types import UserError
from big_ssl.models.regnet import RegNet
from big_ssl.models.vit import ViT
from big_ssl.weights.describe import Fields

_KINDS = {
  "hf_vit": ("vit", "ViTModel"),
  "hf_dinov2": ("dinov2", "Dinov2Model"),
  "hf_dinov2_registers": ("dinov2_with_registers", "Dinov2WithRegistersModel"),
  "hf_regnet": ("regnet", "RegNetModel"),
}


def model_config(layout: str, model: ViT | RegNet, *, msn: bool = False) -> dict[str, Any]:
  """The content of config.json; LayerNorm's epsilon is the one of training.

  Args:
    layout: name of the layout.
    model: backbone.
    msn: whether the ViT is MSN's, which transformers has as a class of its own without a pooler.

  Raises:
    UserError: a network that transformers does not have.
  """
  kind, architecture = ("vit_msn", "ViTMSNModel") if msn else _KINDS[layout]
  common = {"model_type": kind, "architectures": [architecture], "num_channels": model.channels}
  if isinstance(model, RegNet):
    stages = model.stages()
    sizes = {"depths": [s.depth for s in stages], "hidden_sizes": [s.width for s in stages]}
    groups = {"groups_width": stages[-1].group_width, "embedding_size": model.stem_width, "layer_type": "y"}
    return common | sizes | groups | {"hidden_act": "relu"}
  if not isinstance(model.image_size, int):
    raise UserError(
      f"config.model.image_size={model.image_size}: transformers' ViTs have square position tables alone."
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
  ratio = 4 if swiglu else size.mlp_dim // size.width
  dinov2 = {"mlp_ratio": ratio, "use_swiglu_ffn": swiglu, "layerscale_value": model.layer_scale}
  registers = {"num_register_tokens": model.registers} if model.registers else {}
  return common | sizes | shared | dinov2 | registers


def preprocessor_config(size: int, *, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
  """The content of preprocessor_config.json: resize, center crop, and normalization, which is off where `mean` is ()."""
  crop = {"height": size, "width": size}
  normalization = {"image_mean": list(mean), "image_std": list(std)} if mean else {}
  return {
    **{"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": crop, "resample": 3},
    **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": bool(mean)},
    **normalization,
  }


def given_beside(path: pathlib.Path) -> Fields:
  """Fields of `config.model` that the config.json beside a file states: heads and LayerNorm's epsilon."""
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
  return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
