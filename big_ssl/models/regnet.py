"""RegNetY (arXiv 2003.13678) as ClassyVision builds it: the trunks of SEER (2103.01988, 2202.08360), 400MF to 10B.

Widths and depths of the stages come from a quantized line (`expand`); blocks are grouped bottlenecks with
squeeze-and-excitation whose ratio is relative to the block's input.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array, UserError, nearest
from big_ssl.models.layers import Backbone, BatchNorm, check_images, torch_uniform

_QUANTUM = 8  # widths on the line are multiples of it


@dataclasses.dataclass(frozen=True)
class Line:
  """depth d, w_0, slope w_a, ratio w_m and group width g of a generator (2003.13678, section 3.3)."""

  depth: int
  w_0: int
  w_a: float
  w_m: float
  group_width: int


@dataclasses.dataclass(frozen=True)
class Stage:
  """Blocks of one width; the first has a stride of 2."""

  width: int
  depth: int
  group_width: int


LINES = {
  "400mf": Line(16, 48, 27.89, 2.09, 8),
  "800mf": Line(14, 56, 38.84, 2.4, 16),
  "1.6gf": Line(27, 48, 20.71, 2.65, 24),
  "3.2gf": Line(21, 80, 42.63, 2.66, 24),
  "8gf": Line(17, 192, 76.82, 2.19, 56),
  "16gf": Line(18, 200, 106.23, 2.48, 112),
  "32gf": Line(20, 232, 115.89, 2.53, 232),
  "64gf": Line(20, 352, 147.48, 2.4, 328),
  "128gf": Line(27, 456, 160.83, 2.52, 264),
  "256gf": Line(27, 640, 230.83, 2.53, 373),
  "10b": Line(27, 1744, 620.83, 2.52, 1010),
}
# SEER's ablation of 3 billion parameters is not on a line (public code).
STAGES = {"3b": tuple(Stage(w, d, 920) for w, d in zip((1840, 3680, 10120, 25760), (1, 4, 4, 1), strict=True))}


def expand(line: Line, *, rounding: str = "classy") -> tuple[Stage, ...]:
  """The stages of a generator.

  u_j = w_0 + w_a j;  s_j = round(log(u_j / w_0) / log w_m);  w_j = 8 round(w_0 w_m^s_j / 8);  a stage is a run of
  equal w_j.
  Then group widths above w shrink to it and widths are made multiples of the group width: to the nearest, halves to
  even ("classy": ClassyVision, SEER, timm), or to the nearest, halves up, and never below 0.9 w ("torchvision").

  Raises:
    UserError: values that give no network; says which.
  """
  for name, value, fits, wanted in (
    ("depth", line.depth, line.depth >= 1, "at least 1"),
    ("w_0", line.w_0, line.w_0 > 0 and line.w_0 % _QUANTUM == 0, f"a positive multiple of {_QUANTUM}"),
    ("w_a", line.w_a, line.w_a >= 0, "0 or more"),
    ("w_m", line.w_m, line.w_m > 1, "more than 1"),
    ("group_width", line.group_width, line.group_width >= 1, "at least 1"),
  ):
    if not fits:
      raise UserError(f"config.model.{name}={value}: expected {wanted}.")
  u = line.w_0 + line.w_a * np.arange(line.depth)
  steps = np.round(np.log(u / line.w_0) / math.log(line.w_m))
  widths = (np.round(line.w_0 * line.w_m**steps / _QUANTUM) * _QUANTUM).astype(int).tolist()
  stages = []
  for width, run in itertools.groupby(widths):
    group = min(line.group_width, width)
    if rounding == "classy":
      fitted = round(width / group) * group
    else:
      fitted = max(group, (width + group // 2) // group * group)
      fitted += group if fitted < 0.9 * width else 0
    stages.append(Stage(fitted, len(list(run)), group))
  return tuple(stages)


class SqueezeExcite(nn.Module):
  """x * sigmoid(fc2(relu(fc1(mean x)))), mean and gate in float32 (arXiv 1709.01507)."""

  hidden: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    squeezed = jnp.mean(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
    init, width = nn.initializers.variance_scaling(2.0, "fan_out", "normal"), x.shape[-1]
    conv = functools.partial(nn.Conv, kernel_size=(1, 1), kernel_init=init)
    y = nn.relu(conv(self.hidden, bias_init=torch_uniform(width), name="fc1")(squeezed))
    y = conv(width, bias_init=torch_uniform(self.hidden), name="fc2")(y)
    return x * nn.sigmoid(y).astype(x.dtype)


class Block(nn.Module):
  """1x1, grouped 3x3 with the stride, squeeze-and-excitation, 1x1; all of one width (bottleneck ratio 1)."""

  width: int
  stride: int
  group_width: int
  se_ratio: float
  bn_groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, *, train: bool) -> Array:
    # normal(0, sqrt(2 / (k k out))), out not divided by the groups
    init, strides = nn.initializers.variance_scaling(2.0, "fan_out", "normal"), (self.stride, self.stride)
    conv = functools.partial(nn.Conv, self.width, use_bias=False, kernel_init=init, dtype=self.dtype)
    norm = functools.partial(BatchNorm, groups=self.bn_groups, dtype=self.dtype)
    y = nn.relu(norm(name="bn1")(conv((1, 1), name="conv1")(x), train=train))
    groups = self.width // self.group_width
    y = conv((3, 3), strides=strides, padding=1, feature_group_count=groups, name="conv2")(y)
    y = nn.relu(norm(name="bn2")(y, train=train))
    if self.se_ratio:
      y = SqueezeExcite(max(1, round(self.se_ratio * x.shape[-1])), self.dtype, name="se")(y)
    y = norm(name="bn3")(conv((1, 1), name="conv3")(y), train=train)
    if x.shape[-1] != self.width or self.stride != 1:
      x = conv((1, 1), strides=strides, padding=0, name="downsample_conv")(x)
      x = norm(name="downsample_bn")(x, train=train)
    return nn.relu(x + y)


class RegNet(Backbone):
  """A RegNetY trunk; parameters are stem/..., layer1_0/conv1/kernel and so on, the same under any `remat`.

  Attributes:
    variant: a key of `LINES` or `STAGES`, such as "8gf", or "custom"; depth, w_0, w_a, w_m and group_width override the
      generator where not 0.
    widths, depths: of the stages, in place of a generator; then group_width is used as it is.
    rounding: how widths meet the group width, see `expand`: "torchvision" differs for 800mf and 8gf.
    stem_width: channels of the 3x3 stride-2 stem.
    se_ratio: of squeeze-and-excitation, over the INPUT width of a block; 0 leaves it out (RegNetX).
    bn_groups: groups with own BN statistics; 1 is the global batch.
    remat: "full" recomputes activations in the backward pass, from the inputs of single blocks, or of the runs in
      remat_ends.
    remat_ends: per stage the blocks (from 1) that end a run, the rest of the stage being one; SEER's 10B:
      ((2,), (7,), (9, 17), ()).
    channels: of the images.
    dtype: compute dtype; parameters, BN statistics and the gates are float32.
  """

  variant: str = "8gf"
  depth: int = 0
  w_0: int = 0
  w_a: float = 0.0
  w_m: float = 0.0
  group_width: int = 0
  widths: tuple[int, ...] = ()
  depths: tuple[int, ...] = ()
  rounding: Literal["classy", "torchvision"] = "classy"
  stem_width: int = 32
  se_ratio: float = 0.25
  bn_groups: int = 1
  remat: Literal["none", "full"] = "none"
  remat_ends: tuple[tuple[int, ...], ...] = ()
  channels: int = 3
  dtype: Literal["float32", "bfloat16"] = "float32"

  def stages(self) -> tuple[Stage, ...]:
    """Widths, depths and group widths after overrides.

    Raises:
      UserError: unknown variant, a generator that gives no network, or a stage whose width the groups do not divide.
    """
    accepted = (*LINES, *STAGES)
    if self.variant not in accepted and self.variant != "custom":
      near = nearest(self.variant.lower(), accepted)
      raise UserError(f"config.model.variant={self.variant!r}: expected custom or one of {', '.join(accepted)}.{near}")
    if self.se_ratio < 0 or self.stem_width < 1:
      raise UserError(
        f"config.model.se_ratio={self.se_ratio}, stem_width={self.stem_width}: expected positive numbers."
      )
    if self.widths or self.depths:
      return self._listed()
    if self.variant in STAGES:
      stages = STAGES[self.variant]
    else:
      base = LINES.get(self.variant, Line(0, 0, 0.0, 0.0, 0))
      line = Line(*(getattr(self, f.name) or getattr(base, f.name) for f in dataclasses.fields(Line)))
      stages = expand(line, rounding=self.rounding)
    return stages

  def _listed(self) -> tuple[Stage, ...]:
    if len(self.widths) != len(self.depths) or min((*self.widths, *self.depths)) < 1:
      raise UserError(f"config.model.widths={self.widths}, depths={self.depths}: expected as many, all at least 1.")
    if self.group_width < 1:
      raise UserError(f"config.model.group_width={self.group_width}: widths and depths need one.")
    stages = tuple(Stage(w, d, min(self.group_width, w)) for w, d in zip(self.widths, self.depths, strict=True))
    for i, stage in enumerate(stages, 1):
      if stage.width % stage.group_width:
        raise UserError(
          f"config.model.widths={self.widths}: stage {i} of width {stage.width} does not divide into groups of"
          f" {stage.group_width} (config.model.group_width)."
        )
    return stages

  def _runs(self, stages: Sequence[Stage]) -> list[list[range]]:
    """Per stage, the blocks recomputed together."""
    if self.remat_ends and self.remat != "full":
      raise UserError(f"config.model.remat_ends={self.remat_ends}: has no effect without config.model.remat='full'.")
    ends = self.remat_ends or tuple(tuple(range(1, stage.depth + 1)) for stage in stages)
    fits = len(ends) == len(stages) and all(
      list(e) == sorted(set(e)) and all(1 <= i <= stage.depth for i in e)
      for e, stage in zip(ends, stages, strict=False)
    )
    if not fits:
      depths = ", ".join(str(stage.depth) for stage in stages)
      raise UserError(
        f"config.model.remat_ends={self.remat_ends}: expected rising block numbers per stage; the depths are {depths}."
      )
    runs = []
    for found, stage in zip(ends, stages, strict=True):
      bounds = sorted({0, *found, stage.depth})
      runs.append([range(a, b) for a, b in itertools.pairwise(bounds)])
    return runs

  @nn.compact
  def __call__(
    self, images: Array, *, train: bool, keep: Array | None = None, mask: Array | None = None
  ) -> dict[str, Array]:
    """images: [N, H, W, C] -> "pooled" [N, D], "tokens" [N, h*w, D], "stages": the stem's map and those of the stages.

    An odd side is halved upward; `keep` and `mask` must be None.

    Raises:
      UserError: a generator, `remat_ends` or channels that do not fit.
    """
    stages = self.stages()
    check_images(self, images, keep=keep, mask=mask)
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    conv = nn.Conv(
      self.stem_width,
      (3, 3),
      strides=(2, 2),
      padding=1,
      use_bias=False,
      kernel_init=init,
      dtype=self.dtype,
      name="conv1",
    )
    x = nn.relu(BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="bn1")(conv(images), train=train))
    maps = [x]
    for number, (stage, runs) in enumerate(zip(stages, self._runs(stages), strict=True), 1):
      for run in runs:

        def blocks(model: RegNet, x: Array, stage: Stage = stage, number: int = number, run: range = run) -> Array:
          for i in run:
            block = Block(
              stage.width,
              1 if i else 2,
              stage.group_width,
              model.se_ratio,
              model.bn_groups,
              model.dtype,
              name=f"layer{number}_{i}",
            )
            x = block(x, train=train)
          return x

        x = nn.remat(blocks)(self, x) if self.remat == "full" else blocks(self, x)
      maps.append(x)
    features = x.astype(jnp.float32)
    return {
      "pooled": jnp.mean(features, axis=(1, 2)),
      "tokens": features.reshape(x.shape[0], -1, x.shape[-1]),
      "stages": tuple(maps),
    }
