"""Weights that are evaluated in another run than their own: what is told of the pixels they were made for."""

import json
import re

import engine
import jax
import pytest

from big_ssl import setup, start


@pytest.mark.parametrize(
  ("card", "told"),
  [
    ({"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}, ""),
    ({"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225]}, r"pixels of mean \(0.5, 0.5, 0.5\), where config.method.mean is \(0.485, 0.456, 0.406\);"),
    ({"mean": "none", "std": "none"}, r"mean none, where config.method.mean is \(.*\) and std none, where"),
    ({}, ""),
  ],
)
def test_imported_weights_for_other_pixels_are_told(tmp_path, card, told):
  (tmp_path / "model.json").write_text(json.dumps({"model": {}, **card}))
  run = setup.make_run(engine.small("msn"), devices=jax.devices()[:1])
  said = start._other_normalization(run, tmp_path)
  assert said == told if not told else re.search(told, said)


def test_a_folder_without_a_record_tells_nothing(tmp_path):
  assert start._other_normalization(setup.make_run(engine.small("msn"), devices=jax.devices()[:1]), tmp_path) == ""
