"""The class-balanced support: balance, truth of the labels, no image twice in a step, O(1) in the step; and its errors."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from big_ssl.core.config import DataConfig
from big_ssl.core.method import ClassBalanced, Inputs, View
from big_ssl.core.types import UserError
from big_ssl.data.balanced import BalancedPlan, labeled_rows, labeled_subset
from big_ssl.data.pipeline import Pipeline
from big_ssl.data.source import Arrays, Python

NAMES = [f"n{i % 7}/n{i % 7}_{i}.jpg" for i in range(150)]
LABELS = np.random.default_rng(0).permutation(np.arange(150, dtype=np.int32) % 7)


def rows_of(labels=LABELS, names=NAMES, **fields):
  sampler = ClassBalanced(classes_per_step=3, images_per_class=2, **fields)
  return labeled_rows(sampler, labels, name=names.__getitem__, class_names=("cat", "dog"))


def plan_of(labels=LABELS, *, classes=3, each=4, seed=0, **fields):
  sampler = ClassBalanced(classes_per_step=classes, images_per_class=each, **fields)
  return BalancedPlan(sampler, labels, rows=labeled_rows(sampler, labels, name=str), seed=seed)


def steps(plan, count, *, size=12, start=0):
  return plan.indices(np.arange(start * size, (start + count) * size)).reshape(count, size)


def test_every_step_is_balanced_interleaved_and_has_no_image_twice():
  for batch in steps(plan_of(), 200):
    labels = LABELS[batch].reshape(4, 3)  # [copy, class]
    assert np.all(labels == labels[0]) and len(set(labels[0])) == 3
    assert len(set(batch)) == 12


def test_classes_and_images_are_drawn_equally_often_and_in_ever_new_orders():
  # Four classes in steps of two: a pass is two steps. Each has 12 images, which three passes of four go through.
  labels = np.arange(48, dtype=np.int32) % 4
  batches = steps(plan_of(labels, classes=2), 6 * 50, size=8)
  for number in range(50):
    window = batches[6 * number : 6 * number + 6]
    np.testing.assert_array_equal(np.sort(window.ravel()), np.arange(48))
  firsts = {tuple(labels[b[:2]]) for b in batches}
  assert len(firsts) == 12  # every ordered pair of classes
  assert len({tuple(b) for b in batches}) == len(batches)


def test_classes_that_do_not_divide_into_steps_are_all_drawn_alike():
  counts = np.bincount(LABELS[steps(plan_of(), 3500)[:, :3].ravel()], minlength=7)
  np.testing.assert_allclose(counts / counts.sum(), 1 / 7, atol=0.01)


def test_a_far_step_costs_what_the_first_one_costs_and_is_the_same_by_itself():
  plan = plan_of()
  far = 10**9
  np.testing.assert_array_equal(steps(plan, 3, start=far)[2], steps(plan, 1, start=far + 2)[0])
  np.testing.assert_array_equal(plan.indices(np.arange(5, 9)), steps(plan, 1)[0][5:9])


def test_seeds_change_the_draw_and_nothing_else_does():
  np.testing.assert_array_equal(steps(plan_of(), 20), steps(plan_of(), 20))
  assert not np.array_equal(steps(plan_of(), 20), steps(plan_of(seed=1), 20))


def test_the_labeled_set_is_so_many_per_class_drawn_by_its_own_seed():
  rows = rows_of(labels_per_class=5)
  np.testing.assert_array_equal(np.bincount(LABELS[rows]), 5)
  assert np.all(np.diff(rows) > 0)
  np.testing.assert_array_equal(rows, rows_of(labels_per_class=5))
  other = rows_of(labels_per_class=5, labels_seed=1)
  assert 0 < len(np.setdiff1d(other, rows)) and np.all(np.bincount(LABELS[other]) == 5)
  used = plan_of(labels_per_class=5).indices(np.arange(12 * 100))
  assert set(used) <= set(rows) and len(set(used)) == len(rows)


def test_images_without_a_label_are_never_drawn():
  labels = np.where(np.arange(150) % 5 == 0, -1, LABELS).astype(np.int32)
  assert np.all(labels[plan_of(labels).indices(np.arange(1200))] >= 0)


@pytest.mark.parametrize("write", [lambda i: NAMES[i], lambda i: NAMES[i].split("/")[1], str], ids=["name", "last part", "number"])
def test_a_list_names_images_in_three_ways(tmp_path, write):
  chosen = [3, 140, 77, 9]
  file = tmp_path / "list.txt"
  file.write_text("\n".join(map(write, chosen)) + "\n\n")
  np.testing.assert_array_equal(rows_of(labels_file=str(file)), sorted(chosen))


@pytest.mark.parametrize(
  "text,message",
  [
    ("n1/n1_1.jpg\nn1/n1_2.jpg\nx.png", "2 of 3 names are not in the data, such as n1/n1_2.jpg, x.png.*Did you mean 'n"),
    ("3\n150", "image 150; the data has 0 to 149"),
    ("\n", "the list is empty"),
  ],
)
def test_wrong_lists_are_clear_errors(tmp_path, text, message):
  file = tmp_path / "list.txt"
  file.write_text(text)
  with pytest.raises(UserError, match=f"config.method.labels_file=.*list.txt.*{message}"):
    rows_of(labels_file=str(file))


def test_a_missing_list_a_binary_one_and_two_ways_at_once_are_clear_errors(tmp_path):
  (tmp_path / "10percent.txt").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(UserError, match="no such file. Did you mean '.*10percent.txt'"):
    rows_of(labels_file=str(tmp_path / "10percents.txt"))
  with pytest.raises(UserError, match="not a text file"):
    rows_of(labels_file=str(tmp_path / "10percent.txt"))
  with pytest.raises(UserError, match="labels_per_class=5: not with config.method.labels_file"):
    rows_of(labels_file="x", labels_per_class=5)


def test_ambiguous_names_and_images_without_labels_in_a_list_are_clear_errors(tmp_path):
  file = tmp_path / "list.txt"
  file.write_text("a.jpg")
  with pytest.raises(UserError, match="'a.jpg' is the name of 2 images, x/a.jpg and y/a.jpg"):
    rows_of(np.array([0, 1], np.int32), ["x/a.jpg", "y/a.jpg"], labels_file=str(file))
  with pytest.raises(UserError, match="1 of its 1 images have no label, the first is x/a.jpg"):
    rows_of(np.array([-1, 1], np.int32), ["x/a.jpg", "y/b.jpg"], labels_file=str(file))


@pytest.mark.parametrize("labels", [None, np.full(150, -1, np.int32)])
def test_a_source_without_labels_is_a_clear_error(labels):
  with pytest.raises(UserError, match="config.data.source: the data has no labels"):
    rows_of(labels)


@pytest.mark.parametrize(
  "make,message",
  [
    (lambda: rows_of(np.repeat([0, 1], [145, 5]), labels_per_class=6), r"labels_per_class=6: class 1 \('dog'\) has only 5"),
    (lambda: rows_of(labels_per_class=-1), "labels_per_class=-1"),
    (lambda: plan_of(classes=8), "classes_per_step=8: the labeled images have 7 classes"),
    (lambda: plan_of(np.zeros(50, np.int32), classes=1), "classes_per_step=1: all 50 labeled images are of one class, class 0"),
    (lambda: plan_of(each=30), "images_per_class=30: class . has 2[0-9] labeled images"),
    (lambda: plan_of(each=6, labels_per_class=5), "images_per_class=6: class 0 has 5 labeled images"),
    (lambda: plan_of(each=0), "images_per_class=0: expected at least 1"),
  ],
)
def test_impossible_supports_are_clear_errors(make, message):
  with pytest.raises(UserError, match=f"config.method.*{message}"):
    make()


def pipeline_of(source, sampler, rows=None, seed=3):
  inputs = Inputs(views=(View(name="v", size=4),), keys=("label",), sampler=sampler)
  size = inputs.batch_size
  return Pipeline(source, inputs, stream="support", batch_size=size, seed=seed, rows=rows or (0, size), canvas=8, crop="host")


def test_the_labels_in_a_batch_are_those_of_its_images_on_any_number_of_hosts():
  images = np.broadcast_to(LABELS[:, None, None, None] * 20, (150, 8, 8, 3)).astype(np.uint8)  # the pixels tell the class
  source = Arrays(images, LABELS)
  sampler = ClassBalanced(classes_per_step=3, images_per_class=4, labels_per_class=6)
  whole = pipeline_of(source, sampler)
  assert len(whole.labeled) == 42 and not whole.shuffles
  for step in (0, 7):
    batch = whole.batch(step)
    np.testing.assert_array_equal(batch["label"], LABELS[batch["index"]])
    np.testing.assert_array_equal(batch["v/pixels"][:, 0, 0, 0, 0], 20 * batch["label"])
    parts = [pipeline_of(source, sampler, rows=r).batch(step) for r in ((0, 6), (6, 12))]
    for key in batch:
      np.testing.assert_array_equal(batch[key], np.concatenate([p[key] for p in parts]))


def test_a_bad_image_is_replaced_by_another_labeled_one_of_its_class():
  class Items:
    def __len__(self):
      return 40

    def __getitem__(self, i):
      if i in (4, 8):
        raise OSError("broken")
      return Image.fromarray(np.full((8, 8, 3), i, np.uint8))

  labels = np.arange(40, dtype=np.int32) % 4
  source = Python(Items(), labels=labels)
  pipeline = pipeline_of(source, ClassBalanced(classes_per_step=4, images_per_class=5))
  for step in range(6):
    batch = pipeline.batch(step)
    assert not {4, 8} & set(batch["index"].tolist())
    np.testing.assert_array_equal(np.bincount(batch["label"]), 5)
    np.testing.assert_array_equal(batch["label"], labels[batch["index"]])
  assert {name for name, _ in source.problems} == {"4", "8"}


def test_the_batch_size_of_the_stream_is_that_of_its_support():
  sampler = ClassBalanced(classes_per_step=3, images_per_class=4)
  assert Inputs(views=(), sampler=sampler).batch_size == 12 == sampler.batch_size
  assert dataclasses.replace(sampler, images_per_class=5).batch_size == 15


def subset_of(labels=LABELS, **fields):
  images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
  return labeled_subset(Arrays(images, labels, name="all"), DataConfig(**fields))


def test_training_on_few_labels_takes_the_images_that_a_support_of_as_many_has():
  part = subset_of(labels_per_class=5)
  np.testing.assert_array_equal(part.images[:, 0, 0, 0], rows_of(labels_per_class=5))
  np.testing.assert_array_equal(part.labels, LABELS[rows_of(labels_per_class=5)])
  assert not np.array_equal(part.images, subset_of(labels_per_class=5, labels_seed=1).images)


def test_a_share_is_of_every_class_and_at_least_one_image():
  labels = np.repeat(np.arange(3, dtype=np.int32), [100, 44, 6])
  np.testing.assert_array_equal(np.bincount(subset_of(labels, labels_share=0.1).labels), [10, 4, 1])
  few, more = (set(subset_of(labels, labels_share=s).images[:, 0, 0, 0].tolist()) for s in (0.1, 0.3))
  assert few < more  # the smaller part is inside of the larger one
  assert len(subset_of(labels)) == len(subset_of(labels, labels_share=1.0)) == 150


def test_a_list_chooses_and_which_images_they_are_is_in_the_record(tmp_path):
  file = tmp_path / "list.txt"
  file.write_text("3\n140\n77")
  part = subset_of(labels_file=str(file))
  np.testing.assert_array_equal(part.images[:, 0, 0, 0], [3, 77, 140])
  assert part.describe()["name"] == "all, 3 of 150 by label" and subset_of().describe()["name"] == "all"
  file.write_text("3\n141\n77")
  other = subset_of(labels_file=str(file)).describe()
  assert other["name"] == part.describe()["name"] and other["hash"] != part.describe()["hash"]


@pytest.mark.parametrize(
  "fields,message",
  [
    ({"labels_share": 1.5}, "config.data.labels_share=1.5: expected a share"),
    ({"labels_share": 0.1, "labels_per_class": 3}, "config.data.labels_per_class=3: not with config.data.labels_share=0.1"),
    ({"labels_per_class": 60}, "config.data.labels_per_class=60: class 0 has only 2. labeled"),
    ({"labels_per_class": -2}, "config.data.labels_per_class=-2"),
    ({"labels_file": "nowhere.txt"}, "config.data.labels_file='nowhere.txt': no such file"),
  ],
)
def test_impossible_choices_name_the_config_of_the_data(fields, message):
  with pytest.raises(UserError, match=message):
    subset_of(**fields)


def test_a_choice_by_label_needs_labels():
  source = Arrays(np.zeros((30, 2, 2, 3), np.uint8))
  with pytest.raises(UserError, match="has no labels, which config.data.labels_share=0.1 draws from"):
    labeled_subset(source, DataConfig(labels_share=0.1))
