"""NaViT (arXiv 2307.06304): classification from packed images of native aspect and sampled resolution.

  configs/navit.py            the embedded sprites, crops of aspect 1:2 to 2:1 and sides of 16 to 48 px
  configs/navit.py:imagenet   NaViT-B/16 on ImageNet-1k, sides of 64 to 256 px; own choice, the paper trains on JFT

The embedded run, seed 0: k-NN 85.4 against 22.2, at least 40 points above its random initialization.

Command: python -m big_ssl.main --config=configs/navit.py
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("navit", recipe, sprites, imagenet)


def sprites() -> dict:
  return common.sprites_run() | dict(
    method=dict(name="navit", tokens=64, shard_size=16, sequences=3, max_images=8, side=(16, 48), size=32, eval_fraction=1.0),
    model=dict(name="navit", variant="custom", width=96, depth=4, heads=3, mlp_dim=384, patch=8, image_size=96),
    optim=dict(name="adamw", lr=1e-3, warmup="40steps", weight_decay=0.1, clip=1.0),
  )


def imagenet() -> dict:
  """Batch 1024, 90 epochs; about 100 tokens per image, half of what 224 px squares take.

  Command: python -m big_ssl.main --config=configs/navit.py:imagenet --data=IMAGENET_FOLDER
  """
  return common.imagenet_run(total="90epochs", batch_size=1024) | dict(
    method=dict(name="navit", tokens=512, shard_size=32, sequences=5, max_images=16, max_grid=24, drop_law="beta", drop_rate=(0.0, 0.5), drop_beta=(2.0, 4.0)),
    model=dict(name="navit", variant="B", patch=16, image_size=512),
    optim=dict(name="adamw", lr=1e-3, warmup="10000steps", weight_decay=0.1, clip=1.0),
  )
