"""Sources: the same pixels from any container, labels from names, splits, held-out images, and errors that help."""

import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from big_ssl.core.types import UserError
from big_ssl.data import decode, opening, source

SPLITS = {"train": {"cat": 3, "dog": 2, "owl": 2}, "val": {"cat": 1, "owl": 2}}


def pixels(seed: int, shape=(12, 16, 3)) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path: pathlib.Path, seed: int = 0) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels(seed)).save(path)


def classes(root: pathlib.Path, counts: dict[str, int]) -> pathlib.Path:
  for k, (name, count) in enumerate(counts.items()):
    for i in range(count):
      save(root / name / f"{i}.png", 100 * k + i)
  return root


def archive(root: pathlib.Path, file: pathlib.Path, *, prefix: str = "", extra: dict[str, bytes] | None = None) -> str:
  """A tar of the files below `root` in sorted order, and some more."""
  contents = {prefix + str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
  with tarfile.open(file, "w") as tar:
    for name, data in (contents | (extra or {})).items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return str(file)


def opened(spec, **kwargs):
  return opening.open_splits(str(spec), **kwargs)


def test_every_container_gives_the_same_pixels_and_labels(tmp_path):
  from test_tfrecord import example, image_entry, label_entry, write

  root = classes(tmp_path / "images", {"a": 3, "b": 4})
  files = sorted(root.rglob("*.png"))
  labels = [0] * 3 + [1] * 4
  expected = [np.asarray(Image.open(f)) for f in files]
  np.savez(tmp_path / "x.npz", images=np.stack(expected), labels=np.array(labels))
  write(
    tmp_path / "x.tfrecord",
    [example(image_entry(f.read_bytes()), label_entry(k)) for f, k in zip(files, labels, strict=True)],
  )
  archive(root, tmp_path / "x.tar", prefix="./top/images/")
  sources = {s: opened(tmp_path / s)["train"] for s in ("images", "x.npz", "x.tfrecord", "x.tar")}
  sources["arrays"] = source.Arrays(np.stack(expected), labels)
  sources["python"] = source.Python([Image.open(f) for f in files], labels=labels)
  for name, found in sources.items():
    assert len(found) == 7, name
    np.testing.assert_array_equal(found.labels, labels, err_msg=name)
    np.testing.assert_array_equal(np.stack(found.fetch(range(7))), expected, err_msg=name)


def test_a_flat_folder_has_no_labels_and_evaluates_the_training_images(tmp_path):
  for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt", ".git/c.png", "c.tiff.part"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels(1)).save(tmp_path / name, "PNG")
  splits = opened(tmp_path)
  assert [splits["train"].name(i) for i in range(len(splits["train"]))] == ["a.JPG", "b.png"]
  assert splits["train"].labels is None and [splits["eval"].name(i) for i in range(len(splits["eval"]))] == ["a.JPG", "b.png"]


def test_split_folders_share_the_class_numbers_of_the_training_images(tmp_path):
  for name, counts in SPLITS.items():
    classes(tmp_path / name, counts)
  save(tmp_path / "val" / "yak" / "0.png")
  for spec in (tmp_path, archive(tmp_path, tmp_path / "x.tar")):
    splits = opened(spec)
    assert splits["train"].class_names == splits["eval"].class_names == ("cat", "dog", "owl")
    assert splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert splits["eval"].labels.tolist() == [0, 2, 2, -1], "a class without training images has no number"


def test_one_class_in_the_evaluation_split_keeps_its_number(tmp_path):
  classes(tmp_path / "train", {"a": 2, "b": 2})
  classes(tmp_path / "test", {"b": 2})
  assert opened(tmp_path)["eval"].labels.tolist() == [1, 1]


def test_named_splits_are_taken(tmp_path):
  for name in ("one", "two", "three"):
    classes(tmp_path / name, {"a": 1, "b": 1 + (name == "two")})
  splits = opened(tmp_path, split="two", eval_split="three")
  assert len(splits["train"]) == 3 and len(splits["eval"]) == 2
  rest = opened(tmp_path, eval_split="two")
  assert len(rest["train"]) == 4 and len(rest["eval"]) == 3


def test_masks_beside_the_images_are_found_in_both_layouts(tmp_path):
  classes = np.array([[0, 3], [1, 255]], np.uint8)
  for layout in ("{split}/{kind}/a.{end}", "{kind}/{split}/a.{end}"):
    root = tmp_path / layout[1]
    for split in ("train", "val"):
      for kind, end, array in (("images", "jpg", np.full((2, 2, 3), 90, np.uint8)), ("annotations", "png", classes)):
        file = root / layout.format(split=split, kind=kind, end=end)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file)
    opened = opening.open_splits(str(root))
    for images in opened.values():
      assert len(images) == 1 and images.has_masks and images.labels is None and images.name(0) == "a.jpg"
      np.testing.assert_array_equal(images.mask(0), classes)


