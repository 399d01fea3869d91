"""Semantic segmentation from masks: Segmenter (arXiv 2105.05633) and the frozen linear protocol of DINOv3 (public code).

  configs/segmentation.py            the embedded sprites: object or background, linear decoder, minutes
  configs/segmentation.py:sprites_mask  the same with Segmenter's mask transformer
  configs/segmentation.py:camvid     road scenes of 240x180, linear decoder as LOCA's evaluation; --data=FOLDER
  configs/segmentation.py:ade20k_linear  frozen ViT-B/16, linear probe, 40,000 steps (DINOv3 ViT-B/16 51.8 mIoU, iBOT's 38.3)
  configs/segmentation.py:ade20k_mask    Segmenter, ViT-B/16 and mask decoder, 64 epochs (48.7 single-scale from DeiT)
  configs/segmentation.py:cityscapes     Segmenter, ViT-L/16 and mask decoder, 216 epochs (79.1 from AugReg)

A backbone comes by --config.init_from.path=WORKDIR; without one it starts at random. Folders hold images and masks as
train/images/a.jpg and train/labels/a.png. Every recipe scores the trained decoder on the held-out masks, and normalizes as
the backbone named here; for another one give its config.method.mean and std.

Command: python -m big_ssl.main --config=configs/segmentation.py
  python -m big_ssl.main --config=configs/segmentation.py:ade20k_mask --data=FOLDER --config.init_from.path=WORKDIR
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("segmentation", recipe, sprites, sprites_mask, camvid, ade20k_linear, ade20k_mask, cityscapes)


def sprites() -> dict:
  return common.sprites_run(total="300steps") | dict(
    method=dict(
      name="segmentation", classes=2, decoder="linear", size=32, short_side=40, scale=(0.7, 1.5), distortion=0.5
    ),
    model=common.sprites_vit(),
    optim=dict(name="adamw", lr=1e-3, warmup="30steps", weight_decay=0.05, clip=1.0),
    evals=dict(
      segmentation=dict(head="trained", window=32, stride=16, max_images=256, baselines=True),
      knn=dict(k=20, temperature=0.07),
    ),
  )


def sprites_mask() -> dict:
  run = sprites()
  return run | dict(method=run["method"] | dict(decoder="mask"))


def camvid() -> dict:
  """11 classes, label 11 is ignored; own choice of length, AdamW as the images are few."""
  evaluation = dict(window=160, stride=80, ignore=11, num_classes=11)
  return _run(total="100epochs", batch_size=16) | dict(
    method=dict(
      name="segmentation", classes=11, ignore=11, decoder="linear", size=160, short_side=180, scale=(0.7, 1.5)
    ),
    model=dict(name="vit", variant="S", patch=8, image_size=160, drop_path=0.1),
    optim=dict(name="adamw", lr=3e-4, warmup="2epochs", weight_decay=0.05, clip=1.0),
    evals=dict(segmentation=dict(head="trained", every="20epochs", **evaluation)),
  )


def ade20k_linear() -> dict:
  """DINOv3's: AdamW 1e-3 (of 1e-4, 3e-4, 1e-3, 3e-3 the best is taken), decay 1e-3 on every weight, warm-up of 1,500 steps."""
  return _ade20k(total="40000steps", batch_size=16, stride=341) | dict(
    method=dict(name="segmentation", classes=150, drop_first=True, decoder="probe", frozen=True),
    model=dict(name="vit", variant="B", patch=16, image_size=224),
    optim=dict(
      name="adamw",
      lr=1e-3,
      warmup="1500steps",
      start_lr=1e-9,
      weight_decay=1e-3,
      rules=[dict(pattern="^encoder/head/")],
    ),
  )


def ade20k_mask() -> dict:
  """Segmenter's: SGD at one rate for encoder and decoder, poly to 1e-5, stochastic depth 0.1."""
  return _ade20k(total="64epochs", batch_size=8, stride=512) | dict(
    method=dict(name="segmentation", classes=150, drop_first=True, decoder="mask"),
    model=dict(name="vit", variant="B", patch=16, image_size=512, drop_path=0.1, pos_rule="bilinear"),
    optim=_segmenter_sgd(lr=1e-3),
  )


def cityscapes() -> dict:
  """Segmenter's: crops of 768 of images with a shorter side of 1,024, 19 classes; pixels from -1 to 1, as AugReg's."""
  half = (0.5, 0.5, 0.5)
  return _run(total="216epochs", batch_size=8) | dict(
    method=dict(name="segmentation", classes=19, decoder="mask", size=768, short_side=1024, mean=half, std=half),
    model=dict(name="vit", variant="L", patch=16, image_size=768, drop_path=0.1, pos_rule="bilinear"),
    optim=_segmenter_sgd(lr=1e-2),
    evals=dict(segmentation=dict(head="trained", size=1024, window=768, stride=512, num_classes=19, batch_size=8)),
  )


def _run(*, total: str, batch_size: int) -> dict:
  checkpoint = dict(every="10epochs", keep_last=2)
  return dict(seed=0, batch_size=batch_size, total=total, log_every="50steps", checkpoint=checkpoint)


def _ade20k(*, total: str, batch_size: int, stride: int) -> dict:
  evaluation = dict(head="trained", size=512, window=512, stride=stride, drop_first=True, num_classes=150, batch_size=8)
  return _run(total=total, batch_size=batch_size) | dict(evals=dict(segmentation=evaluation))


def _segmenter_sgd(*, lr: float) -> dict:
  return dict(name="sgd", lr=lr, schedule="poly", poly_power=0.9, final_lr=1e-5, momentum=0.9, weight_decay=0.0)
