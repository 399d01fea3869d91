"""The extractor on arbitrary images, as dense evaluators and pictures use it."""

import dataclasses

import engine
import jax
import numpy as np
import pytest
from PIL import Image

from big_ssl import setup
from big_ssl.core.types import UserError
from big_ssl.evals.attention_masks import AttentionMasks
from big_ssl.evals.copy_detection import CopyDetection
from big_ssl.evals.knn import Knn
from big_ssl.evals.linear import LinearProbe
from big_ssl.evals.lowshot import LowShot
from big_ssl.evals.video_segmentation import VideoSegmentation
from big_ssl.evaluate import Extractor, extract_to
from big_ssl.models.dense import patch_map


def outputs(trunk, images):
  return {"map": patch_map(trunk, images), "pixels": images}


def extractor(devices: int) -> Extractor:
  normalized = {"method.mean": (0.5, 0.4, 0.3), "method.std": (0.2, 0.3, 0.4)}
  run = setup.make_run(engine.small("msn", **normalized), devices=jax.devices()[:devices])
  extract = Extractor(run)
  extract.state = run.initial_state()
  extract.state = extract.state.replace(extra=jax.tree.map(lambda x: x * 1.1, extract.state.extra))
  return extract


@pytest.fixture(scope="module")
def one() -> Extractor:
  return extractor(1)


@pytest.fixture(scope="module")
def eight() -> Extractor:
  return extractor(8)


IMAGES = np.random.default_rng(0).uniform(size=(5, 24, 40, 3)).astype(np.float32)


def test_images_are_normalized_as_in_the_evaluation_view(one):
  found = one.apply(outputs, IMAGES)["pixels"]
  np.testing.assert_allclose(found, (IMAGES - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4], rtol=1e-5, atol=1e-6)


def test_the_source_of_features_says_how_images_are_seen(one):
  assert one("eval").source.endswith(" (largest center crop, 32x32, bilinear)")


def test_eight_devices_give_what_one_gives_for_a_count_they_do_not_divide(one, eight):
  found, expected = eight.apply(outputs, IMAGES)["map"], one.apply(outputs, IMAGES)["map"]
  assert found.shape == (5, 3, 5, 24)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def batches_of(extract: Extractor, size: int) -> Extractor:
  """The same weights, with another batch."""
  run = extract._run
  other = Extractor(dataclasses.replace(run, config=dataclasses.replace(run.config, batch_size=size)))
  other.state = extract.state
  return other


EVALUATORS = (Knn(k=(1, 5), temperature=0.1), LinearProbe(l2=(10.0,)), LowShot(images_per_class=2, splits=2))


def in_halves(extract: Extractor):
  """Two classes: so few images do not have all ten."""

  def of(split, **kwargs):
    found = extract(split, **kwargs)
    return dataclasses.replace(found, labels=found.labels % 2)

  return of


def test_evaluators_say_the_same_on_eight_devices_and_for_batches_that_do_not_divide_the_images(one, eight):
  assert len(one.images("eval")) == len(one.images("train")) == 40  # 16, 16, 8 and 8 rows of padding
  others = {"8 devices": eight, "no padding": batches_of(one, 8), "one batch": batches_of(one, 64)}
  expected = {split: one(split) for split in ("train", "eval")}
  for name, other in others.items():
    for split, features in expected.items():
      found = other(split)
      np.testing.assert_array_equal(found.index, np.arange(40), err_msg=name)
      np.testing.assert_array_equal(found.labels, features.labels, err_msg=name)
      np.testing.assert_allclose(found.features, features.features, rtol=1e-4, atol=1e-5, err_msg=name)
    for evaluator in EVALUATORS:
      assert evaluator(in_halves(other), mesh=other._run.mesh) == evaluator(in_halves(one), mesh=one._run.mesh), name


def test_a_full_disk_ends_an_extraction_in_one_line_and_leaves_no_half_file(one, tmp_path):
  (tmp_path / "features_train.tmp").symlink_to("/dev/full")
  with pytest.raises(UserError, match="features_train.npz: cannot be written: No space left on device"):
    extract_to(tmp_path, one._run, one, one.state)
  assert list(tmp_path.iterdir()) == []


def test_random_weights_are_those_of_the_initialization(one):
  current, random = (one.apply(outputs, IMAGES, weights=w)["map"] for w in ("current", "random"))
  assert not np.allclose(current, random, atol=1e-2)
  one.state, trained = one._run.initial_state(), one.state
  np.testing.assert_array_equal(one.apply(outputs, IMAGES)["map"], random)
  one.state = trained


def test_copy_detection_needs_no_folder_and_is_the_same_on_eight_devices(one, eight):
  evaluator = CopyDetection(images=9, copies=("jpeg", "crop"), batch_size=7, whitening="train")
  found, expected = evaluator(eight), evaluator(one)
  assert found.metrics == pytest.approx(expected.metrics) and set(found.metrics) == {"jpeg_map", "crop_map", "map"}
  assert found.protocol == expected.protocol and "squashed to 32x32" in found.protocol


def test_another_folder_is_listed_once_and_read_with_the_channels_of_the_run(one, tmp_path):
  Image.fromarray(np.full((5, 7), 9, np.uint8)).save(tmp_path / "gray.png")
  found = one.folder(str(tmp_path), field="config.evals.x")
  assert found is one.folder(str(tmp_path), field="config.evals.y") and found.describe()["name"] == tmp_path.name
  np.testing.assert_array_equal(found.pixels(0), np.full((5, 7, 3), 9))
  with pytest.raises(UserError, match="config.evals.x=.*grey: no such folder. Did you mean '.*gray.png'"):
    one.folder(str(tmp_path / "grey"), field="config.evals.x")


def test_dense_evaluators_run_on_the_sprites_and_are_the_same_on_eight_devices(one, eight):
  for evaluator in (VideoSegmentation(size=32, max_clips=1, last_frames=2), AttentionMasks(size=32, max_images=9, batch_size=5)):
    found, expected = evaluator(eight), evaluator(one)
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-6) and min(found.metrics.values()) > 0
    assert found.protocol == expected.protocol


def test_clips_are_those_of_the_held_out_data_or_of_a_folder(one):
  assert one.clips(field="config.evals.y.data") is one.images("eval").clips
  with pytest.raises(UserError, match="config.evals.y.data=/nowhere: there is no JPEGImages/480p"):
    one.clips("/nowhere", field="config.evals.y.data")
