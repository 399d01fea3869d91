"""The embedded world: pure, with exact ground truth, and with classes that neither pixels nor colors give away."""

import numpy as np
import pytest

from big_ssl.data import sprites


@pytest.fixture(scope="module")
def world():
  return sprites.render(np.arange(2048), seed=0)


@pytest.fixture(scope="module")
def held_out():
  return sprites.render(np.arange(512), seed=0, split="eval")


def knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, answers: np.ndarray) -> float:
  """Accuracy of weighted cosine k-NN, k=20, T=0.07."""
  train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
  similarity = test @ train.T
  nearest = np.argpartition(-similarity, 20, axis=1)[:, :20]
  weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
  votes = np.stack([(weights * (labels[nearest] == k)).sum(1) for k in range(10)], 1)
  return float((votes.argmax(1) == answers).mean())


def test_an_image_is_a_function_of_seed_split_and_index_alone(world):
  some = np.array([700, 3, 1999, 3])
  again = sprites.render(some, seed=0)
  for name in ("image", "label", "mask", "box"):
    np.testing.assert_array_equal(getattr(again, name), getattr(world, name)[some])
  assert again.caption == [world.caption[i] for i in some]
  for other in (sprites.render(some, seed=1), sprites.render(some, seed=0, split="eval")):
    assert np.abs(other.image.astype(int) - again.image).mean() > 10


@pytest.mark.parametrize("size", [16, 33, 96])
def test_any_size_has_the_same_classes(size, world):
  other = sprites.render(np.arange(40), seed=0, size=size)
  assert other.image.shape == (40, size, size, 3) and other.mask.shape == (40, size, size)
  np.testing.assert_array_equal(other.label, world.label[:40])


def test_classes_are_balanced(world):
  counts = np.bincount(world.label, minlength=10)
  assert len(counts) == 10 and np.abs(counts - 204.8).max() < 4.5 * np.sqrt(204.8 * 0.9), counts


def test_mask_box_and_caption_tell_where_and_what_the_object_is(world):
  for i in range(100):
    y, x = np.nonzero(world.mask[i])
    np.testing.assert_array_equal(world.box[i] * 48, [y.min(), x.min(), y.max() + 1, x.max() + 1])
    assert world.mask[i].mean() > 0.1
    assert sprites.CLASSES[world.label[i]] in world.caption[i]
  parted = np.flatnonzero(world.mask.mean((1, 2)) < 0.95)
  assert len(parted) > 0.8 * len(world.mask)
  gray = world.image.mean(-1)
  inside = np.median([gray[i][world.mask[i] > 0].std() for i in parted])
  outside = np.median([gray[i][world.mask[i] == 0].std() for i in parted])
  assert inside > 2 * outside, (inside, outside)  # the motif is inside the mask


def test_neither_raw_pixels_nor_colors_give_the_class_away(world, held_out):
  flat = lambda w: w.image.reshape(len(w.image), -1).astype(np.float32)
  colors = lambda w: np.concatenate([w.image.mean((1, 2)), w.image.std((1, 2))], 1)
  pixels = knn(flat(world), world.label, flat(held_out), held_out.label)
  color = knn(colors(world), world.label, colors(held_out), held_out.label)
  assert pixels <= 0.25, pixels
  assert color <= 0.17, color
