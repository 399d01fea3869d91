"""FlexiViT (arXiv 2212.08013): one ViT for all patch sizes, in the dialect of the public code.

Only two things know the patch size: the patch embedding, whose stored kernel is PI-resized (`models/patch_resize.py`), and
the position table, which is resampled to the grid. Both are written down once, at a size of their own, and never resized
in a chain. All of it is `models.vit.ViT`; here are the defaults of the paper.
"""

from __future__ import annotations

from typing import Literal

from big_ssl.models.vit import ViT


class FlexiViT(ViT):
  """ViT-B at 240 px whose training draws one of ten patch sizes per step (section 3.3): 48 to 8, grids of 5 to 30.

  The kernel is stored at 32x32, the table at 7x7 (section 3.4, appendix); CLS has no position.
  """

  variant: str = "B"
  patch: int = 16
  image_size: int | tuple[int, int] = 240
  kernel_patch: int | tuple[int, int] = 32
  pos_grid: int | tuple[int, int] = 7
  patch_sizes: tuple[int, ...] = (48, 40, 30, 24, 20, 16, 15, 12, 10, 8)
  pos_rule: str = "flexivit"
  class_position: bool = False
  gelu: Literal["exact", "tanh"] = "tanh"
  patch_init: Literal["dino", "msn", "dinov2", "loca", "big_vision", "flexivit", "moco_v3"] = "flexivit"
