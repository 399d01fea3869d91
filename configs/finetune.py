"""Fine-tuning: supervised training of all weights that starts from a run, `config.init_from`.

  configs/finetune.py               a run on the embedded sprites, with 10 labeled images per class
  configs/finetune.py:vit_imagenet  ViT-B/16 of MSN, all labels, with layer decay, RandAugment, mixup and cutmix
  configs/finetune.py:swav_1pct     ResNet-50 of SwAV, a fast head on a slow trunk; swav_10pct
  configs/finetune.py:paws_1pct     ResNet-50 of PAWS with the first layer of its head; paws_10pct
  configs/finetune.py:simclr_v2_1pct  ResNet-50 of SimCLR v2 with the first layer of its head; simclr_v2_10pct
  configs/finetune.py:seer_384      RegNetY-128GF of SEER at 384 px, all labels
  configs/finetune.py:seer_1pct     the same with the first layer of its head; seer_10pct
  configs/finetune.py:seer_low_shot 1,000 labeled images of a small data set, squashed

`config.model` is that of the run, and other sizes, patches and channels are adapted; --config.init_from.tree=teacher is
for runs that evaluate their teacher, as MSN and DINO do. Which images are labeled is
`config.data.labels_share`, `labels_per_class` or `labels_file`; the public lists of 1 % and 10 % (SimCLR's) are
tfds:imagenet2012_subset/1pct and /10pct. For a fresh head first: --config.init_from.freeze_backbone=2epochs. The
accuracy of the run's own classifier is evals/classify; it is that of the last epoch, where papers report the best.

Command: python -m big_ssl.main --config=configs/finetune.py --config.init_from.path=runs/msn --config.init_from.tree=teacher
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  swav, paws, simclr = (swav_1pct, swav_10pct), (paws_1pct, paws_10pct), (simclr_v2_1pct, simclr_v2_10pct)
  seer = (seer_384, seer_1pct, seer_10pct, seer_low_shot)
  return common.pick("finetune", recipe, sprites, vit_imagenet, *swav, *paws, *simclr, *seer)


def sprites() -> dict:
  """A run of configs/msn.py, dino.py or another one with the same ViT; own choice of recipe.

  Without config.init_from.path it trains from scratch on the same few images, which is the yardstick. Held-out top-1 from
  the teacher of the embedded MSN run, seed 0: 60.1 (57.0 to 63.0), from scratch 39.5 (36.5 to 42.5), and a logistic
  regression on the frozen features of the same 100 images 55.8. With other images (labels_seed=1) 61.4 and 43.1.
  """
  run = common.sprites_run(total="200steps")
  return run | dict(
    batch_size=50,
    data=run["data"] | dict(labels_per_class=10),
    method=dict(name="supervised", size=32, scale=(0.3, 1.0), label_smoothing=0.1, mixup=0.2, eval_fraction=1.0),
    model=common.sprites_vit(drop_path=0.1),
    optim=dict(name="adamw", lr=1e-3, warmup="20steps", weight_decay=0.05, layer_decay=0.75, clip=1.0, rules=_NO_DECAY_OF_EMBEDDINGS),
    evals=dict(classify=dict(every="100steps")),
  )


# As released by MAE (arXiv 2111.06377): positions and CLS are not decayed, nor what the method's own rules leave out.
_NO_DECAY_OF_EMBEDDINGS = (dict(pattern=r"(bias|scale|pos_embed|cls_token)$", weight_decay=0.0),)


def vit_imagenet() -> dict:
  """ViT-B/16 from a run of configs/msn.py:imagenet_b16, 100 epochs, batch 1024: 83.4 (MSN, arXiv 2204.07141, Table 4).

  The recipe of BEiT and MAE, from which the decay of the weights is (0.05). With it or DeiT's, DINO ViT-S/16 reaches 81.5
  and B/16 82.8 (arXiv 2104.14294, Table 6), MoCo v3 81.4 and 83.2 (its README); these want other rates.

  Command: python -m big_ssl.main --config=configs/finetune.py:vit_imagenet --config.init_from.path=runs/msn-imagenet_b16
  """
  return _imagenet("100epochs", batch_size=1024, start="runs/msn-imagenet_b16", tree="teacher") | dict(
    method=dict(
      name="supervised",
      interpolation="bicubic",
      rand_augment=dict(layers=2, magnitude=9.0, std=0.5),
      label_smoothing=0.1,
      mixup=0.8,
      cutmix=1.0,
    ),
    model=dict(name="vit", variant="B", patch=16, image_size=224, pos_rule="msn", drop_path=0.2),
    optim=dict(
      name="adamw",
      lr=2e-3,
      final_lr=1e-6,
      warmup="5epochs",
      weight_decay=0.05,
      layer_decay=0.65,
      rules=_NO_DECAY_OF_EMBEDDINGS,
    ),
  )


def swav_1pct() -> dict:
  """ResNet-50 from 800 epochs of configs/swav.py:imagenet, 1 % of the labels: 53.9 (arXiv 2006.09882, released code).

  20 epochs of batch 256: lr .02 for the trunk and 5 for the classifier, a fifth at epochs 12 and 16, no decay.

  Command: python -m big_ssl.main --config=configs/finetune.py:swav_1pct --data_dir=DIR_OF_TFDS
    --config.init_from.path=runs/swav-imagenet
  """
  return _swav("1pct", trunk_lr=0.02, head_lr=5.0)


def swav_10pct() -> dict:
  """The same with 10 % of the labels, lr .01 and .2: 70.2."""
  return _swav("10pct", trunk_lr=0.01, head_lr=0.2)


def _swav(part: str, *, trunk_lr: float, head_lr: float) -> dict:
  steps = dict(schedule="step", milestones=("12epochs", "16epochs"), decay_factor=0.2)
  return _imagenet("20epochs", batch_size=256, start="runs/swav-imagenet", part=part) | dict(
    method=dict(name="supervised", std=(0.228, 0.224, 0.225)),  # as released, also in evaluation
    model=dict(name="resnet", depth=50),
    optim=dict(name="sgd", lr=trunk_lr, **steps, rules=(dict(pattern=r"encoder/head/", lr_mult=head_lr / trunk_lr),)),
  )


def paws_1pct() -> dict:
  """From 300 epochs of configs/paws.py:imagenet_1pct, on the labels of that run: 66.5; see `paws_10pct`.

  100 and 200 epochs of pretraining: 63.8 and 66.1 (official README).
  """
  return _paws("imagenet_1pct", labels_per_class=13)


def paws_10pct() -> dict:
  """ResNet-50 from 300 epochs of configs/paws.py:imagenet, on the labels of that run: 75.5 (arXiv 2104.13963, released code).

  100 and 200 epochs of pretraining: 73.9 and 75.0. The trunk and the first layer of the projection head go on, below a
  classifier that starts at 0; every weight is trained for 50 epochs of batch 1024 with Nesterov SGD, lr .02 inside the
  velocity, no decay. The released code reports the best epoch on 12,000 held-out training images. For the public list:
  --config.data.labels_file=LIST --config.data.labels_per_class=0

  Command: python -m big_ssl.main --config=configs/finetune.py:paws_10pct --data=IMAGENET_FOLDER
    --config.init_from.path=runs/paws-imagenet
  """
  return _paws("imagenet", labels_per_class=128)


def _paws(recipe: str, *, labels_per_class: int) -> dict:
  run = _imagenet("50epochs", batch_size=1024, start=f"runs/paws-{recipe}")
  return run | dict(
    data=run["data"] | dict(labels_per_class=labels_per_class),
    method=dict(name="supervised", hidden_layers=1, zero_init=True),
    model=dict(name="resnet", depth=50),
    optim=dict(name="sgd", lr=0.02, schedule="cosine", momentum=0.9, nesterov=True, lr_in_momentum=True),
  )


def simclr_v2_1pct() -> dict:
  """ResNet-50 from configs/simclr.py:imagenet_v2 with the first layer of its head, 1 % of the labels: 57.9 (arXiv 2006.10029).

  Crops and flips only, LARS with lr .005 * sqrt(batch), batch 1024, 60 epochs, no decay (official README); no warm-up is
  remembered. For selective kernels the fields of config.model of that run.

  Command: python -m big_ssl.main --config=configs/finetune.py:simclr_v2_1pct --data_dir=DIR_OF_TFDS
    --config.init_from.path=runs/simclr-imagenet_v2
  """
  return _simclr_v2("60epochs", part="1pct")


def simclr_v2_10pct() -> dict:
  """The same with 10 % of the labels: 68.4. (mem): the 30 epochs are remembered."""
  return _simclr_v2("30epochs", part="10pct")


def _simclr_v2(total: str, *, part: str) -> dict:
  return _imagenet(total, batch_size=1024, start="runs/simclr-imagenet_v2", part=part) | dict(
    method=dict(name="supervised", hidden_layers=1, zero_init=True, mean=(), std=()),
    model=dict(name="resnet", depth=50, zero_init_gamma=True),
    optim=dict(name="lars", lr=0.005, lr_scale="sqrt", schedule="cosine", momentum=0.9, lr_in_momentum=True),
  )


def seer_384() -> dict:
  """RegNetY-128GF at 384 px, all labels: 84.5 (official README; 32, 64, 256GF and 10B: 83.4, 84.0, 85.2, 85.8).

  Views of SwAV's color distortion and blur, bicubic; Nesterov SGD, lr .1 * batch / 256, a tenth at epochs 30, 60, 90 and
  100 of 105, no decay. The released weights are of about epoch 40 (inferred from their names). The same recipe fine-tunes
  on iNaturalist-18, Places-205 and smaller sets: --data=FOLDER. Own choice: batch 256.

  Command: python -m big_ssl.main --config=configs/finetune.py:seer_384 --config.init_from.path=runs/seer
    after python -m big_ssl.weights import FILE --to=runs/seer
  """
  views = dict(interpolation="bicubic", color_strength=1.0, grayscale=0.2, blur=0.5)
  return _imagenet("105epochs", batch_size=256, start="runs/seer") | dict(
    method=dict(name="supervised", size=384, eval_fraction=1.0, **views),
    model=_REGNET_128GF | dict(remat="full"),
    optim=_seer_sgd(lr=0.1, at=(30, 60, 90, 100)),
  )


_REGNET_128GF = dict(name="regnet", variant="128gf")


def _seer_sgd(*, lr: float, at: tuple[int, ...], **more) -> dict:
  """Nesterov SGD with lr per 256 images, a tenth at each of these epochs."""
  steps = dict(schedule="step", milestones=tuple(f"{n}epochs" for n in at), decay_factor=0.1)
  return dict(name="sgd", lr=lr, lr_scale="linear", nesterov=True, **steps) | more


def seer_1pct() -> dict:
  """RegNetY-128GF of SEER with the first layer of its head, 1 % of the labels: 57.5 (256GF 60.5; public leaderboards).

  Linear to 8192, BN, ReLU, then a new classifier; lr .05 * batch / 256, a tenth at epoch 30 of 70, no decay (released
  configs). Own choice: batch 256.

  Command: python -m big_ssl.main --config=configs/finetune.py:seer_1pct --data_dir=DIR_OF_TFDS
    --config.init_from.path=runs/seer
  """
  return _imagenet("70epochs", batch_size=256, start="runs/seer", part="1pct") | dict(
    method=dict(name="supervised", hidden_layers=1, hidden_dim=8192),
    model=_REGNET_128GF,
    optim=_seer_sgd(lr=0.05, at=(30,)),
  )


def seer_10pct() -> dict:
  """The same with 10 % of the labels: 76.7 (256GF 77.9)."""
  return seer_1pct() | dict(data=dict(source="tfds:imagenet2012_subset/10pct"))


def seer_low_shot() -> dict:
  """1,000 labeled images, classes alike, of the SEER suite's low-shot tasks (arXiv 2202.08360); here CIFAR-100, 10 per class.

  Whole images squashed to 224 px; lr .1 * batch / 256, a tenth at epochs 30 and 60 of 90, decay 5e-4 of weights and
  biases, but not of BN. Other data: --data=FOLDER --config.data.labels_per_class=1000/CLASSES. Own choice: batch 256.

  Command: python -m big_ssl.main --config=configs/finetune.py:seer_low_shot --data_dir=DIR_OF_TFDS
    --config.init_from.path=runs/seer
  """
  only_bn_is_free = (dict(pattern=r"bn\d*/(bias|scale)$", weight_decay=0.0), dict(pattern=r".*"))
  run = _imagenet("90epochs", batch_size=256, start="runs/seer")
  return run | dict(
    data=dict(source="tfds:cifar100", labels_per_class=10),
    method=dict(name="supervised", squash=True),
    model=_REGNET_128GF,
    optim=_seer_sgd(lr=0.1, at=(30, 60), weight_decay=5e-4, rules=only_bn_is_free),
  )


def _imagenet(total: str, *, batch_size: int, start: str, part: str = "", **init_from) -> dict:
  """An ImageNet run from another one, on all labels or SimCLR's part "1pct" or "10pct" of them."""
  run = common.imagenet_run(total=total, batch_size=batch_size)
  return run | dict(
    data=dict(source=f"tfds:imagenet2012_subset/{part}") if part else run["data"],
    init_from=dict(path=start) | init_from,
    evals=dict(classify=dict(every="5epochs")),
  )
