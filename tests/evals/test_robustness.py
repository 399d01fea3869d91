"""Masked and grouped accuracy on planted features: a planted disparity, label maps, and the errors."""

import dataclasses

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.evals.base import Features
from big_ssl.evals.robustness import Robustness


def planted(split="train", *, output="pooled", weights="current"):
  """Eight classes around axes to train on; the held-out images have labels 0, 1, 2 for the classes 5, 1, 3."""
  rng = np.random.default_rng([split == "train", len(output), len(weights)])
  noise = 100.0 if weights == "random" else 0.6 if output == "pixels" else 0.35
  count = 240
  labels = (np.arange(count) % (8 if split == "train" else 3)).astype(np.int32)
  axes = np.eye(8)[labels if split == "train" else np.array([5, 1, 3])[labels]]
  features = axes + noise * rng.normal(size=(count, 8))
  if split == "eval" and weights == "current":
    features[200:] = 0.1 * features[200:] + 3 * np.eye(8)[0]  # a corrupted group: all look like class 0
  return Features(features.astype(np.float32), labels, np.arange(count), source="8 axes")


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "groups.txt"
  path.write_text("\n".join(["light"] * 120 + [""] * 75 + ["rare"] * 5 + ["dark"] * 40), encoding="utf-8")
  return str(path)


def test_a_planted_disparity_is_found_and_small_groups_are_withheld(file):
  report = Robustness(label_map=(5, 1, 3), groups=file)(planted)
  m = report.metrics
  assert m["group/light/n"] == 120 and m["group/dark/n"] == 40 and not any("rare" in k for k in m), m
  assert m["group/dark/high"] < m["group/light/low"], m
  assert m["worst_group"] == m["group/dark/top1"] and m["disparity"] == m["group/light/top1"] - m["group/dark/top1"]
  assert "withheld for fewer than 10 images: rare" in report.protocol and file in report.protocol
  assert Robustness(label_map=(5, 1, 3), groups=file, min_group=5)(planted).metrics["group/rare/n"] == 5


def test_masking_helps_where_classes_are_absent_and_the_protocol_is_told():
  report = Robustness(label_map=(5, 1, 3), baselines=True)(planted)
  m = report.metrics
  assert m["top1_masked_low"] < m["top1_masked"] < m["top1_masked_high"] and m["top1_masked"] > m["top1"] + 5, m
  assert m["random_init/top1_masked"] < 50 and "raw_pixels/top1_masked" in m, m
  assert m["group/class_5/n"] == m["group/class_1/n"] == 80
  for word in ("240 of 240 held-out", "3 classes, mapped", "of 8 classes", "lambda=100", "'pooled'", "8 axes"):
    assert word in report.protocol, report.protocol


def test_labels_mapped_to_none_are_left_out_and_the_penalty_matters():
  report = Robustness(label_map=(5, -1, 3))(planted)
  assert "160 of 240 held-out" in report.protocol and "group/class_1/n" not in report.metrics
  assert Robustness(label_map=(5, 1, 3), l2=1e-4)(planted).metrics != Robustness(label_map=(5, 1, 3))(planted).metrics


def test_without_labels_there_is_no_number_and_the_protocol_says_why():
  report = Robustness()(lambda split, **kw: dataclasses.replace(planted(split, **kw), labels=None))
  assert report.metrics == {} and "no labels" in report.protocol


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Robustness(l2=0.0), "config.evals.robustness.l2=0.0"),
    (lambda: Robustness(min_group=0), "config.evals.robustness.min_group=0"),
    (lambda: Robustness(label_map=(1, -2)), "label_map: -2 is no class"),
    (lambda: Robustness(label_map=(5, 1))(planted), "label_map: 2 entries, but the held-out images have label 2"),
    (lambda: Robustness(label_map=(5, 1, 11))(planted), r"no training image of classes \[11\]"),
    (lambda: Robustness(label_map=(-1, -1, -1))(planted), "none is left"),
    (lambda: Robustness(groups="nowhere.txt")(planted), "groups=nowhere.txt: cannot be read"),
  ],
)
def test_user_mistakes_are_named(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_a_group_file_that_is_too_short_is_named(tmp_path):
  path = tmp_path / "short.txt"
  path.write_text("a\nb\n", encoding="utf-8")
  with pytest.raises(UserError, match="short.txt: 2 lines, but there is a held-out image 239"):
    Robustness(groups=str(path))(planted)
