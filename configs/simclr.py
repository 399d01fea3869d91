"""SimCLR (arXiv 2002.05709).

  configs/simclr.py             the embedded sprites, a small ViT: minutes on two CPU cores
  configs/simclr.py:cifar10     ResNet-18, 200 epochs, batch 512
  configs/simclr.py:imagenet    ResNet-50, 100 epochs, batch 4096, LARS: 64.5 linear (official README; 69.1 after 1000 epochs)
  configs/simclr.py:imagenet_v2               SimCLR v2 (arXiv 2006.10029): 800 epochs, a head of three layers: 71.7 linear
  configs/simclr.py:imagenet_v2_r152x3_sk     the largest, ResNet-152 of thrice the width with selective kernels: 79.8 linear

Fine-tuning of v2 from the first layer of the head: configs/finetune.py:simclr_v2_1pct.

Command: python -m big_ssl.main --config=configs/simclr.py

The embedded run, seed 0: k-NN 69.9 against 28.0, at least 30 points above its random initialization.
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("simclr", recipe, sprites, cifar10, imagenet, imagenet_v2, imagenet_v2_r152x3_sk)


def sprites() -> dict:
  """Embedded data; AdamW as usual for ViTs, color strength and temperature of the CIFAR-10 recipe."""
  return common.sprites_run() | dict(
    method=dict(
      name="simclr", temperature=0.2, hidden_dim=256, output_dim=64, size=32, scale=(0.2, 1.0), color_strength=0.5, eval_fraction=1.0
    ),
    model=common.sprites_vit(),
    optim=dict(name="adamw", lr=1e-3, warmup="50steps", weight_decay=0.05, clip=3.0),
  )


def cifar10() -> dict:
  """ResNet-18 with the CIFAR stem, batch 512, tau 0.5, color strength 0.5, no blur, LARS with lr 1 and decay 1e-4.

  The official README's recipe, which takes 1000 epochs to about 91 % linear; its learning rate is per 256 images. Here 200
  epochs, as in lightly's public table, where their SimCLR has 84.8 % k-NN (k=200, T=0.1), and as there gammas of 1 and a
  head of two layers.

  Command: python -m big_ssl.main --config=configs/simclr.py:cifar10 --data_dir=DIR_OF_TFDS
  """
  return common.cifar10_run() | dict(
    method=dict(
      name="simclr",
      temperature=0.5,
      hidden_dim=512,
      output_dim=128,
      size=32,
      color_strength=0.5,
      blur=0.0,
      eval_fraction=1.0,
    ),
    model=common.resnet18_cifar(),
    optim=dict(name="lars", lr=1.0, lr_scale="linear", warmup="10epochs", weight_decay=1e-4, lr_in_momentum=True),
  )


def imagenet() -> dict:
  """ResNet-50 with global BN statistics, LARS with lr 0.3 * batch / 256, 10 epochs of warm-up, weight decay 1e-4 on weights only.

  64.5 linear; 100 epochs take about 6 hours on 32 TPU v3 (official README). The decay is the code's, the paper's is 1e-6.

  Command: python -m big_ssl.main --config=configs/simclr.py:imagenet --data=IMAGENET_FOLDER
  """
  return common.imagenet_run(total="100epochs", batch_size=4096) | dict(
    method=dict(name="simclr", temperature=0.1, hidden_dim=2048, output_dim=128, head_layers=2, loss_scale=2.0),
    model=dict(name="resnet", depth=50, zero_init_gamma=True),
    optim=dict(name="lars", lr=0.3, lr_scale="linear", warmup="10epochs", weight_decay=1e-4, momentum=0.9, lr_in_momentum=True),
  )


def imagenet_v2() -> dict:
  """ResNet-50, 800 epochs of batch 4096, LARS with lr 0.1 * sqrt(batch), 5 % of the steps are warm-up, weight decay 1e-4.

  71.7 linear, and fine-tuned on 1 %, 10 % and all labels 57.9, 68.4 and 76.3 (official README). These took keys of a momentum
  encoder, which the public code lacks: 71.1 without (its issue 77), as here.
  """
  return _v2(depth=50)


def imagenet_v2_r152x3_sk() -> dict:
  """ResNet-152 of thrice the width with selective kernels, 795 M parameters: 79.8 linear; 74.9, 80.1 and 83.1 fine-tuned."""
  return _v2(depth=152, width=3, sk_ratio=0.0625, dtype="bfloat16")


def _v2(**model) -> dict:
  width = 2048 * model.get("width", 1)
  return common.imagenet_run(total="800epochs", batch_size=4096) | dict(
    method=dict(name="simclr", temperature=0.1, hidden_dim=width, output_dim=128, head_layers=3, loss_scale=2.0),
    model=dict(name="resnet", zero_init_gamma=True) | model,
    optim=dict(name="lars", lr=0.1, lr_scale="sqrt", warmup="40epochs", weight_decay=1e-4, momentum=0.9, lr_in_momentum=True),
  )
