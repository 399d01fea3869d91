"""SwAV (arXiv 2006.09882, code facebookresearch/swav).

  configs/swav.py                  the embedded sprites, a small ViT: minutes on two CPU cores, multi-crop and queue
  configs/swav.py:cifar10          ResNet-18, 200 epochs, batch 512
  configs/swav.py:imagenet         ResNet-50, 2x224 + 6x96, 800 epochs, batch 4096: 75.3 linear
  configs/swav.py:imagenet_bs256   the same crops, 400 epochs, batch 256 with a queue: 74.3 linear
  configs/swav.py:imagenet_2x224   two crops, 400 epochs, batch 4096: 70.1 linear
  configs/swav.py:imagenet_w4      ResNet-50-w4, 2x224 + 4x96, 400 epochs, batch 2560 with a queue: 77.9 linear

Published (README of the code): 100 / 200 / 400 / 800 epochs of the multi-crop recipe 72.1 / 73.9 / 74.6 / 75.3 linear;
after 800 epochs 65.7 k-NN (arXiv 2104.14294, Table 2).

Command: python -m big_ssl.main --config=configs/swav.py:RECIPE --data=IMAGENET_FOLDER

The embedded run, seed 0: k-NN 73.7 against 30.0, at least 35 points above its random initialization.
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("swav", recipe, sprites, cifar10, imagenet, imagenet_bs256, imagenet_2x224, imagenet_w4)


def sprites() -> dict:
  """Embedded data; AdamW as usual for ViTs. The queue adds 512 rows to the 128 of a batch, for 256 prototypes.

  There are many more prototypes than dimensions: with 64 in 64 dimensions the embeddings find a direction that is
  orthogonal to all of them, where the loss is ln K for good.
  """
  return common.sprites_run() | dict(
    method=dict(
      name="swav",
      num_prototypes=(256,),
      epsilon=0.03,
      freeze_prototypes="1epochs",
      queue_size=512,
      queue_start="2epochs",
      **sprites_crops(small=4),
    ),
    model=common.sprites_vit(),
    optim=dict(name="adamw", lr=1e-3, warmup="50steps", weight_decay=0.05, clip=3.0),
  )


def cifar10() -> dict:
  """ResNet-18 with the CIFAR stem, 512 prototypes, two 32 px crops, no blur, Adam with lr 1e-3 * batch / 128.

  lightly's benchmark recipe: 84.2 % k-NN (k=200, T=0.1) after 200 epochs with batch 512 in their public table.

  Command: python -m big_ssl.main --config=configs/swav.py:cifar10 --data_dir=DIR_OF_TFDS
  """
  return common.cifar10_run() | dict(
    method=dict(name="swav", num_prototypes=(512,), freeze_prototypes="0steps", **cifar10_crops(small=0)),
    model=common.resnet18_cifar(),
    optim=dict(name="adamw", lr=4e-3, schedule="cosine"),
  )


def imagenet() -> dict:
  """ResNet-50, 800 epochs, 75.3 linear: 50 hours on 64 V100 (3 min 40 per epoch); 100 epochs take 6 h 15 to 72.1.

  Batch 4096 as 64 x 64 images. The reference synchronizes BN inside groups of 8 GPUs (the trunk: config.model.bn_groups=8),
  here it is global. It trains in mixed precision, this recipe in float32; --config.model.dtype=bfloat16 comes near to that.

  Command: python -m big_ssl.main --config=configs/swav.py:imagenet --data=IMAGENET_FOLDER
  """
  return common.imagenet_run(total="800epochs", batch_size=4096) | dict(
    method=dict(name="swav"),
    model=dict(name="resnet", depth=50),
    optim=larc(lr=4.8, start_lr=0.3, warmup="10epochs"),
  )


def imagenet_bs256() -> dict:
  """ResNet-50, 400 epochs on 4 V100 (52 min per epoch): 74.3 linear; 72.7 after 200.

  Prototypes frozen for 5,005 updates, one epoch; the queue of 3,840 fills from epoch 15 on.
  """
  return common.imagenet_run(total="400epochs", batch_size=256) | dict(
    method=dict(name="swav", freeze_prototypes="5005steps", queue_size=3840, queue_start="15epochs"),
    model=dict(name="resnet", depth=50),
    optim=larc(lr=0.6),
  )


def imagenet_2x224() -> dict:
  """ResNet-50, two crops of 224 with scale (.08, 1), 400 epochs: 70.1 linear."""
  return common.imagenet_run(total="400epochs", batch_size=4096) | dict(
    method=dict(name="swav", small_crops=0, large_scale=(0.08, 1.0)),
    model=dict(name="resnet", depth=50),
    optim=larc(lr=4.8, start_lr=0.3, warmup="10epochs"),
  )


def imagenet_w4() -> dict:
  """ResNet-50 with four times the channels, 64 V100 of 40 images, 400 epochs: 77.9 linear.

  Twice the channels, batch 4096: 77.3; five times, batch 1536 with a queue of as many and no BN in the head: 78.5.
  """
  method = dict(name="swav", small_crops=4, large_scale=(0.08, 1.0), small_scale=(0.08, 0.14), hidden_dim=8192)
  return common.imagenet_run(total="400epochs", batch_size=2560) | dict(
    method=method | dict(queue_size=2560, queue_start="0epochs"),
    model=dict(name="resnet", depth=50, width=4),
    optim=larc(lr=4.8, start_lr=0.3, warmup="10epochs"),
  )


def sprites_crops(*, small: int) -> dict:
  """Two large crops of 32 px and `small` ones of 16, a small head; color strength .5 and no blur, as in small-image recipes."""
  return dict(
    small_crops=small,
    large_size=32,
    small_size=16,
    large_scale=(0.3, 1.0),
    small_scale=(0.1, 0.3),
    color_strength=0.5,
    blur=0.0,
    hidden_dim=256,
    output_dim=32,
    eval_fraction=1.0,
  )


def cifar10_crops(*, small: int) -> dict:
  """Two crops of 32 px with scale (.14, 1), color strength .5, no blur; `small` ones of 16 px."""
  return dict(
    small_crops=small,
    large_size=32,
    small_size=16,
    color_strength=0.5,
    blur=0.0,
    mean=common.CIFAR10_MEAN,
    std=common.CIFAR10_STD,
    hidden_dim=512,
    output_dim=128,
    eval_fraction=1.0,
  )


def larc(*, lr: float, start_lr: float = 0.0, warmup: str = "0epochs") -> dict:
  """LARC on every tensor around SGD: trust .001, weight decay 1e-6, cosine to lr / 1000."""
  return dict(
    name="larc",
    lr=lr,
    start_lr=start_lr,
    final_lr=lr / 1000,
    warmup=warmup,
    warmup_inclusive=True,
    weight_decay=1e-6,
    trust_coefficient=0.001,
  )
