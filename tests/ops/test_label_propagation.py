"""Label propagation against the reference, against its definition written in numpy, and on clips whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.ops import label_propagation as lp


def context(features, labels):
  return lp.Context(lp.unit(features), jnp.asarray(labels), jnp.ones(len(features), bool))


propagate = jax.jit(lp.propagate, static_argnames="rule")


def by_definition(target, features, labels, *, topk, window, temperature):
  """All pairs at once, in float64; the mask multiplies after the exponential, the limit is over all frames."""
  (h, w), classes = features.shape[1:3], labels.shape[-1]
  norm = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  weights = np.exp(np.einsum("yxd,fijd->yxfij", norm(target.astype(float)), norm(features.astype(float))) / temperature)
  rows, columns = (abs(np.arange(n)[:, None] - np.arange(n)) <= window for n in (h, w))
  weights = (weights * (rows[:, None, None, :, None] & columns[None, :, None, None, :])).reshape(h * w, -1)
  weights[weights < np.sort(weights, axis=1)[:, -topk][:, None]] = 0
  return (weights / weights.sum(1, keepdims=True) @ labels.reshape(-1, classes)).reshape(h, w, classes)


def test_a_frame_has_the_labels_of_the_reference(golden):
  g = golden("dino_label_propagation")
  h, w = g["propagated"].shape[2:]
  features = np.moveaxis(g["context_features"], 1, 2).reshape(-1, h, w, g["context_features"].shape[1])
  rule = lp.Rule(topk=int(g["topk"]), window=int(g["neighbourhood"]), temperature=float(g["temperature"]))
  target = lp.unit(g["target_tokens_with_cls"][0, 1:].reshape(h, w, -1))
  found = propagate(target, context=context(features, np.moveaxis(g["context_segmentations"], 1, -1)), rule=rule)
  np.testing.assert_allclose(np.moveaxis(found, -1, 0), g["propagated"][0], atol=1e-5)
  large = lp.enlarge(found, size=g["label_map"].shape)
  np.testing.assert_allclose(np.moveaxis(large, -1, 0), g["upsampled_normalised"], atol=1e-4)
  np.testing.assert_array_equal(np.argmax(large, -1), g["label_map"])


def test_a_clip_has_the_masks_of_the_reference(golden):
  g = golden("segmentation_eval_davis_propagation")
  classes, h, w = g["first_mask_onehot"].shape
  first = lp.one_hot(g["first_labels"], classes=classes)
  np.testing.assert_array_equal(np.moveaxis(first, -1, 0), g["first_mask_onehot"])
  features = g["features"].reshape(-1, h, w, g["features"].shape[-1])
  softs = list(lp.propagate_clip(features, first_labels=first, last_frames=3, rule=lp.Rule(window=2)))
  np.testing.assert_allclose(np.moveaxis(np.stack(softs), -1, 1), g["soft_masks"], atol=1e-4)
  for soft, hard in zip(softs, g["hard_masks"], strict=True):
    np.testing.assert_array_equal(np.argmax(lp.enlarge(soft, size=(h * 4, w * 4)), -1), hard)


@pytest.mark.parametrize(("window", "topk", "temperature"), [(0, 7, 0.02), (1, 70, 1.0), (3, 1, 0.1), (20, 5, 0.1)])
def test_any_window_and_number_of_neighbors_is_that_of_the_definition(window, topk, temperature):
  rng = np.random.default_rng(0)
  target, features = rng.normal(size=(5, 7, 6)), rng.normal(size=(2, 5, 7, 6))
  labels = rng.uniform(size=(2, 5, 7, 3)).astype(np.float32)
  rule = lp.Rule(topk=topk, window=window, temperature=temperature)
  expected = by_definition(target, features, labels, topk=topk, window=window or 99, temperature=temperature)
  np.testing.assert_allclose(propagate(lp.unit(target), context=context(features, labels), rule=rule), expected, atol=2e-5)


def test_ties_at_the_last_neighbor_all_vote():
  features = np.ones((1, 2, 3, 4))
  labels = np.eye(6, dtype=np.float32).reshape(1, 2, 3, 6)
  found = propagate(lp.unit(features[0]), context=context(features, labels), rule=lp.Rule(topk=2))
  np.testing.assert_allclose(found, 1 / 6, atol=1e-6)


def test_a_low_temperature_does_not_overflow():
  features = np.random.default_rng(0).normal(size=(1, 2, 2, 3))
  labels = np.eye(4, dtype=np.float32).reshape(1, 2, 2, 4)
  found = propagate(lp.unit(features[0]), context=context(features, labels), rule=lp.Rule(temperature=1e-3))
  np.testing.assert_allclose(found, labels[0], atol=1e-6)


def test_a_static_clip_keeps_its_mask_for_ever():
  frame = np.random.default_rng(0).normal(size=(4, 5, 16))
  first = lp.one_hot(np.arange(20).reshape(4, 5) % 3, classes=3)
  for soft in lp.propagate_clip([frame] * 12, first_labels=first, last_frames=2, rule=lp.Rule(topk=1)):
    np.testing.assert_array_equal(soft, first)


@pytest.mark.parametrize("last", [0, 1, 3])
def test_the_context_is_the_first_frame_and_the_last_ones_with_their_soft_labels(last):
  rng = np.random.default_rng(0)
  frames, first = rng.normal(size=(7, 2, 3, 4)), lp.one_hot(np.arange(6).reshape(2, 3) % 2, classes=2)
  rule = lp.Rule(topk=3, window=1, temperature=0.3)
  known = [first]
  for soft in lp.propagate_clip(frames, first_labels=first, last_frames=last, rule=rule):
    seen = [0, *range(max(1, len(known) - last), len(known))]
    labels = np.stack([known[i] for i in seen])
    expected = by_definition(frames[len(known)], frames[seen], labels, topk=3, window=1, temperature=0.3)
    np.testing.assert_allclose(soft, expected, atol=1e-5)
    known.append(np.asarray(soft))
  assert len(known) == 7


def test_one_compilation_serves_every_frame_of_a_clip():
  lp._advance.clear_cache()
  frames = np.random.default_rng(0).normal(size=(11, 3, 4, 5))
  list(lp.propagate_clip(frames, first_labels=np.ones((3, 4, 2), np.float32), last_frames=4))
  assert lp._advance._cache_size() == 1


def test_each_class_is_scaled_by_its_own_range_and_a_constant_one_is_no_nan():
  soft = np.stack([np.full((2, 3), 0.3), np.linspace(0.1, 0.2, 6).reshape(2, 3), np.zeros((2, 3))], -1)
  large = np.asarray(lp.enlarge(jnp.asarray(soft), size=(4, 6)))
  np.testing.assert_array_equal(large[..., 0], 1)
  np.testing.assert_array_equal(large[..., 2], 0)
  assert large[..., 1].min() == 0 and large[..., 1].max() == pytest.approx(1)


@pytest.mark.parametrize(("limit", "count"), [(10, 4), (7, 7), (5, 12), (480, 60), (854, 13)])
def test_nearest_places_are_those_of_pil(limit, count):
  from PIL import Image

  row = Image.fromarray(np.arange(limit, dtype=np.int32)[None])
  expected = np.asarray(row.resize((count, 1), Image.Resampling.NEAREST))[0]
  np.testing.assert_array_equal(lp.nearest_places(count, step=limit / count, limit=limit), expected)
