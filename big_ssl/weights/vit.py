"""Key map of the official DINO, MSN and DINOv2 ViTs: torch state dicts to flax trees and back, bit for bit."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from big_ssl.core.types import PyTree, UserError

_NORM = {"weight": "norm/scale", "bias": "norm/bias"}
_BATCH_NORM = {"weight": "scale", "bias": "bias"}
_PREFIXES = ("", "module.", "backbone.", "module.backbone.")
_TOKENS = {"cls_token": "cls_token", "pos_embed": "pos_embed", "register_tokens": "registers"}


@dataclasses.dataclass(frozen=True)
class Weights:
  """params and batch_stats as nested dicts with "backbone" and, where the file has one, "head"."""

  params: PyTree
  batch_stats: PyTree


def import_vit(state: dict[str, np.ndarray], *, heads: int) -> Weights:
  """The official state dict of a DINO or MSN encoder as trees of `models.encoder.Encoder`.

  Args:
    state: names such as "blocks.0.attn.qkv.weight", all with the same prefix "module.", "backbone." or none; an MSN
      head lies under "fc.". DINOv2's mask token, which only its pretraining reads, is left out.
    heads: attention heads, which the file does not say.

  Raises:
    UserError: a tensor that belongs to no known place, or heads that do not divide the width.
  """
  params: dict[str, np.ndarray] = {}
  stats: dict[str, np.ndarray] = {}
  prefix = next((p for p in _PREFIXES if f"{p}cls_token" in state), None)
  if prefix is None:
    raise UserError(f"weights: no 'cls_token' among the {len(state)} tensors; not a DINO or MSN ViT.")
  width = state[f"{prefix}cls_token"].shape[-1]
  if width % heads:
    raise UserError(f"heads={heads}: does not divide the width {width} of the weights.")
  for full, value in state.items():
    name = full.removeprefix(prefix) if full.startswith(prefix) else ""
    if name == "mask_token":
      continue
    if match := re.fullmatch(r"fc\.((?:fc|bn)\d+)\.(weight|bias|running_mean|running_var|num_batches_tracked)", name):
      _import_head(match[1], match[2], value, params, stats)
    elif name in _TOKENS:
      params[f"backbone/{_TOKENS[name]}"] = value
    elif match := re.fullmatch(r"blocks\.(\d+)\.(ls[12])\.gamma", name):
      params[f"backbone/block_{match[1]}/{match[2]}/scale"] = value
    elif match := re.fullmatch(r"patch_embed\.proj\.(weight|bias)", name):
      params[f"backbone/patch_embed/conv/{_leaf(match[1])}"] = (
        value.transpose(2, 3, 1, 0) if match[1] == "weight" else value
      )
    elif match := re.fullmatch(r"norm\.(weight|bias)", name):
      params[f"backbone/norm/{_NORM[match[1]]}"] = value
    elif match := re.fullmatch(r"blocks\.(\d+)\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)", name):
      _import_block(f"backbone/block_{match[1]}", match[2], match[3], value, heads, params)
    else:
      raise UserError(f"weights: '{full}' {value.shape} belongs to no place of a DINO or MSN ViT.")
  return Weights(nest(params), nest(stats))


def _leaf(kind: str) -> str:
  return "kernel" if kind == "weight" else "bias"


def _import_block(
  prefix: str, part: str, kind: str, value: np.ndarray, heads: int, params: dict[str, np.ndarray]
) -> None:
  if part.startswith("norm"):
    params[f"{prefix}/{part}/{_NORM[kind]}"] = value
  elif part == "attn.qkv":
    for i, name in enumerate(("query", "key", "value")):
      third = np.split(value, 3)[i]  # rows [q | k | v], each heads x head dim
      shaped = third.T.reshape(third.shape[1], heads, -1) if kind == "weight" else third.reshape(heads, -1)
      params[f"{prefix}/attention/{name}/{_leaf(kind)}"] = shaped
  elif part == "attn.proj":
    params[f"{prefix}/attention/out/{_leaf(kind)}"] = (
      value.T.reshape(heads, -1, value.shape[0]) if kind == "weight" else value
    )
  else:
    params[f"{prefix}/{part.replace('.', '/')}/{_leaf(kind)}"] = value.T if kind == "weight" else value


def _import_head(
  layer: str, kind: str, value: np.ndarray, params: dict[str, np.ndarray], stats: dict[str, np.ndarray]
) -> None:
  if kind == "num_batches_tracked":
    return
  if kind.startswith("running_"):
    stats[f"head/{layer}/{kind.removeprefix('running_')}"] = value
  elif layer.startswith("bn"):
    params[f"head/{layer}/{_BATCH_NORM[kind]}"] = value
  else:
    params[f"head/{layer}/{_leaf(kind)}"] = value.T if kind == "weight" else value


def export_vit(weights: Weights) -> dict[str, np.ndarray]:
  """The inverse of `import_vit`, without prefix."""
  tokens = {ours: theirs for theirs, ours in _TOKENS.items()}
  out: dict[str, np.ndarray] = {}
  flat = {path: np.asarray(value) for path, value in flatten(weights.params).items()}
  for path, value in flat.items():
    parts = path.split("/")
    kind = "weight" if parts[-1] in ("kernel", "scale") else "bias"
    if parts[0] == "head":
      out[f"fc.{parts[1]}.{kind}"] = value.T if parts[-1] == "kernel" else value
    elif parts[1] in tokens:
      out[tokens[parts[1]]] = value
    elif parts[1] == "patch_embed":
      out[f"patch_embed.proj.{kind}"] = value.transpose(3, 2, 0, 1) if kind == "weight" else value
    elif parts[1] == "norm":
      out[f"norm.{kind}"] = value
    else:
      _export_block(f"blocks.{parts[1].removeprefix('block_')}", parts[2:], kind, value, flat, path, out)
  for path, value in flatten(weights.batch_stats).items():
    _, layer, kind = path.split("/")
    out[f"fc.{layer}.running_{kind}"] = np.asarray(value)
  return out


def _export_block(
  prefix: str,
  parts: list[str],
  kind: str,
  value: np.ndarray,
  flat: dict[str, np.ndarray],
  path: str,
  out: dict[str, np.ndarray],
) -> None:
  if parts[0].startswith("norm"):
    out[f"{prefix}.{parts[0]}.{kind}"] = value
  elif parts[0].startswith("ls"):
    out[f"{prefix}.{parts[0]}.gamma"] = value
  elif parts[0] == "mlp":
    out[f"{prefix}.mlp.{parts[1]}.{kind}"] = value.T if kind == "weight" else value
  elif parts[1] == "out":
    out[f"{prefix}.attn.proj.{kind}"] = value.reshape(-1, value.shape[-1]).T if kind == "weight" else value
  elif parts[1] == "query":  # the three projections are one torch tensor
    three = [flat[path.replace("/query/", f"/{name}/")] for name in ("query", "key", "value")]
    rows = [t.reshape(t.shape[0], -1).T if kind == "weight" else t.reshape(-1) for t in three]
    out[f"{prefix}.attn.qkv.{kind}"] = np.concatenate(rows)


def nest(flat: dict[str, np.ndarray]) -> dict:
  tree: dict = {}
  for path, value in flat.items():
    *parents, leaf = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def flatten(tree: PyTree, prefix: str = "") -> dict[str, np.ndarray]:
  out = {}
  for key, value in tree.items():
    out |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return out
