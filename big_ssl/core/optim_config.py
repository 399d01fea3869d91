"""The optimizer and its schedules, as a user says them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from big_ssl.core.types import Interval, Rule, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """The optimizer and its schedules (see `core/optim.py`).

  Attributes:
    lr: peak learning rate; with lr_scale "linear" it is multiplied by batch/256, with "sqrt" by sqrt(batch).
    schedule: shape of the learning rate; "warmup_cosine" goes start_lr -> lr over `warmup`, which the others do not have,
      then by a cosine to final_lr; "step" multiplies by `decay_factor` at each of `milestones`; "poly" goes to final_lr by
      (1 - share done)^`poly_power`.
    warmup_inclusive: the warm-up includes both ends, as numpy's linspace (DINO, SwAV): its last update has the peak already.
    schedule_every: the curves of the learning rate and the weight decay move only so often, such as "1epochs" (MoCo v2).
    stretch: the curves (learning rate, weight decay and the method's own) are laid over stretch * total steps.
    schedule_offset: update i uses the curve at i + offset (MSN steps its scheduler first: 1).
    weight_decay, weight_decay_final: decoupled decay; a cosine from the first to the second where both are given.
    lr_in_momentum: for "sgd", "lars", "larc": the learning rate is inside the velocity (SimCLR) instead of outside (torch).
    trust_coefficient, trust_clip: of "lars" and "larc"; whether a ratio is min(ratio / lr, 1), as in LARC's clip.
    accumulate: microbatches per update, for methods whose loss is a mean over examples.
    clip: largest gradient norm, 0 off; clip_by "global" takes one norm, "tensor" one per parameter tensor,
      where query, key and value of an attention are one.
    layer_decay: in (0, 1]; the learning rate of a layer of the backbone is this times that of the next one, the head has
      all of it (`core/layer_decay.py`); 1 is off.
    rules: parameter rules that come before the method's own.
  """

  name: Literal["adamw", "sgd", "lars", "larc"] = "adamw"
  lr: float = 1e-3
  lr_scale: Literal["none", "linear", "sqrt"] = "none"
  schedule: Literal["constant", "cosine", "warmup_cosine", "step", "poly"] = "warmup_cosine"
  warmup: Interval = Interval(0, "steps")
  warmup_inclusive: bool = False
  milestones: tuple[Interval, ...] = ()
  decay_factor: float = 0.1
  poly_power: float = 0.9
  schedule_every: Interval | None = None
  start_lr: float = 0.0
  final_lr: float = 0.0
  stretch: float = 1.0
  schedule_offset: int = 0
  weight_decay: float = 0.0
  weight_decay_final: float | None = None
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  momentum: float = 0.9
  nesterov: bool = False
  lr_in_momentum: bool = False
  trust_coefficient: float = 1e-3
  trust_clip: bool = False
  clip: float = 0.0
  clip_by: Literal["global", "tensor"] = "global"
  accumulate: int = 1
  layer_decay: float = 1.0
  rules: tuple[Rule, ...] = ()

  def __post_init__(self):
    if not 0 < self.layer_decay <= 1:
      raise UserError(f"config.optim.layer_decay={self.layer_decay}: expected a factor in (0, 1]; 1 is off.")
    if self.warmup.value > 0 and self.schedule != "warmup_cosine":
      accepted = f"the schedule {self.schedule!r} has no warm-up; set it to 0steps, or config.optim.schedule=warmup_cosine"
      raise UserError(f"config.optim.warmup={self.warmup}: {accepted}.")
