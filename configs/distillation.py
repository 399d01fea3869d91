"""Distillation of a classifier into a student of any patch size (FlexiViT, arXiv 2212.08013, public code).

  configs/distillation.py   the embedded sprites: a run of configs/supervised.py teaches a student at patches of 4, 8 and 16

The recipe on ImageNet is configs/flexivit.py:imagenet_distill. Both networks start from the run in config.init_from.path:

Command: python -m big_ssl.main --config=configs/supervised.py --workdir=runs/supervised-sprites
  python -m big_ssl.main --config=configs/distillation.py --config.init_from.path=runs/supervised-sprites
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("distillation", recipe, sprites)


def sprites() -> dict:
  """Teacher and student have the network of configs/supervised.py; the teacher keeps its patch of 8."""
  return common.sprites_run() | dict(
    init_from=dict(path="runs/supervised-sprites"),
    method=dict(name="distillation", size=32, teacher_size=32, scale=(0.3, 1.0), eval_fraction=1.0),
    model=common.sprites_vit(patch_sizes=(4, 8, 16), kernel_patch=8, pos_grid=4),
    optim=dict(name="adamw", lr=3e-4, warmup="40steps", weight_decay=0.1, clip=1.0),
  )
