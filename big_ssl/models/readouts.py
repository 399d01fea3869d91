"""What a linear classifier reads of a backbone: functions of a trunk and images, for `Extract` and any method."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from big_ssl.core.types import Array, UserError
from big_ssl.models.alexnet import AlexNet
from big_ssl.models.conv_probe import (
  ALEXNET_POOLS,
  RESNET_POOLS,
  RESNET_STRIDES,
  VGG_POOLS,
  pool_map,
  pool_to_grid,
)
from big_ssl.models.resnet import ResNet
from big_ssl.models.vgg import VGG

Kind = Literal["output", "cls", "cls_average", "cls_unnormed", "stages"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout:
  """Called as `readout(trunk, images) -> [N, D]`, or [N, C, positions] of a stage.

  Attributes:
    kind: "cls": CLS of the last `layers` blocks, each through the final norm, concatenated (DINO, arXiv 2104.14294,
      appendix F.2). "cls_average": the last block's CLS and the mean of the patch tokens, both normed, interleaved
      c0, a0, c1, a1 as in DINO's released classifiers of ViT-B. "cls_unnormed": the last block's CLS before the norm
      (MSN, arXiv 2204.07141). "stages": the map of `stage`, pooled.
    layers: of "cls".
    stage: from 1; of a ResNet and a RegNet 1 is the stem.
    grid: means over so many cells; None: the published pools of AlexNet, VGG and ResNet, and for other networks the
      largest square grid below 10,000 numbers (own choice).
  """

  kind: Kind
  layers: int = 4
  stage: int = 1
  grid: tuple[int, int] | None = None

  def __str__(self) -> str:
    if self.kind == "stages":
      return f"conv{self.stage}" + (f"_{self.grid[0]}x{self.grid[1]}" if self.grid else "")
    return f"cls{self.layers}" if self.kind == "cls" else self.kind

  def __call__(self, trunk, images: Array) -> Array:
    """Raises UserError where the backbone does not have it."""
    out = trunk(images)
    if self.kind == "stages":
      return self._stage(out, trunk.module)
    need = "cls_layers" if self.kind == "cls_unnormed" else "cls_layers_normed"
    if need not in out:
      raise UserError(
        f"config.evals: readout={self.kind} needs a CLS token, config.model.name is {type(trunk.module).__name__};"
        " expected readout=output, or stages of a convolutional network."
      )
    if self.kind == "cls_unnormed":
      return out[need][:, -1]
    cls = out[need]  # [N, L, D]
    if self.kind == "cls_average":
      return jnp.stack([cls[:, -1], out["tokens"].mean(axis=1)], axis=-1).reshape(len(cls), -1)
    if not 1 <= self.layers <= cls.shape[1]:
      raise UserError(f"config.evals: layers={self.layers}: the backbone has {cls.shape[1]} blocks with a CLS.")
    return cls[:, -self.layers :].reshape(len(cls), -1)

  def _stage(self, out: dict, module: object) -> Array:
    maps = out.get("stages", ())
    if not 1 <= self.stage <= len(maps):
      raise UserError(
        f"config.evals: stages={self.stage}: {type(module).__name__} has "
        + (f"stages 1 to {len(maps)}." if maps else "none; expected another readout.")
      )
    x, i = maps[self.stage - 1], self.stage - 1
    if self.grid is not None:
      return pool_to_grid(x, grid=tuple(min(cells, side) for cells, side in zip(self.grid, x.shape[1:3], strict=True)))
    if isinstance(module, ResNet):
      kernel, padding = RESNET_POOLS[i]
      return pool_map(x, kernel=kernel, stride=RESNET_STRIDES[i], padding=padding)
    if isinstance(module, (AlexNet, VGG)):
      kernel, padding = (ALEXNET_POOLS if isinstance(module, AlexNet) else VGG_POOLS)[i]
      return pool_map(x, kernel=kernel, stride=kernel, padding=padding)
    side = max(1, min(int((9999 / x.shape[-1]) ** 0.5), *x.shape[1:3]))
    return pool_to_grid(x, grid=(side, side))


Output = str | Readout


def readouts(
  kind: Kind, *, output: str, layers: int, stages: tuple[int, ...], grids: tuple[tuple[int, int], ...] = ()
) -> tuple[Output, ...]:
  """What `Extract` is asked for, one after the other: the method's `output`, one readout, or one per stage and grid."""
  if kind == "output":
    return (output,)
  if kind == "stages":
    return tuple(Readout(kind=kind, stage=stage, grid=grid) for stage in stages for grid in grids or (None,))
  return (Readout(kind=kind, layers=layers),)
