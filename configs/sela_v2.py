"""SeLa-v2 (arXiv 2006.09882, appendix D; no code was released).

  configs/sela_v2.py                 the embedded sprites, a small ViT: minutes on two CPU cores
  configs/sela_v2.py:cifar10         ResNet-18, 200 epochs, batch 512
  configs/sela_v2.py:imagenet        ResNet-50, 2x160 + 4x96, 400 epochs, batch 4096: 71.8 linear
  configs/sela_v2.py:imagenet_2x224  two crops, 400 epochs: 67.2 linear

The embedded run, seed 0: k-NN 71.1 against 30.0, at least 30 points above its random initialization.
"""

import ml_collections

from configs import common, swav


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("sela_v2", recipe, sprites, cifar10, imagenet, imagenet_2x224)


def sprites() -> dict:
  """Embedded data; AdamW as usual for ViTs; labels anew every epoch of 64 updates."""
  return common.sprites_run() | dict(
    method=dict(name="sela_v2", num_prototypes=(128, 128, 128), freeze_prototypes="1epochs", **swav.sprites_crops(small=4)),
    model=common.sprites_vit(),
    optim=dict(name="adamw", lr=1e-3, warmup="50steps", weight_decay=0.05, clip=3.0),
  )


def cifar10() -> dict:
  """ResNet-18 with the CIFAR stem, three heads of 512, the crops and the optimizer of SwAV's CIFAR-10 recipe (own choice).

  Command: python -m big_ssl.main --config=configs/sela_v2.py:cifar10 --data_dir=DIR_OF_TFDS
  """
  return common.cifar10_run() | dict(
    method=dict(name="sela_v2", num_prototypes=(512, 512, 512), freeze_prototypes="1epochs", **swav.cifar10_crops(small=0)),
    model=common.resnet18_cifar(),
    optim=dict(name="adamw", lr=4e-3, schedule="cosine"),
  )


def imagenet() -> dict:
  """ResNet-50, 2x160 + 4x96 with large scale (.08, 1), 400 epochs, 71.8 linear. 64 V100 as SwAV, besides one assignment phase per epoch.

  The scores of a head are 1.28 million x 3,000 numbers, 15 GB over all devices, and the transport works with three more such arrays.

  Command: python -m big_ssl.main --config=configs/sela_v2.py:imagenet --data=IMAGENET_FOLDER
  """
  return common.imagenet_run(total="400epochs", batch_size=4096) | dict(
    method=dict(name="sela_v2", large_size=160, small_crops=4, large_scale=(0.08, 1.0)),
    model=dict(name="resnet", depth=50),
    optim=swav.larc(lr=4.8, start_lr=0.3, warmup="10epochs"),
  )


def imagenet_2x224() -> dict:
  """ResNet-50, two crops of 224 with scale (.08, 1), 400 epochs: 67.2 linear."""
  return common.imagenet_run(total="400epochs", batch_size=4096) | dict(
    method=dict(name="sela_v2", small_crops=0, large_scale=(0.08, 1.0)),
    model=dict(name="resnet", depth=50),
    optim=swav.larc(lr=4.8, start_lr=0.3, warmup="10epochs"),
  )
