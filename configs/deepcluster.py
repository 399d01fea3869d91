"""DeepCluster (arXiv 1807.05520, code facebookresearch/deepcluster).

  configs/deepcluster.py                  the embedded sprites, a small ResNet: minutes on two CPU cores, the real method
  configs/deepcluster.py:cifar10          ResNet-18 on CIFAR-10; own choice of sizes, none are published
  configs/deepcluster.py:imagenet         AlexNet on Sobel gradients, the released recipe
  configs/deepcluster.py:imagenet_vgg16   VGG-16 on Sobel gradients
  configs/deepcluster.py:imagenet_pic     AlexNet, power iteration clustering instead of k-means

Published for AlexNet (README of the code): VOC07 classification, fc6-8 trained, 72.0 mAP, or 70.4 with frozen BN scales;
the best layer's linear ImageNet accuracy is 37.88 (VISSL's model zoo, single crop).

The embedded run: k-NN 75.8 (seed 0) and 69.5 (seed 1) against 38.8, at least 25 points above its random initialization.

Command: python -m big_ssl.main --config=configs/deepcluster.py:RECIPE --data=IMAGENET_FOLDER
"""

import ml_collections

from configs import common


def get_config(recipe: str = "sprites") -> ml_collections.ConfigDict:
  return common.pick("deepcluster", recipe, sprites, cifar10, imagenet, imagenet_vgg16, imagenet_pic)


def sprites() -> dict:
  """The default: embedded data, a small ResNet on Sobel gradients, 256 clusters of 8,192 images after a PCA to 48 dimensions.

  As published the method sees no color; on the ViT of the other embedded runs it clusters colors and learns nothing else.
  AdamW, sizes: own choices.
  """
  method = dict(name="deepcluster", num_clusters=256, pca_dim=48, relu=False, size=32, scale=(0.2, 1.0), eval_fraction=1.0)
  model = common.resnet18_cifar(stem_width=16, blocks=(1, 1, 1, 1), sobel=True)
  optim = dict(name="adamw", lr=1e-3, warmup="50steps", weight_decay=0.05, clip=3.0)
  return common.sprites_run() | dict(method=method, model=model, optim=optim)


def cifar10() -> dict:
  """ResNet-18, 200 epochs, batch 256, 1000 clusters (as many as classes give features near chance), PCA to 64 dimensions.

  Command: python -m big_ssl.main --config=configs/deepcluster.py:cifar10 --data_dir=DIR_OF_TFDS
  """
  method = dict(
    name="deepcluster",
    num_clusters=1000,
    pca_dim=64,
    size=32,
    scale=(0.2, 1.0),
    mean=common.CIFAR10_MEAN,
    std=common.CIFAR10_STD,
    eval_fraction=1.0,
  )
  return common.cifar10_run(batch_size=256) | dict(method=method, model=common.resnet18_cifar(), optim=_sgd())


def imagenet() -> dict:
  """AlexNet on Sobel gradients, 10,000 clusters, 500 epochs, batch 256, learning rate .05 throughout: VOC07 72.0 mAP (fc6-8).

  About 12 days on one P100, a third of it k-means (from memory of the paper). A clustering holds 21 GB of features in
  host memory.
  """
  return _imagenet(model=dict(name="alexnet", sobel=True))


def imagenet_vgg16() -> dict:
  """VGG-16 with BN on Sobel gradients, otherwise as AlexNet; VOC07 detection 65.9 (from memory of the paper).

  So is the optimizer. How many epochs it took is not known.
  """
  return _imagenet(model=dict(name="vgg", sobel=True))


def imagenet_pic() -> dict:
  """AlexNet with power iteration clustering on the graph of 5 nearest neighbors, 200 iterations.

  Results are a little below k-means (from memory of the paper). The number of clusters differs every time; the classifier
  has room for 100,000 (own choice).
  """
  return _imagenet(model=dict(name="alexnet", sobel=True), clustering="pic", num_clusters=100_000, iterations=200)


def _imagenet(*, model: dict, **method) -> dict:
  method = dict(name="deepcluster", num_clusters=10000, pca_dim=256) | method
  return common.imagenet_run(total="500epochs", batch_size=256) | dict(method=method, model=model, optim=_sgd())


def _sgd() -> dict:
  """Momentum .9, constant .05, decay 1e-5 on everything; the classifier is without momentum, by the method's rules."""
  return dict(name="sgd", lr=0.05, schedule="constant", momentum=0.9, weight_decay=1e-5)
