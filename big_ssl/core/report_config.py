"""What a user may ask of `report.html`; the packages `report` and `visualize` make it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from big_ssl.core.types import UserError

Picture = Literal["views", "attention", "pca", "neighbors", "prototypes", "embedding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
  """What `report.html` shows besides numbers.

  Attributes:
    pictures: drawn at the end of training and by --mode=eval, those that the backbone allows; () draws none.
    images: in each of them.
  """

  pictures: tuple[Picture, ...] = ("views", "attention", "pca", "neighbors", "embedding")
  images: int = 6

  def __post_init__(self):
    if self.images < 1:
      raise UserError(f"config.report.images={self.images}: expected at least 1.")
