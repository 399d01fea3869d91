"""Weights that are evaluated in another run than their own: those made for other pixels are refused."""

import json

import engine
import jax
import pytest

from big_ssl import setup, start
from big_ssl.core.types import UserError


@pytest.fixture(scope="module")
def run():
  return setup.make_run(engine.small("msn"), devices=jax.devices()[:1])


@pytest.mark.parametrize(
  ("card", "told"),
  [
    ({"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}, r"pixels of mean \(0.5, 0.5, 0.5\), where config.method.mean is \(0.485, 0.456, 0.406\);"),
    ({"mean": "none", "std": "none"}, r"mean none, where config.method.mean is \(.*\) and std none, where"),
  ],
)
def test_imported_weights_for_other_pixels_are_refused(run, tmp_path, card, told):
  (tmp_path / "model.json").write_text(json.dumps({"model": {}, **card}))
  with pytest.raises(UserError, match=told):
    start._check_normalization(run, tmp_path)


@pytest.mark.parametrize("card", [{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}, {}, None])
def test_weights_for_the_same_pixels_or_of_unknown_ones_are_taken(run, tmp_path, card):
  if card is not None:
    (tmp_path / "model.json").write_text(json.dumps({"model": {}, **card}))
  start._check_normalization(run, tmp_path)
