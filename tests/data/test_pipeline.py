"""Batches: a pure function of (seed, step), the same for any number of hosts, and whole whatever the files hold."""

import functools
import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from big_ssl.augment import resample
from big_ssl.core.method import ClassBalanced, Inputs, Sequential, View
from big_ssl.core.types import UserError
from big_ssl.data import opening, source
from big_ssl.data.pipeline import Pipeline

ROOT = pathlib.Path(__file__).parents[2]
VIEWS = (
  View(name="global", size=24, count=2, interpolation="bicubic"),
  View(name="local", size=(8, 12), count=3, scale=(0.05, 0.4)),
)
BAD = {"bad_cut.jpg": "truncated", "bad_empty.jpg": "empty file", "bad_text.jpg": "not a picture", "bad_cut.png": ""}


def picture(seed: int, height: int, width: int) -> Image.Image:
  """Smooth noise, so that JPEG keeps it."""
  small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
  return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Ten readable images of all kinds, and four that are not."""
  root = tmp_path_factory.mktemp("images")
  exif = Image.Exif()
  exif[0x0112] = 6
  for i in range(4):
    picture(i, 60 + 7 * i, 90 - 11 * i).save(root / f"plain_{i}.jpg", quality=95)
  picture(4, 50, 70).convert("L").save(root / "gray.jpg")
  picture(5, 50, 70).convert("CMYK").save(root / "cmyk.jpg")
  picture(6, 40, 80).save(root / "rotated.jpg", exif=exif)
  picture(7, 33, 21).save(root / "small.png")
  picture(8, 1, 1).save(root / "dot.png")
  picture(9, 300, 400).save(root / "large.jpg", quality=95)
  (root / "bad_cut.jpg").write_bytes((root / "plain_0.jpg").read_bytes()[:900])
  (root / "bad_cut.png").write_bytes((root / "small.png").read_bytes()[:200])
  (root / "bad_empty.jpg").write_bytes(b"")
  (root / "bad_text.jpg").write_text("this is a text")
  return root


def opened(folder):
  return opening.open_splits(str(folder))["train"]


def make(data, *, rows=(0, 8), batch_size=8, views=VIEWS, crop="device", canvas=64, **kwargs) -> Pipeline:
  keys = {k: kwargs.pop(k) for k in ("keys", "sampler") if k in kwargs}
  options = {"threads": 2, "prefetch": 2, "seed": 3} | kwargs
  return Pipeline(
    data, Inputs(views=views, **keys), rows=rows, batch_size=batch_size, crop=crop, canvas=canvas, **options
  )


def assert_equal(a: dict, b: dict) -> None:
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert a[key].dtype == b[key].dtype, key


def arrays(count: int = 20, shape=(32, 40, 3), dtype=np.uint8) -> source.Arrays:
  high = np.iinfo(dtype).max
  images = np.stack([np.asarray(picture(i, *shape[:2]), np.float64) / 255 * high for i in range(count)]).astype(dtype)
  return source.Arrays(images[..., : shape[2]], np.arange(count) % 3)


@pytest.mark.parametrize("crop", ["device", "host"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_one_global_batch(folder, crop, hosts):
  whole = make(opened(folder), crop=crop).batch(5)
  share = 8 // hosts
  parts = [make(opened(folder), crop=crop, rows=(h * share, (h + 1) * share)).batch(5) for h in range(hosts)]
  assert_equal(whole, {key: np.concatenate([p[key] for p in parts]) for key in whole})


@pytest.mark.parametrize("crop", ["device", "host"])
@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_iterating_gives_the_batches_of_the_steps(folder, crop, kind):
  pipeline = make(opened(folder) if kind == "files" else arrays(), crop=crop)
  run = list(pipeline.iterate(2, 6))
  assert [step for step, _ in run] == [2, 3, 4, 5]
  assert_equal(run[2][1], pipeline.batch(4))
  assert_equal(run[2][1], make(opened(folder) if kind == "files" else arrays(), crop=crop, threads=1).batch(4))
  assert not np.array_equal(run[0][1]["index"], run[1][1]["index"])


def test_the_spec_is_what_a_batch_looks_like(folder):
  boxed = (*VIEWS, View(name="boxed", size=8, return_box=True))
  for views in (VIEWS, boxed):
    for crop in ("device", "host"):
      for data in (opened(folder), arrays(), arrays(dtype=np.uint16)):
        for sampler in ({}, {"sampler": Sequential()}):
          keys = {"keys": ("label",)} if data.labels is not None else {}
          pipeline = make(data, crop=crop, views=views, **sampler, **keys)
          shapes = lambda b: {k: (v.shape, v.dtype) for k, v in b.items()}
          assert shapes(pipeline.spec()) == shapes(pipeline.batch(0))


def test_a_far_step_reads_its_own_images_only():
  reads = []

  class Items:
    def __len__(self):
      return 10**7

    def __getitem__(self, i):
      reads.append(i)
      return np.full((4, 4, 3), i % 256, np.uint8)

  batch = make(source.Python(Items())).batch(10**6)
  assert sorted(reads) == sorted(batch["index"].tolist()) and len(reads) == 8
  np.testing.assert_array_equal(batch["canvas"][:, 0, 0, 0], batch["index"] % 256)


@pytest.mark.parametrize("kind", ["files", "arrays", "16 bits"])
def test_host_crops_are_the_device_crops_rounded(folder, kind):
  views = (
    *VIEWS,
    View(name="center", size=20, crop="center", center_fraction=0.9, flip=0),
    View(name="whole", size=9, crop="none"),
  )
  data = {"files": lambda: opened(folder), "arrays": arrays, "16 bits": lambda: arrays(dtype=np.uint16)}[kind]()
  host, device = make(data, crop="host", views=views).batch(1), make(data, views=views).batch(1)
  np.testing.assert_array_equal(host["index"], device["index"])
  canvas = device["canvas"] if kind == "files" else data.images[device["index"]]
  size = device.get("size", np.broadcast_to(np.array(canvas.shape[1:3]), (8, 2)))
  for view in views:
    cut = jax.jit(functools.partial(resample.cut, size=view.shape, interpolation=view.interpolation))(
      canvas,
      device[f"{view.name}/box"],
      device[f"{view.name}/flip"],
      sizes=size if view.crop == "center" else None,
    )
    high = np.iinfo(canvas.dtype).max
    error = np.abs(np.asarray(cut) * high - host[f"{view.name}/pixels"]).max()
    assert error <= 0.51 * (1 if high == 255 else 2), (view.name, error)


def test_without_tensorflow_the_pixels_are_the_same_up_to_the_decoder(folder, monkeypatch):
  pytest.importorskip("tensorflow")
  fast = make(opened(folder), sampler=Sequential(), batch_size=14, rows=(0, 14)).batch(0)
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  slow = make(opened(folder), sampler=Sequential(), batch_size=14, rows=(0, 14)).batch(0)
  for key in fast.keys() - {"canvas"}:
    np.testing.assert_array_equal(fast[key], slow[key], err_msg=key)
  error = np.abs(fast["canvas"].astype(int) - slow["canvas"])
  assert error.max() <= 2 and error.mean() < 0.1, (error.max(), error.mean())


@pytest.mark.parametrize("tensorflow", [True, False])
@pytest.mark.parametrize("crop", ["device", "host"])
def test_bad_images_are_replaced_marked_and_listed(folder, crop, tensorflow, monkeypatch):
  if not tensorflow:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
  data = opened(folder)
  pipeline = make(data, crop=crop, sampler=Sequential(), batch_size=16, rows=(0, 16))
  batch = pipeline.batch(0)
  names = [data.name(i) for i in range(14)]
  bad = np.array([n in BAD for n in names])
  assert bad.sum() == 4 and batch["index"].shape == (16,)
  np.testing.assert_array_equal(batch["valid"], np.append(~bad, [False, False]))  # the last two are past the end
  np.testing.assert_array_equal(batch["index"][:14][~bad], np.flatnonzero(~bad))
  assert all(names[i] not in BAD for i in batch["index"])
  assert [name for name, _ in data.problems] == sorted(BAD)
  for name, reason in data.problems:
    assert BAD[name] in reason and reason, (name, reason)


@pytest.mark.parametrize("tensorflow", [True, False])
def test_a_source_of_bad_images_only_is_an_error(tmp_path, tensorflow, monkeypatch):
  if not tensorflow:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
  for i in range(3):
    (tmp_path / f"{i}.jpg").write_text("text")
  for run in (lambda p: p.batch(0), lambda p: next(p.iterate(0, 2))):
    with pytest.raises(UserError, match="no readable image in place of .*: none of 3 can be read.*not a picture"):
      run(make(opened(tmp_path)))


@pytest.mark.parametrize("sampler", [Sequential(), ClassBalanced(classes_per_step=2, images_per_class=8)])
def test_a_folder_of_bad_images_is_passed_over(sampler):
  class Items:
    def __len__(self):
      return 600

    def __getitem__(self, i):
      if 20 <= i < 500:
        raise OSError("bad sector")
      return np.full((4, 4, 3), i % 256, np.uint8)

  data = source.Python(Items(), labels=np.arange(600) % 2)
  batch = make(data, sampler=sampler, batch_size=16, rows=(0, 16)).batch(20)
  assert not np.any((batch["index"] >= 20) & (batch["index"] < 500)) and 1 < len(data.problems) <= 480


def test_a_file_that_vanishes_is_a_bad_image(folder, tmp_path):
  for i in range(4):
    picture(i, 20, 20).save(tmp_path / f"{i}.jpg")
  data = opened(tmp_path)
  (tmp_path / "1.jpg").unlink()
  batch = make(data, sampler=Sequential(), batch_size=4, rows=(0, 4)).batch(0)
  assert batch["index"].tolist() == [0, 2, 2, 3] and batch["valid"].tolist() == [True, False, True, True]
  assert data.problems == [("1.jpg", "No such file or directory")]


@pytest.mark.parametrize("tensorflow", [True, False])
@pytest.mark.parametrize("form", ["jpg", "png"])
def test_very_long_images_fit_the_canvas(tmp_path, form, tensorflow, monkeypatch):
  if not tensorflow:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
  picture(0, 20_000, 30).save(tmp_path / f"tall.{form}")
  picture(1, 30, 20_000).save(tmp_path / f"wide.{form}")
  batch = make(opened(tmp_path), batch_size=2, rows=(0, 2), sampler=Sequential()).batch(0)
  assert batch["size"].tolist() == [[64, 1], [1, 64]] and batch["valid"].all()
  assert batch["canvas"][0, :, 0].std() > 5 and not batch["canvas"][0, :, 1:].any()


def test_a_folder_of_other_formats_does_not_fill_the_log(tmp_path):
  pytest.importorskip("tensorflow")
  for i in range(4):
    picture(i, 20, 20).save(tmp_path / f"{i}.png")
  program = f"""
