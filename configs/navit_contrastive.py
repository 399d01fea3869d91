"""Contrastive pretraining on packed images of native aspect: NaViT's packing and chunked loss (arXiv 2307.06304).

  configs/navit_contrastive.py            the embedded sprites, two crops of aspect 1:2 to 2:1 and sides of 24 to 48 px
  configs/navit_contrastive.py:imagenet   NaViT-B/16 on ImageNet-1k, sides of 64 to 256 px

Pairs of views in place of the paper's pairs of image and text, and so all sizes, are our own choice; nothing is published.

The embedded run, seed 0: k-NN 67.0 against 22.2, at least 30 points above its random initialization; 4 minutes on one CPU
core. With whole images of 4, 9, 16, 36, 64 and 100 tokens (`evals.token_budgets`, bank of 4,096) 18.4, 46.8, 66.9, 82.7, 89.3
and 91.4.

Command: python -m big_ssl.main --config=configs/navit_contrastive.py
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("navit_contrastive", recipe, sprites, imagenet)


def sprites() -> dict:
  """The network of configs/navit.py; colors and head of configs/simclr.py.

  Sides and temperature matter: from 16 px on, where a crop may be 2x2 patches, and at 0.2, k-NN was 33.8 in a run of 300
  steps, with those here 59.5; method.kind=sigmoid gave 39.9.
  """
  return common.sprites_run() | dict(
    method=dict(
      name="navit_contrastive",
      **dict(tokens=64, shard_size=16, sequences=5, max_images=8, max_grid=8, side=(24, 48), scale=(0.2, 1.0)),
      **dict(temperature=0.1, hidden_dim=256, output_dim=64, color_strength=0.5, size=32, eval_fraction=1.0),
    ),
    model=dict(name="navit", variant="custom", width=96, depth=4, heads=3, mlp_dim=384, patch=8, image_size=96),
    optim=dict(name="adamw", lr=1e-3, warmup="50steps", weight_decay=0.05, clip=3.0),
  )


def imagenet() -> dict:
  """Batch 4096, 100 epochs; two crops of about 100 tokens per image, logits in chunks of 1,024 columns.

  Command: python -m big_ssl.main --config=configs/navit_contrastive.py:imagenet --data=IMAGENET_FOLDER
  """
  return common.imagenet_run(total="100epochs", batch_size=4096) | dict(
    method=dict(
      name="navit_contrastive",
      **dict(tokens=512, shard_size=32, sequences=5, max_images=16, max_grid=24),
      **dict(drop_law="beta", drop_rate=(0.0, 0.5), drop_beta=(2.0, 4.0), scale=(0.08, 1.0)),
      **dict(chunk=1024, color_strength=1.0),
    ),
    model=dict(name="navit", variant="B", patch=16, image_size=512),
    optim=dict(name="adamw", lr=1.5e-4, lr_scale="linear", warmup="40epochs", weight_decay=0.1),
  )
