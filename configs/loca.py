"""LOCA, location-aware self-supervised transformers (arXiv 2212.02400, code google-research/scenic, projects/loca).

  configs/loca.py            the embedded sprites, a small ViT: minutes on two CPU cores, the real method
  configs/loca.py:cifar10    ViT-Ti/4 on CIFAR-10, 100 epochs; own choice of sizes, no public recipe is known
  configs/loca.py:imagenet   ViT-B/16, 100 epochs, the released recipe

Published, ADE20K, fine-tuned with a linear decoder (mIoU): ViT-B/16 46.2 after 100 epochs, 48.0 after the long training.
The location-only variant: --config.method.cluster_loss=false

The embedded run, seed 0: a linear probe of the patches finds the masks of the sprites with mIoU 81.1 against 63.3 (mean colors
35.9), at least 10 points of mIoU above its random initialization. The mean of its patches, which tell where they are, is no
feature of a class: k-NN 17.8 against 34.1.
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("loca", recipe, sprites, cifar10, imagenet)


def sprites() -> dict:
  """Embedded data: 48 px references of 6x6 patches, of which 18 are shown; own choice of sizes.

  Positions are fixed sines: learned ones start at a tenth of what the patches give, and in so short a run nothing but the
  prior of a place is learned then, the tokens fall onto a line and the clusters become uniform. A teacher that follows too fast
  (momentum .98) ends there too.
  """
  run = common.sprites_run()
  return run | dict(
    method=dict(
      name="loca",
      num_prototypes=256,
      output_dim=64,
      hidden_dim=256,
      momentum=0.99,
      reference_size=48,
      query_size=48,
      focal_size=24,
      focal_queries=3,
      reference_seqlen=18,
      query_seqlen=12,
      color_strength=0.5,
      eval_fraction=1.0,
    ),
    model=_vit(common.sprites_vit(image_size=48, drop_path=0.1, pos_table="sincos")),
    optim=_optimizer(lr=2e-3, warmup="100steps"),
    evals=run["evals"] | dict(segmentation=dict(baselines=True, max_images=2048)),
  )


def cifar10() -> dict:
  """CIFAR-10, ViT-Ti/4: 64 positions of which 13 are shown, four 16 px queries, 256 prototypes; own choice, no figure is known.

  Command: python -m big_ssl.main --config=configs/loca.py:cifar10 --data_dir=DIR_OF_TFDS
  """
  return common.cifar10_run(total="100epochs", batch_size=256) | dict(
    method=dict(
      name="loca",
      num_prototypes=256,
      output_dim=64,
      hidden_dim=256,
      reference_size=32,
      query_size=32,
      focal_size=16,
      focal_queries=4,
      reference_seqlen=13,
      query_seqlen=24,
      mean=common.CIFAR10_MEAN,
      std=common.CIFAR10_STD,
      eval_fraction=1.0,
    ),
    model=_vit(common.vit_ti4(drop_path=0.1)),
    optim=_optimizer(lr=5e-4, warmup="15epochs"),
  )


def imagenet() -> dict:
  """ViT-B/16, 100 epochs, batch 1024, float32: 46.2 mIoU on ADE20K, fine-tuned with a linear decoder (official README).

  The learning rate is 1e-3 * batch / 1024. Hours and hardware are not published. An image costs about 590 tokens a step. On
  8 devices the released code divides by the valid patches of each device: --config.method.loss_groups=8

  Command: python -m big_ssl.main --config=configs/loca.py:imagenet --data=IMAGENET_FOLDER
  """
  return common.imagenet_run(total="100epochs", batch_size=1024) | dict(
    method=dict(name="loca"),
    model=_vit(dict(name="vit", variant="B", patch=16, image_size=224, drop_path=0.1)),
    optim=_optimizer(lr=2.5e-4, warmup="15epochs") | dict(lr_scale="linear"),
  )


def _vit(model: dict) -> dict:
  """The dialect of scenic: no class token, tanh GELU, xavier, positions resampled linearly with antialiasing."""
  return model | dict(class_token=False, gelu="tanh", patch_init="loca", pos_rule="linear")


def _optimizer(*, lr: float, warmup: str) -> dict:
  """AdamW, decay 0.1, clipping at 1, cosine down to 1 % of the peak."""
  return dict(name="adamw", lr=lr, final_lr=0.01 * lr, warmup=warmup, weight_decay=0.1, clip=1.0)
