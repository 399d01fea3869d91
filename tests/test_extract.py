"""The extractor on arbitrary images, as dense evaluators and pictures use it."""

import engine
import jax
import numpy as np
import pytest

from big_ssl import setup
from big_ssl.evaluate import Extractor
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


IMAGES = np.random.default_rng(0).uniform(size=(5, 24, 40, 3)).astype(np.float32)


def test_images_are_normalized_as_in_the_evaluation_view(one):
  found = one.apply(outputs, IMAGES)["pixels"]
  np.testing.assert_allclose(found, (IMAGES - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4], rtol=1e-5, atol=1e-6)


def test_eight_devices_give_what_one_gives_for_a_count_they_do_not_divide(one):
  found, expected = extractor(8).apply(outputs, IMAGES)["map"], one.apply(outputs, IMAGES)["map"]
  assert found.shape == (5, 3, 5, 24)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_random_weights_are_those_of_the_initialization(one):
  current, random = (one.apply(outputs, IMAGES, weights=w)["map"] for w in ("current", "random"))
  assert not np.allclose(current, random, atol=1e-2)
  one.state, trained = one._run.initial_state(), one.state
  np.testing.assert_array_equal(one.apply(outputs, IMAGES)["map"], random)
  one.state = trained
