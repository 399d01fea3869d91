"""Layer-wise decay of the learning rate for fine-tuning: early layers, which are the most general, move the least.

  factor = decay^(n + 1 - l)    embeddings and stem l = 0, layers l = 1 ... n, all behind them and the head l = n + 1

(BEiT, arXiv 2106.08254, released code.) The layer is read off the parameter's path. Layers are blocks, and the stages of
convolutional networks of stages (own choice); in networks without either, convolutions and then linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from big_ssl.core.types import UserError

_NUMBERED = re.compile(r"^(block_|class_block_|layer|conv|bn|fc)(\d+)(?:_\d+)?$")
_ORDER = {"block_": 0, "layer": 0, "conv": 0, "bn": 0, "class_block_": 1, "fc": 2}
_EMBEDDINGS = re.compile(r"^(patch_embed|cls_token|mask_token|registers?|pos_embed|positions|stem.*)$")


def factors(paths: Sequence[str], *, shapes: Sequence[tuple[int, ...]], decay: float) -> list[float]:
  """The factor on the learning rate of every parameter; 1 for what is not below a module "backbone".

  Args:
    paths: "encoder/backbone/block_0/..." of all parameters.
    shapes: of these; a normalization "bn1" as wide as "conv1" is of the stem, any other one is behind the stages.
    decay: in (0, 1].

  Raises:
    UserError: no layer is found.
  """
  modules = [_in_backbone(path) for path in paths]
  found = {m: _key(m) for m in modules if m and _NUMBERED.match(m)}
  if any(m.startswith(("block_", "layer")) for m in found):  # numbers of other modules are those of the stem
    found = {m: key for m, key in found.items() if m.startswith(("block_", "class_block_", "layer"))}
  if not found:
    raise UserError(
      f"config.optim.layer_decay={decay:g}: config.model has no numbered layers; use 1, or config.optim.rules with lr_mult."
    )
  layers = {key: 1 + i for i, key in enumerate(sorted(set(found.values())))}
  last = len(layers) + 1
  stem = {shape[-1] for module, path, shape in zip(modules, paths, shapes, strict=True) if module == "conv1" and path.endswith("kernel")}

  def layer(module: str | None, shape: tuple[int, ...]) -> int:
    if module in found:
      return layers[found[module]]
    of_stem = module == "conv1" or (module == "bn1" and shape[-1] in stem)
    return 0 if module and (of_stem or _EMBEDDINGS.match(module)) else last

  return [decay ** (last - layer(m, shape)) for m, shape in zip(modules, shapes, strict=True)]


def _in_backbone(path: str) -> str | None:
  """The name right below "backbone"."""
  parts = path.split("/")
  return parts[parts.index("backbone") + 1] if "backbone" in parts[:-1] else None


def _key(module: str) -> tuple[int, int]:
  """Where a numbered module stands: its kind's place, its number."""
  kind, number = _NUMBERED.match(module).groups()
  return _ORDER[kind], int(number)