def test_an_image_without_its_mask_is_named(tmp_path):
  for kind, names in (("images", "ab"), ("labels", "a")):
    (tmp_path / kind).mkdir()
    for name in names:
      Image.new("L", (2, 2)).save(tmp_path / kind / f"{name}.png")
  with pytest.raises(UserError, match="images/b.png has no mask labels/b.png"):
    opening.open_splits(str(tmp_path))


def test_folders_of_classes_called_images_and_labels_stay_classes(tmp_path):
  for name in ("images/a.png", "labels/b.png", "cats/c.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("L", (2, 2)).save(tmp_path / name)
  opened = opening.open_splits(str(tmp_path))["train"]
  assert not opened.has_masks and len(opened) == 3 and opened.class_names == ("cats", "images", "labels")
  with pytest.raises(UserError, match="has no masks. Masks are .png files"):
    opened.mask(0)


def test_a_link_back_into_the_folder_ends(tmp_path):
  save(tmp_path / "data" / "a.png")
  save(tmp_path / "elsewhere" / "b.png")
  os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
  os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "linked")
  found = opened(tmp_path / "data")["train"]
  assert [found.name(i) for i in range(len(found))] == ["a.png", "linked/b.png"]


def test_a_cls_file_is_the_label_of_a_tar(tmp_path):
  save(tmp_path / "d" / "x.png")
  save(tmp_path / "d" / "y.png")
  number = lambda **kinds: {f"{k}.cls": v for k, v in kinds.items()}
  for i in range(2):
    archive(tmp_path / "d", tmp_path / f"s-{i}.tar", extra=number(x=b"300", y=b"%d\n" % i) | {"._x.png": b"junk"})
  found = opened(tmp_path / "s-*.tar")["train"]
  assert found.labels.tolist() == [300, 0, 300, 1] and not found.problems
  for extra, message in (
    (number(x=b"1"), "1 of 2 images have no .cls file"),
    (number(x=b"cat", y=b"1"), "x.cls.*number"),
  ):
    with pytest.raises(UserError, match=message):
      opened(archive(tmp_path / "d", tmp_path / "bad.tar", extra=extra))


