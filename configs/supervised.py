"""Supervised baseline (recipe after arXiv 2205.01580): the yardstick beside the self-supervised methods.

  configs/supervised.py         the embedded sprites, the network of the other embedded runs
  configs/supervised.py:imagenet  ViT-S/16, 90 epochs, batch 1024 (76.5 in the paper with RandAugment and mixup, which are not used here)

Command: python -m big_ssl.main --config=configs/supervised.py
"""

import ml_collections

from big_ssl.core.types import UserError, nearest


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  recipes = {"sprites": sprites, "imagenet": imagenet}
  if recipe not in recipes:
    raise UserError(f"--config=configs/supervised.py:{recipe}: no such recipe.{nearest(recipe, recipes)} Accepted: {', '.join(recipes)}.")
  return ml_collections.ConfigDict(recipes[recipe]())


def sprites() -> dict:
  return dict(
    seed=0,
    batch_size=128,
    total="400steps",
    log_every="20steps",
    method=dict(name="supervised", size=32, scale=(0.3, 1.0), color_strength=0.5, eval_fraction=1.0),
    model=dict(name="vit", variant="custom", width=96, depth=4, heads=3, mlp_dim=384, patch=8, image_size=32),
    data=dict(source="sprites", train_examples=8192, eval_examples=1024, image_size=48),
    optim=dict(name="adamw", lr=1e-3, warmup="40steps", weight_decay=0.1, clip=1.0),
    checkpoint=dict(every="200steps", keep_last=2),
    evals=dict(knn=dict(k=20, temperature=0.07, every="200steps", baselines=True)),
  )


def imagenet() -> dict:
  return dict(
    seed=0,
    batch_size=1024,
    total="90epochs",
    log_every="100steps",
    method=dict(name="supervised", scale=(0.05, 1.0)),
    model=dict(name="vit", variant="S", patch=16, image_size=224),
    data=dict(source="tfds:imagenet2012"),
    optim=dict(name="adamw", lr=1e-3, warmup="10000steps", weight_decay=0.1, clip=1.0),
    checkpoint=dict(every="1epochs", keep_last=3),
    evals=dict(knn=dict(k=20, temperature=0.07, every="10epochs")),
  )
