"""Masked and grouped accuracy on planted features: a planted disparity, label maps, and the errors."""

import dataclasses
import json
import types

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.evals.base import Features
from big_ssl.evals.robustness import Robustness

CLASSES = tuple(f"n{c}" for c in range(8))


def with_images(extract):
  """`extract` of images of eight classes with names."""
  extract.images = lambda split: types.SimpleNamespace(class_names=CLASSES)
  return extract


@with_images
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
  assert m["group/n5/n"] == m["group/n1/n"] == 80
  for word in ("240 of 240 held-out", "3 classes, mapped", "of 8 classes", "lambda=100", "'pooled'", "8 axes"):
    assert word in report.protocol, report.protocol


def test_labels_mapped_to_none_are_left_out_and_the_penalty_matters():
  report = Robustness(label_map=(5, -1, 3))(planted)
  assert "160 of 240 held-out" in report.protocol and "group/n1/n" not in report.metrics
  assert Robustness(label_map=(5, 1, 3), l2=1e-4)(planted).metrics != Robustness(label_map=(5, 1, 3))(planted).metrics


def test_without_labels_there_is_no_number_and_the_protocol_says_why():
  report = Robustness()(with_images(lambda split, **kw: dataclasses.replace(planted(split, **kw), labels=None)))
  assert report.metrics == {} and "no labels" in report.protocol


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Robustness(l2=0.0), "config.evals.robustness.l2=0.0"),
    (lambda: Robustness(min_group=0), "config.evals.robustness.min_group=0"),
    (lambda: Robustness(label_map=(1, -2)), "label_map: -2 is no class"),
    (lambda: Robustness(label_map=(5, 1))(planted), "label_map: 2 entries, but the held-out images have label 2"),
    (lambda: Robustness(label_map=(5, 1, 11))(planted), r"no training image of classes \[11\]"),
    (lambda: Robustness(label_map=(5, 1), class_map="a.txt"), "class_map=a.txt: there is also label_map"),
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


class Folders:
  """The planted images as folders: those held out are named by what they show, the training classes by numbers."""

  class_names = CLASSES

  def __init__(self, split):
    self.names = [f"{('mug', 'cup', 'hat')[i % 3]}/{i}.png" if split == "eval" else f"n{i % 8}/{i}.png" for i in range(240)]

  def __len__(self):
    return len(self.names)

  def name(self, index):
    return self.names[index]


class WithImages:
  """`planted`, whose held-out folders are no training classes: they have no label of their own."""

  def __call__(self, split, **kwargs):
    found = planted(split, **kwargs)
    return found if split == "train" else dataclasses.replace(found, labels=np.full(240, -1, np.int32))

  def images(self, split):
    return Folders(split)


def written(path, text):
  path.write_text(text, encoding="utf-8")
  return str(path)


def test_folders_with_other_names_are_mapped_to_one_or_several_training_classes(tmp_path):
  expected = Robustness(label_map=(5, 1, 3))(planted).metrics
  file = written(tmp_path / "map.txt", "# objects\nmug n5\ncup  n1\nhat n3\nnever_seen n7\n")
  assert Robustness(class_map=file)(WithImages()).metrics == expected
  report = Robustness(class_map=written(tmp_path / "b.txt", "mug n5 n0\ncup n1 # tea\n"))(WithImages())
  m = report.metrics
  assert m["group/n5/top1"] > expected["group/n5/top1"]  # the corrupted ones look like class 0
  assert report.images == 160 and "160 of 240 held-out images of 3 classes, mapped by class_map=" in report.protocol
  assert "the others have no training class" in report.protocol and "any of an image's classes" in report.protocol


def test_sets_of_labels_count_any_of_them_and_images_without_one_are_left_out(tmp_path):
  sets = [[(5, 1, 3)[i % 3]] for i in range(240)]
  expected = Robustness(label_map=(5, 1, 3))(planted).metrics
  assert Robustness(label_sets=written(tmp_path / "a.json", json.dumps(sets)))(WithImages()).metrics == expected
  kinder = [[*labels, 0] if i < 230 else [] for i, labels in enumerate(sets)]
  report = Robustness(label_sets=written(tmp_path / "b.json", json.dumps(kinder)))(WithImages())
  assert report.images == 230 and report.metrics["top1"] > expected["top1"] + 5


