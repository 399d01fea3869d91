"""Supervised baseline (recipe after arXiv 2205.01580): the yardstick beside the self-supervised methods.

  configs/supervised.py         the embedded sprites, the network of the other embedded runs
  configs/supervised.py:imagenet  ViT-S/16, 90 epochs, batch 1024 (76.5 in the paper with RandAugment and mixup, which are not used here)

Command: python -m big_ssl.main --config=configs/supervised.py
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("supervised", recipe, sprites, cifar10, imagenet)


def sprites() -> dict:
  return common.sprites_run(total="400steps") | dict(
    method=dict(name="supervised", size=32, scale=(0.3, 1.0), color_strength=0.5, eval_fraction=1.0),
    model=common.sprites_vit(),
    optim=dict(name="adamw", lr=1e-3, warmup="40steps", weight_decay=0.1, clip=1.0),
  )


def cifar10() -> dict:
  """ResNet-18 with the CIFAR stem; own choice of optimizer, the yardstick of the self-supervised CIFAR-10 recipes."""
  return common.cifar10_run() | dict(
    method=dict(
      name="supervised", size=32, scale=(0.2, 1.0), color_strength=0.5, mean=common.CIFAR10_MEAN, std=common.CIFAR10_STD, eval_fraction=1.0
    ),
    model=common.resnet18_cifar(),
    optim=dict(name="sgd", lr=0.1, lr_scale="linear", warmup="5epochs", weight_decay=5e-4, nesterov=True),
  )


def imagenet() -> dict:
  return common.imagenet_run(total="90epochs", batch_size=1024) | dict(
    method=dict(name="supervised", scale=(0.05, 1.0)),
    model=dict(name="vit", variant="S", patch=16, image_size=224),
    optim=dict(name="adamw", lr=1e-3, warmup="10000steps", weight_decay=0.1, clip=1.0),
  )
