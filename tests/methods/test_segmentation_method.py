"""Training of dense prediction: masks are cut as the images are, from every kind of source; what counts for nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from big_ssl.core.step import prepare
from big_ssl.core.types import UserError
from big_ssl.data.opening import open_splits
from big_ssl.data.pipeline import Pipeline
from big_ssl.data.source import Arrays
from big_ssl.methods.segmentation import Segmentation
from big_ssl.models.vit import ViT

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
TINY = ViT(variant="custom", width=8, depth=1, heads=2, mlp_dim=16, patch=4, image_size=16)
METHOD = Segmentation(
  model=TINY,
  classes=3,
  decoder="linear",
  size=(16, 20),
  short_side=18,
  scale=(0.5, 2.0),
  distortion=0.0,
  mean=(),
  std=(),
  image_channels=3,
)


def scene(i):
  y, x = np.mgrid[:24, :32]
  wave = np.sin(0.2 * y + i) + np.cos(0.25 * x + 2 * i)
  return np.clip((wave + 2) / 4 * 3, 0, 2).astype(np.uint8)


def folder(root, *, scale=1):
  """A folder of images in the color of their class, with masks; `scale` times as large."""
  for split in ("train", "val"):
    for kind in ("images", "labels"):
      (root / split / kind).mkdir(parents=True)
    for i in range(8):
      mask = np.kron(scene(i), np.ones((scale, scale), np.uint8))
      Image.fromarray(mask).save(root / split / "labels" / f"{i}.png")
      Image.fromarray(COLORS[mask]).save(root / split / "images" / f"{i}.png")
  return open_splits(str(root))["train"]


def arrays():
  masks = np.stack([scene(i) for i in range(8)])
  return Arrays(COLORS[masks], extras={"mask": masks})


def batch_of(source, *, crop="device", canvas=32, method=METHOD):
  pipeline = Pipeline(source, method.inputs(), batch_size=8, seed=3, rows=(0, 8), canvas=canvas, crop=crop)
  raw = pipeline.batch(0)
  assert jax.tree.map(lambda x: (x.shape[1:], x.dtype), raw) == jax.tree.map(
    lambda x: (x.shape[1:], x.dtype), pipeline.spec()
  )
  return jax.jit(functools.partial(prepare, method.inputs()))(raw, pipeline.resident, jax.random.key(0))


def targets(batch, method=METHOD):
  """Classes and whether inside, on the host."""
  return jax.tree.map(np.asarray, jax.jit(method.targets)(batch))


@pytest.mark.parametrize("kind", ["resident", "host", "device", "shrunk"])
def test_masks_are_cut_as_their_images_are_and_outside_is_black_and_ignored(kind, tmp_path):
  source = arrays() if kind == "resident" else folder(tmp_path, scale=3 if kind == "shrunk" else 1)
  batch = batch_of(source, crop="host" if kind == "host" else "device", canvas=48 if kind == "shrunk" else 32)
  labels, inside = targets(batch)
  assert 0.05 < 1 - inside.mean() < 0.9 and batch["crop_flip"].any() and not batch["crop_flip"].all()
  np.testing.assert_array_equal(labels >= 0, inside)
  image = np.asarray(batch["crop"][:, 0])
  assert not image[~inside].any()
  by_color = np.argmax(image, -1)
  pure = inside & (image.max(-1) > 0.95)  # away from the borders of classes
  assert pure.mean() > 0.2 and np.mean(by_color[pure] == labels[pure]) > 0.995


def test_every_source_and_place_of_cutting_gives_the_same_targets(tmp_path):
  source = folder(tmp_path)
  found = [targets(b)[0] for b in (batch_of(arrays()), batch_of(source, crop="host"), batch_of(source, canvas=40))]
  np.testing.assert_array_equal(found[0], found[1])
  np.testing.assert_array_equal(found[0], found[2])


def test_crops_are_scaled_within_their_range_and_keep_the_aspect():
  boxes = np.concatenate(
    [
      np.asarray(batch_of(arrays(), method=dataclasses.replace(METHOD, scale=s))["crop_box"])[:, 0]
      for s in ((0.5, 0.5), (2.0, 2.0))
    ]
  )
  pixels = (boxes[:, 2:] - boxes[:, :2]) * np.array([24, 32])
  np.testing.assert_allclose(pixels[:8], np.tile([16 * 24 / 9, 20 * 24 / 9], (8, 1)), rtol=1e-5)  # 24 px become 9
  np.testing.assert_allclose(pixels[8:], np.tile([16 * 24 / 36, 20 * 24 / 36], (8, 1)), rtol=1e-5)
  assert (boxes[:8, :2] == 0).all() and len(np.unique(boxes[8:, 0])) > 4


def loss_and_grads(method, batch):
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  fn = jax.jit(jax.value_and_grad(lambda p: method.loss(p, extra, batch, jax.random.key(1), jnp.int32(0))[0]))
  return fn(params)


def test_what_is_ignored_has_no_part_in_the_loss():
  batch = batch_of(arrays())
  method = dataclasses.replace(METHOD, ignore=2)
  labels, inside = targets(batch, method)
  assert not np.any(labels == 2) and np.any(inside & (labels == -1))
  dropped, _ = targets(batch, dataclasses.replace(METHOD, drop_first=True, classes=2))
  np.testing.assert_array_equal(dropped, np.maximum(targets(batch)[0] - 1, -1))
  ignored = dict(batch, mask=jnp.full_like(batch["mask"], 255))
  value, grads = loss_and_grads(method, ignored)
  assert value == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("decoder", ["probe", "mask"])
def test_a_frozen_backbone_gets_no_gradient_and_the_decoder_does(decoder):
  method = dataclasses.replace(METHOD, frozen=True, decoder=decoder)
  _, grads = loss_and_grads(method, batch_of(arrays()))
  assert not any(np.any(g) for g in jax.tree.leaves(grads["encoder"]["backbone"]))
  assert any(np.any(g) for g in jax.tree.leaves(grads["encoder"]["head"]))


def test_labels_that_are_no_class_are_a_clear_error(tmp_path):
  method = dataclasses.replace(METHOD, classes=2)
  with pytest.raises(UserError, match="its masks hold the label 2; expected one of 3 labels, 0, 1, 255"):
    batch_of(arrays(), method=method)
  with pytest.raises(UserError, match="the mask of .*png holds the label 2"):
    batch_of(folder(tmp_path), method=method)


def test_a_mask_that_cannot_be_read_counts_for_nothing_and_is_listed(tmp_path):
  source = folder(tmp_path)
  (tmp_path / "train" / "labels" / "3.png").write_bytes(b"no picture")
  batch = batch_of(source)
  row = int(np.flatnonzero(np.asarray(batch["index"]) == 3)[0])
  assert np.all(targets(batch)[0][row] == -1)
  assert [reason.startswith("mask: ") for _, reason in source.problems] == [True], source.problems