def test_shape_bias_is_the_share_of_decisions_for_the_label(tmp_path):
  bias = lambda c: Robustness(label_map=(5, 1, 3), textures=written(tmp_path / "t.txt", "\n".join([c] * 240)))(planted).metrics
  seen, unseen = bias("0"), bias("4")  # images 200 ... look like class 0, and none like class 4
  assert seen["shape_bias_low"] < seen["shape_bias"] < seen["shape_bias_high"] < unseen["shape_bias"], (seen, unseen)
  assert seen["shape_bias"] == pytest.approx(100 * 200 / 240, abs=6) and unseen["shape_bias"] > 95
  agreeing = written(tmp_path / "same.txt", "\n".join(str((5, 1, 3)[i % 3]) for i in range(240)))
  with pytest.raises(UserError, match="textures=.*no image with two cues was predicted as either"):
    Robustness(label_map=(5, 1, 3), textures=agreeing)(planted)


def test_a_planted_disparity_is_inside_its_interval_of_confidence(tmp_path):
  rng, covered, groups = np.random.default_rng(0), 0, ["a"] * 120 + ["b"] * 120
  file = written(tmp_path / "groups.txt", "\n".join(groups))
  for _ in range(20):
    wrong = rng.random(240) < np.where(np.arange(240) < 120, 0.1, 0.4)  # 30 points apart

    @with_images
    def drawn(split, wrong=wrong, **kwargs):
      labels = (np.arange(240) % 2).astype(np.int32)
      shown = labels ^ wrong if split == "eval" else labels
      return Features(np.eye(2, dtype=np.float32)[shown], labels, np.arange(240))

    m = Robustness(groups=file)(drawn).metrics
    covered += m["disparity_low"] <= 30 <= m["disparity_high"]
  assert covered >= 17, covered  # 19 on the mean


def test_held_out_classes_without_a_training_folder_are_left_out_and_told():
  @with_images
  def some(split, **kwargs):
    found = planted(split, **kwargs)
    if split == "eval":
      found = dataclasses.replace(found, labels=np.where(found.labels == 0, 5, np.where(found.labels == 1, -1, 3)).astype(np.int32))
    return found

  report = Robustness()(some)
  assert report.images == 160 and "160 of 240 held-out images of 2 classes (the others have no training class)" in report.protocol


@pytest.mark.parametrize(
  ("field", "text", "message"),
  [
    ("class_map", "mug n55\n", "line 1: 'n55' is no training class. Did you mean 'n5'"),
    ("class_map", "mugs n5\n", "none of its 1 folders holds a held-out image, such as mug/0.png"),
    ("class_map", "mug\ncup\n", "none of its 2 folders holds a held-out image"),
    ("label_sets", "[[1], [2]]", "2 lists, but there is a held-out image 239"),
    ("label_sets", "[1, 2]", "expected a list of lists of class numbers"),
    ("label_sets", "[[1]", "not JSON"),
    ("label_sets", json.dumps([[]] * 240), "every held-out image is left out"),
    ("label_sets", json.dumps([[9]] * 240), r"no training image of classes \[9\]"),
  ],
)
def test_a_class_map_with_holes_is_one_clear_line(tmp_path, field, text, message):
  with pytest.raises(UserError, match=f"config.evals.robustness.{field}=.*{message}"):
    Robustness(**{field: written(tmp_path / "map", text)})(WithImages())


@pytest.mark.parametrize("line", ["8", "-1", "dotted"])
def test_a_texture_that_is_no_class_is_named(tmp_path, line):
  with pytest.raises(UserError, match=f"textures=.*'{line}' is no class; expected a number from 0 to 7"):
    Robustness(label_map=(5, 1, 3), textures=written(tmp_path / "t.txt", "\n".join([line] * 240)))(planted)