from big_ssl.core.method import Inputs, View
from big_ssl.data import opening, pipeline
data = opening.open_splits({str(tmp_path)!r})["train"]
made = pipeline.Pipeline(data, Inputs(views=(View(name="v", size=8),)), batch_size=4, seed=0, rows=(0, 4), canvas=32)
print(len(list(made.iterate(0, 3))))
"""
  env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "1"}  # warnings; the tests hide them
  done = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "3"
  about_data = [
    line for line in done.stderr.splitlines() if "slow path" in line or "OP_REQUIRES" in line or "Error" in line
  ]
  assert not about_data, about_data


def test_images_in_memory_are_sent_as_indices_with_the_same_boxes():
  data = arrays()
  resident, sent = (
    make(data, keys=("label",)),
    make(data, keys=("label",), views=(*VIEWS, View(name="b", size=4, return_box=True))),
  )
  batch = resident.batch(2)
  assert resident.resident is data.images and make(data, crop="host").resident is None
  assert set(batch) == {"index", "label"} | {f"{v.name}/{k}" for v in VIEWS for k in ("box", "flip")}
  np.testing.assert_array_equal(batch["label"], batch["index"] % 3)
  other = sent.batch(2)
  assert all(np.array_equal(other[k], v) for k, v in batch.items()), "a further view changes no other one"
  assert (other["size"] == [32, 40]).all()


def test_keys_come_along_and_a_missing_one_is_an_error():
  world = opening.open_splits("sprites", train_examples=30, eval_examples=10)["train"]
  batch = make(world, keys=("label", "mask")).batch(1)
  np.testing.assert_array_equal(batch["mask"], world.extras["mask"][batch["index"]])
  with pytest.raises(UserError, match="no 'depth'.*label, mask, box"):
    make(world, keys=("depth",))


def test_streams_and_seeds_draw_other_images():
  first = make(arrays()).batch(0)
  assert_equal(first, make(arrays()).batch(0))
  for other in (make(arrays(), seed=4), make(arrays(), stream="support")):
    assert not np.array_equal(first["index"], other.batch(0)["index"])


def test_a_given_order_is_followed():
  reverse = np.arange(20)[::-1]
  batches = [b["index"] for _, b in make(arrays()).iterate(0, 5, order=lambda epoch: reverse if epoch == 1 else None)]
  indices = np.concatenate(batches)
  np.testing.assert_array_equal(indices[20:40], reverse)
  np.testing.assert_array_equal(np.sort(indices[:20]), np.arange(20))


def test_leaving_an_iterator_early_ends_its_thread(folder):
  before = threading.active_count()
  iterator = make(arrays()).iterate(0, 10**9)
  next(iterator)
  assert threading.active_count() == before + 1
  iterator.close()
  assert threading.active_count() == before


def test_fewer_images_than_a_batch_repeat():
  batch = make(arrays(3)).batch(0)
  assert batch["index"].shape == (8,) and set(batch["index"]) == {0, 1, 2}
