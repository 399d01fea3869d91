"""What recipes share: data, backbones, evaluations."""

from collections.abc import Callable

import ml_collections

from big_ssl.core.types import UserError, nearest

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def pick(method: str, recipe: str, *recipes: Callable[[], dict]) -> ml_collections.ConfigDict:
  """The recipe named after the colon of --config=configs/<method>.py:<recipe>; each is offered under its function's name."""
  table = {f.__name__: f for f in recipes}
  if recipe not in table:
    raise UserError(f"--config=configs/{method}.py:{recipe}: no such recipe.{nearest(recipe, table)} Accepted: {', '.join(table)}.")
  return ml_collections.ConfigDict(table[recipe]())


# Images without labels, a folder of one's own, still get a score: do copies of an image find it again?
_UNLABELED = dict(copy_detection=dict(unlabeled=True, baselines=True))


def sprites_run(*, total: str = "700steps") -> dict:
  """Top-level keys of an embedded run: 8,192 images of 48 px, batch 128, k-NN beside random weights and raw pixels."""
  return dict(
    seed=0,
    batch_size=128,
    total=total,
    log_every="50steps",
    data=dict(source="sprites", train_examples=8192, eval_examples=1024, image_size=48),
    checkpoint=dict(every="350steps", keep_last=2),
    evals=dict(knn=dict(k=20, temperature=0.07, every="350steps", baselines=True), linear=dict(), health=dict()) | _UNLABELED,
  )


def sprites_vit(**changes) -> dict:
  """The small ViT of the embedded runs: 32 px in patches of 8, 4 blocks of width 96.

  Xavier initialization: with the usual N(0, 0.02) so narrow a network starts with features that fill 1.4 dimensions, and
  methods without negatives stay there.
  """
  vit = dict(name="vit", variant="custom", width=96, depth=4, heads=3, mlp_dim=384, patch=8, image_size=32, patch_init="moco_v3")
  return vit | changes


def cifar10_run(*, total: str = "200epochs", batch_size: int = 512) -> dict:
  """Top-level keys of a CIFAR-10 run; the data come as `--data_dir=DIR_OF_TFDS`. k=200 and T=0.1 are the public table's."""
  return dict(
    seed=0,
    batch_size=batch_size,
    total=total,
    log_every="50steps",
    data=dict(source="tfds:cifar10"),
    checkpoint=dict(every="10epochs", keep_last=2),
    evals=dict(knn=dict(k=200, temperature=0.1, every="20epochs", baselines=True), linear=dict()),
  )


def resnet18_cifar(**changes) -> dict:
  """ResNet-18 with a 3x3 stem and no max pool."""
  return dict(name="resnet", depth=18, stem="cifar") | changes


def vit_ti4(**changes) -> dict:
  """ViT-Ti with patches of 4 on 32 px."""
  return dict(name="vit", variant="Ti", patch=4, image_size=32) | changes


def randaug_tf() -> dict:
  """big_vision's "randaug(2,10)" (`augment.rand_augment`)."""
  return dict(style="tf", layers=2, magnitude=10.0, std=0.0, p=1.0)


def imagenet_run(*, total: str, batch_size: int) -> dict:
  """Top-level keys of an ImageNet run, k-NN (k=20) every 10 epochs."""
  return dict(
    seed=0,
    batch_size=batch_size,
    total=total,
    log_every="100steps",
    data=dict(source="tfds:imagenet2012"),
    checkpoint=dict(every="1epochs", keep_last=3, keep_every="100epochs"),
    evals=dict(knn=dict(k=20, temperature=0.07, every="10epochs")) | _UNLABELED,
  )
