"""SimCLR (arXiv 2002.05709).

  configs/simclr.py             the embedded sprites, a small ViT: minutes on two CPU cores
  configs/simclr.py:imagenet    ResNet-50, 100 epochs, batch 4096, LARS: 64.5 linear (official README; 69.1 after 1000 epochs)

Command: python -m big_ssl.main --config=configs/simclr.py
"""

import ml_collections

from big_ssl.core.types import UserError, nearest


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  recipes = {"sprites": sprites, "imagenet": imagenet}
  if recipe not in recipes:
    raise UserError(f"--config=configs/simclr.py:{recipe}: no such recipe.{nearest(recipe, recipes)} Accepted: {', '.join(recipes)}.")
  return ml_collections.ConfigDict(recipes[recipe]())


def sprites() -> dict:
  """Embedded data; AdamW as usual for ViTs, color strength and temperature of the CIFAR-10 recipe."""
  return dict(
    seed=0,
    batch_size=128,
    total="700steps",
    log_every="20steps",
    method=dict(
      name="simclr", temperature=0.2, hidden_dim=256, output_dim=64, size=32, scale=(0.2, 1.0), color_strength=0.5, eval_fraction=1.0
    ),
    model=dict(name="vit", variant="custom", width=96, depth=4, heads=3, mlp_dim=384, patch=8, image_size=32),
    data=dict(source="sprites", train_examples=8192, eval_examples=1024, image_size=48),
    optim=dict(name="adamw", lr=1e-3, warmup="50steps", weight_decay=0.05, clip=3.0),
    checkpoint=dict(every="200steps", keep_last=2),
    evals=dict(knn=dict(k=20, temperature=0.07, every="350steps", baselines=True)),
  )


def imagenet() -> dict:
  """ResNet-50 with global BN statistics, LARS with lr 0.3 * batch / 256, 10 epochs of warm-up, weight decay 1e-4 on weights only."""
  return dict(
    seed=0,
    batch_size=4096,
    total="100epochs",
    log_every="50steps",
    method=dict(name="simclr", temperature=0.1, hidden_dim=2048, output_dim=128, head_layers=2, loss_scale=2.0),
    model=dict(name="resnet", depth=50, zero_init_gamma=True),
    data=dict(source="tfds:imagenet2012"),
    optim=dict(name="lars", lr=0.3, lr_scale="linear", warmup="10epochs", weight_decay=1e-4, momentum=0.9, lr_in_momentum=True),
    checkpoint=dict(every="1epochs", keep_last=3),
    evals=dict(knn=dict(k=20, temperature=0.07, every="10epochs")),
  )
