"""MoCo v3 (arXiv 2104.02057, code facebookresearch/moco-v3).

  configs/moco_v3.py                 the embedded sprites, a small ViT: minutes on two CPU cores
  configs/moco_v3.py:cifar10         ResNet-18, 200 epochs
  configs/moco_v3.py:cifar10_vit     ViT-Ti/4, 200 epochs
  configs/moco_v3.py:imagenet        ViT-S/16 (12 heads), 300 epochs: 73.2 linear
  configs/moco_v3.py:imagenet_b16    ViT-B/16, 300 epochs: 76.7 linear, 83.2 fine-tuned
  configs/moco_v3.py:imagenet_conv   ViT-S/16 with a convolutional stem and 11 blocks, nothing frozen
  configs/moco_v3.py:imagenet_r50    ResNet-50, 100 epochs: 68.9 linear (72.8 with 300, 74.6 with 1000)

Published figures are those of the official README. Command: python -m big_ssl.main --config=configs/moco_v3.py

The embedded run, seed 0: k-NN 58.2 against 27.1, at least 20 points above its random initialization.
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("moco_v3", recipe, sprites, cifar10, cifar10_vit, imagenet, imagenet_b16, imagenet_conv, imagenet_r50)


def sprites() -> dict:
  """Embedded data; the ViT recipe with smaller heads, a shorter average and a larger learning rate; own choice of sizes."""
  return common.sprites_run() | dict(
    method=dict(
      name="moco_v3", momentum=0.98, hidden_dim=256, output_dim=64, size=32, scale=(0.2, 1.0), blur=(0.0, 0.0), eval_fraction=1.0
    ),
    model=common.sprites_vit(**_vit()),
    optim=dict(name="adamw", lr=1e-3, warmup="50steps", weight_decay=0.05, clip=3.0),
  )


def cifar10() -> dict:
  """ResNet-18, LARS: base learning rate 0.3 and T 0.2 of solo-learn's recipe (93.1 linear there, 1000 epochs of batch 256).

  Command: python -m big_ssl.main --config=configs/moco_v3.py:cifar10 --data_dir=DIR_OF_TFDS
  """
  method = dict(temperature=0.2, projector_layers=2, predictor_norm=False, freeze_patches=False, decay_all=False, scale=(0.2, 1.0))
  return common.cifar10_run() | dict(
    method=_cifar_views() | method,
    model=common.resnet18_cifar(zero_init_gamma=True),
    optim=dict(name="lars", lr=0.3, lr_scale="linear", warmup="10epochs", weight_decay=1e-6, trust_coefficient=0.02),
  )


def cifar10_vit() -> dict:
  """ViT-Ti/4, the ViT recipe with heads of 1024 and a larger learning rate; own choice of sizes, no public recipe is known.

  Command: python -m big_ssl.main --config=configs/moco_v3.py:cifar10_vit --data_dir=DIR_OF_TFDS
  """
  return common.cifar10_run() | dict(
    method=_cifar_views() | dict(hidden_dim=1024, scale=(0.2, 1.0)),
    model=common.vit_ti4(**_vit()),
    optim=dict(name="adamw", lr=5e-4, lr_scale="linear", warmup="20epochs", weight_decay=0.1),
  )


def imagenet() -> dict:
  """ViT-S/16, 300 epochs, batch 4096: 73.2 linear, 81.4 fine-tuned; 32 V100 in the official commands.

  Command: python -m big_ssl.main --config=configs/moco_v3.py:imagenet --data_dir=DIR_OF_TFDS
  """
  return common.imagenet_run(total="300epochs", batch_size=4096) | dict(
    method=dict(name="moco_v3"),
    model=dict(name="vit", variant="S", heads=12, patch=16, image_size=224, **_vit()),
    optim=dict(name="adamw", lr=1.5e-4, lr_scale="linear", warmup="40epochs", weight_decay=0.1),
  )


def imagenet_b16() -> dict:
  """ViT-B/16: 76.7 linear, 83.2 fine-tuned; 64 V100 in the official commands."""
  return imagenet() | dict(model=dict(name="vit", variant="B", patch=16, image_size=224, **_vit()))


def imagenet_conv() -> dict:
  """ViT-S/16 whose stem is four convolutions of stride 2, with one block less (official vit_conv_small); nothing is frozen."""
  model = dict(name="vit", variant="S", heads=12, depth=11, patch=16, image_size=224, stem_channels=(48, 96, 192, 384), **_vit())
  return imagenet() | dict(method=dict(name="moco_v3", freeze_patches=False), model=model)


def imagenet_r50() -> dict:
  """ResNet-50, 100 epochs, batch 4096, LARS: 68.9 linear; 16 V100 in the official commands.

  300 epochs: optim.lr=0.3. 1000: also optim.weight_decay=1.5e-6, method.momentum=0.996.

  Command: python -m big_ssl.main --config=configs/moco_v3.py:imagenet_r50 --data_dir=DIR_OF_TFDS
  """
  return common.imagenet_run(total="100epochs", batch_size=4096) | dict(
    method=dict(
      name="moco_v3",
      temperature=1.0,
      projector_layers=2,
      predictor_norm=False,
      freeze_patches=False,
      decay_all=False,
      scale=(0.2, 1.0),
    ),
    model=dict(name="resnet", depth=50, zero_init_gamma=True),
    optim=dict(name="lars", lr=0.6, lr_scale="linear", warmup="10epochs", weight_decay=1e-6, trust_coefficient=1e-3),
  )


def _vit() -> dict:
  """The released ViT: Xavier initialization and fixed sine positions."""
  return dict(patch_init="moco_v3", pos_table="sincos")


def _cifar_views() -> dict:
  """32 px without blur."""
  return dict(
    name="moco_v3", size=32, blur=(0.0, 0.0), mean=common.CIFAR10_MEAN, std=common.CIFAR10_STD, eval_fraction=1.0
  )