def test_a_fixed_tenth_of_every_class_is_held_out(tmp_path):
  for name, labels in {"periodic": np.arange(200) % 10, "blocks": np.arange(200) // 20}.items():
    np.savez(tmp_path / f"{name}.npz", images=np.arange(200, dtype=np.uint8).reshape(-1, 1, 1, 1), labels=labels)
    splits = [opened(tmp_path / f"{name}.npz", seed=seed) for seed in (0, 1)]
    assert np.bincount(splits[0]["eval"].labels, minlength=10).tolist() == [2] * 10, name
    seen = np.concatenate([s.images.ravel() for s in splits[0].values()])
    np.testing.assert_array_equal(np.sort(seen), np.arange(200))
    np.testing.assert_array_equal(splits[0]["eval"].images, splits[1]["eval"].images)


def test_holding_out_leaves_every_class_an_image_to_train_on(tmp_path):
  np.savez(tmp_path / "x.npz", images=np.zeros((40, 2, 2, 3), np.uint8), labels=np.arange(40) // 1)
  assert len(opened(tmp_path / "x.npz")["train"]) == 40 - len(opened(tmp_path / "x.npz")["eval"])
  assert set(opened(tmp_path / "x.npz")["train"].labels.tolist()) == set(range(40))


@pytest.mark.parametrize("labels", [{"labels": np.arange(12) % 3}, {}], ids=["few", "unlabeled"])
def test_training_images_that_are_evaluated_themselves_are_called_so(tmp_path, labels):
  np.savez(tmp_path / "x.npz", images=np.zeros((12, 2, 2, 3), np.uint8), **labels)
  splits = opened(tmp_path / "x.npz")
  train, held = (splits[k].describe() for k in ("train", "eval"))
  assert held["name"] == f"{train['name']}, the training images themselves" and held["hash"] == train["hash"]
  splits["train"].report(3, "truncated")
  assert splits["eval"].problems == [("3", "truncated")]


def test_eval_examples_caps_the_evaluation_and_keeps_the_extras():
  world = opened("sprites", train_examples=30, eval_examples=20)
  assert len(world["train"]) == 30 and len(world["eval"]) == 20
  some = source.Subset(world["train"], np.array([7, 3]), name="two")
  np.testing.assert_array_equal(some.extras["mask"], world["train"].extras["mask"][[7, 3]])
  np.testing.assert_array_equal(some.labels, world["train"].labels[[7, 3]])
  np.testing.assert_array_equal(some.images, world["train"].images[[7, 3]])


def test_npz_splits_are_read(tmp_path):
  images = lambda n: np.zeros((n, 2, 2, 3), np.uint8)
  np.savez(
    tmp_path / "x.npz",
    x_train=images(5),
    y_train=np.zeros((5, 1)),
    x_test=images(3),
    y_test=np.ones(3),
    x_val=images(2),
  )
  splits = opened(tmp_path / "x.npz")
  assert splits["train"].labels.tolist() == [0] * 5 and splits["eval"].labels.tolist() == [1] * 3
  assert len(opened(tmp_path / "x.npz", eval_split="val")["eval"]) == 2
  with pytest.raises(UserError, match="'best'.*train, test, val"):
    opened(tmp_path / "x.npz", split="best")


def test_the_hash_tells_other_data_and_survives_a_move(tmp_path):
  root = classes(tmp_path / "here" / "data", {"a": 2, "b": 2})
  archive(root, tmp_path / "here" / "x.tar")
  before = {s: opened(tmp_path / "here" / s)["train"].describe() for s in ("data", "x.tar")}
  (tmp_path / "here").rename(tmp_path / "there")
  for name, known in before.items():
    assert opened(tmp_path / "there" / name)["train"].describe() == known
  save(tmp_path / "there" / "data" / "a" / "9.png")
  assert opened(tmp_path / "there" / "data")["train"].describe()["hash"] != before["data"]["hash"]
  a, b = np.zeros((4, 2, 2, 3), np.uint8), np.ones((4, 2, 2, 3), np.uint8)
  assert source.Arrays(a).describe() != source.Arrays(b).describe()


def test_wrong_specs_name_what_is_near_or_accepted(tmp_path):
  classes(tmp_path / "photos", {"a": 1, "b": 1})
  (tmp_path / "empty").mkdir()
  (tmp_path / "shards").mkdir()
  archive(tmp_path / "photos", tmp_path / "shards" / "s-0.tar")
  (tmp_path / "notes.txt").write_text("x")
  np.savez(tmp_path / "x.npz", other=np.zeros(3))
  np.savez(tmp_path / "float.npz", images=np.zeros((3, 2, 2, 3)))
  np.savez(tmp_path / "onehot.npz", images=np.zeros((3, 2, 2, 3), np.uint8), labels=np.eye(3))
  (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:50])
  (tmp_path / "cut.tar").write_bytes(b"not a tar" * 100)
  cases = {
    "photo": "photos'", "empty": "no images in it", "shards": r"no images in it.*\*\.tar", "notes.txt": "no known kind",
    "x.npz": "found other", "float.npz": "expected uint8", "onehot.npz": r"\(3, 3\) for 3 images",
    "cut.npz": "not a readable", "cut.tar": "not a readable, uncompressed tar", "y.npz": "no such file.*x.npz",
    "shards/t-*.tar": "no such file", "shard/s-0.tar": "no such file",
  }  # fmt: skip
  for spec, message in cases.items():
    with pytest.raises(UserError, match=message):
      opened(tmp_path / spec)
  for spec, split, message in (
    (tmp_path / "photos", "c", "no such folder of images.*a, b"),
    ("sprites", "test", "expected 'train'"),
  ):
    with pytest.raises(UserError, match=message):
      opened(spec, split=split)


def test_a_folder_whose_name_looks_like_another_kind_is_a_folder(tmp_path):
  for name in ("my_tfrecords", "old.tar", "a{b}"):
    save(tmp_path / name / "x.png")
    assert len(opened(tmp_path / name)["train"]) == 1


def test_an_unknown_tfds_name_lists_what_is_there(tmp_path):
  pytest.importorskip("tensorflow_datasets")
  (tmp_path / "cifar10").mkdir()
  with pytest.raises(UserError, match="Did you mean 'cifar10'.*Prepared in"):
    opened("tfds:cifar1", data_dir=str(tmp_path))
  with pytest.raises(UserError, match="not prepared"):
    opened("tfds:mnist", data_dir=str(tmp_path))
  with pytest.raises(UserError, match="--data_dir=.*no such folder"):
    opened("tfds:mnist", data_dir=str(tmp_path / "none"))


def test_python_items_that_raise_or_are_no_images_are_bad_images():
  class Items:
    def __len__(self):
      return 3

    def __getitem__(self, i):
      return [{"image": pixels(0)}, {"picture": 1}, np.zeros(3)][i]

  found = source.Python(Items())
  np.testing.assert_array_equal(found.pixels(0), pixels(0))
  for i in (1, 2):
    with pytest.raises(decode.BadImage):
      found.pixels(i)
