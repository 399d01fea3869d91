"""Masked Siamese Networks (arXiv 2204.07141).

  configs/msn.py            the embedded sprites, a small ViT: minutes on two CPU cores, the real method
"""

import ml_collections


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  recipes = {"sprites": sprites}
  if recipe not in recipes:
    from big_ssl.core.types import UserError, nearest

    raise UserError(f"configs/msn.py:{recipe}: no such recipe.{nearest(recipe, recipes)} Accepted: {', '.join(recipes)}.")
  return ml_collections.ConfigDict(recipes[recipe]())


def sprites() -> dict:
  """The default: embedded data, about five minutes on two CPU cores."""
  return dict(
    seed=0,
    batch_size=128,
    total="700steps",
    log_every="20steps",
    method=dict(
      name="msn",
      num_prototypes=128,
      output_dim=64,
      hidden_dim=256,
      sinkhorn=True,
      memax_weight=1.0,
      rand_size=32,
      focal_size=16,
      focal_views=6,
      patch_drop=0.15,
      eval_fraction=1.0,
    ),
    model=dict(name="vit", variant="custom", width=96, depth=4, heads=3, mlp_dim=384, patch=8, image_size=32, init="msn", pos_rule="msn"),
    data=dict(source="sprites", train_examples=8192, eval_examples=1024, image_size=48),
    optim=dict(
      name="adamw",
      lr=1e-3,
      start_lr=2e-4,
      final_lr=1e-6,
      warmup="50steps",
      stretch=1.25,
      schedule_offset=1,
      weight_decay=0.04,
      weight_decay_final=0.4,
      clip=3.0,
    ),
    checkpoint=dict(every="200steps", keep_last=2),
    evals=dict(knn=dict(k=20, temperature=0.07, every="350steps", baselines=True)),
  )
