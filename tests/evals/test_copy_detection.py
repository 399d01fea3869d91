"""Copy detection on a folder laid out as Copydays, and on synthetic copies."""

import numpy as np
import pytest
from PIL import Image

from big_ssl.core.config import build_named
from big_ssl.core.types import UserError
from big_ssl.data import sprites
from big_ssl.data.opening import open_folder
from big_ssl.data.source import Arrays
from big_ssl.evals.base import Evaluator
from big_ssl.evals.copies import KINDS, copy
from big_ssl.evals.copy_detection import CopyDetection
from big_ssl.ops import pca, retrieval

WORLD = sprites.render(np.arange(30), size=32).image


class Network:
  """A 4-pixel-patch backbone that averages each patch; random weights scale the colors."""

  patch = 4

  def __init__(self, scale=1.0):
    self.module, self.scale = self, scale

  def __call__(self, images):
    images = np.asarray(images)
    n, h, w, c = images.shape
    tokens = images.reshape(n, h // 4, 4, w // 4, 4, c).mean((2, 4)).reshape(n, -1, c)
    mix = np.sin(np.arange(1.0, 13).reshape(3, 4)) * self.scale
    tokens = np.concatenate([tokens, np.tanh(tokens @ mix)], axis=-1)
    weights = np.cos(np.arange(tokens.shape[1]))[None, :, None]
    return {"pooled": (tokens * weights).sum(1), "tokens": tokens}


class Extract:
  """Sprites as the run's data, folders as they are, the network above."""

  stride, size = (4, 4), (24, 24)

  def __init__(self):
    self.shapes = []

  def images(self, split):
    return Arrays(WORLD[:25] if split == "train" else WORLD, name=f"world/{split}")

  def folder(self, path, *, field):
    return open_folder(path, channels=3, field=field)

  def apply(self, function, images, *, weights="current"):
    self.shapes.append(images.shape)
    return np.asarray(function(Network(1.0 if weights == "current" else 0.0), images))


def save(root, images):
  for name, image in images.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / name)


@pytest.fixture
def copydays(tmp_path):
  root = tmp_path / "copydays"
  save(root, {f"original/{2000 + i}00.png": WORLD[i] for i in range(8)})
  save(root, {f"strong/{2000 + i}0{j}.png": copy(WORLD[i], kind="contrast", seed=j) for i in range(8) for j in range(2)})
  save(root, {f"crops/50/{2000 + i}00.png": WORLD[i] for i in range(8)})
  return root


def test_equal_copies_score_100_and_each_block_has_its_number(copydays):
  report = CopyDetection(data=str(copydays), size=32)(Extract())
  assert report.metrics["crops_50_map"] == pytest.approx(100), report.metrics
  assert 20 < report.metrics["strong_map"] < 100 and set(report.metrics) == {"crops_50_map", "strong_map"}, report.metrics
  assert report.images == {"crops_50_map": 8, "strong_map": 16}
  for word in ("copydays, 24 copies", "8 originals", "no distractors (8 in all)", "32x32 (bicubic)", "GeM (p=4)", "no whitening"):
    assert word in report.protocol, report.protocol


def test_the_score_is_that_of_the_descriptors_computed_one_by_one(copydays, tmp_path):
  save(tmp_path / "others", {f"{i}.png": WORLD[i] for i in range(8, 20)})
  evaluator = CopyDetection(data=str(copydays), size=32, distractors=str(tmp_path / "others"), whitening="train", top=2, batch_size=3)
  report = evaluator(Extract())

  def vector(image):
    out = Network()(image[None] / np.float32(255))
    return retrieval.copy_descriptor(np.asarray(out["pooled"]), patches=np.asarray(out["tokens"]))[0]

  fit = retrieval.fit_uncentered_whitening(np.stack([vector(x) for x in WORLD[:25]]))
  white = lambda images: pca.whiten(np.stack([vector(x) for x in images]), whitening=fit)
  database = white(WORLD[:20])
  queries = white([copy(WORLD[i], kind="contrast", seed=j) for i in range(8) for j in range(2)])
  expected = []
  for q, x in enumerate(queries):
    similarity = database @ x
    rank = int(np.sum(similarity > similarity[q // 2]))
    expected.append(0.0 if rank >= 2 else (float(rank == 0) + 1 / (rank + 1)) / 2)
  assert report.metrics["strong_map"] == pytest.approx(100 * np.mean(expected), abs=1e-3), report.metrics
  assert "12 distractors of others (20 in all)" in report.protocol and "from 25 images of world/train" in report.protocol
  assert "first 2 ranks" in report.protocol


def test_synthetic_copies_need_no_folder_and_are_found_by_a_network_better_than_by_chance():
  extract = Extract()
  report = CopyDetection(images=20, baselines=True)(extract)
  assert set(report.metrics) == {p + f"{k}_map" for p in ("", "random_init/") for k in KINDS} | {"map", "random_init/map"}
  assert report.metrics["map"] == pytest.approx(np.mean([report.metrics[f"{k}_map"] for k in KINDS]))
  chance = 100 * (1 + 0.5 * np.sum(1 / np.arange(2, 21))) / 20  # 11.5
  assert min(report.metrics[f"{k}_map"] for k in KINDS) > 2 * chance and report.metrics["blur_map"] > 90, report.metrics
  assert report.metrics["random_init/map"] != report.metrics["map"]
  assert {shape[1:] for shape in extract.shapes} == {(24, 24, 3)}  # the evaluation view's size
  assert "synthetic copies" in report.protocol and "20 images of world/eval" in report.protocol


def test_sides_are_rounded_to_whole_patches():
  extract = Extract()
  report = CopyDetection(images=4, copies=("jpeg",), size=30)(extract)
  assert {shape[1:3] for shape in extract.shapes} == {(28, 28)} and "28x28" in report.protocol


def test_features_that_are_not_finite_are_a_clear_error():
  extract = Extract()
  extract.apply = lambda function, images, **kw: np.full((len(images), 1, 4), np.nan)
  with pytest.raises(UserError, match="config.evals.copy_detection: .*not finite"):
    CopyDetection(images=3)(extract)


@pytest.mark.parametrize("output", ["pooled", "gem", "rmac", "pooled_gem"])
def test_every_descriptor_finds_copies_that_are_equal(output, copydays):
  evaluator = CopyDetection(data=str(copydays), size=32, output=output, whitening="train", whitening_dim=4, levels=2)
  report = evaluator(Extract())
  assert report.metrics["crops_50_map"] == pytest.approx(100), report.metrics
  assert "PCA to 4 dimensions" in report.protocol


@pytest.mark.parametrize("field", [{"power": 1.0, "output": "gem"}, {"levels": 1, "output": "rmac"}, {"whitening_images": 6}])
def test_fields_of_the_descriptor_have_an_effect(field):
  base = dict(images=30, copies=("contrast", "crop"), whitening="train", output=field.get("output", "pooled_gem"))
  found, other = CopyDetection(**base)(Extract()).metrics, CopyDetection(**base | field)(Extract()).metrics
  assert found != other


def test_copies_differ_from_the_original_and_are_the_same_for_the_same_seed():
  for image in (WORLD[0], WORLD[0][..., :1], WORLD[0].astype(np.uint16) * 257):
    for kind in KINDS:
      found = copy(image, kind=kind, seed=3)
      assert found.shape == image.shape and found.dtype == np.uint8, kind
      np.testing.assert_array_equal(found, copy(image, kind=kind, seed=3))
      assert np.abs(found.astype(int) - WORLD[0][..., : image.shape[-1]]).mean() > 1, kind
  assert not np.array_equal(copy(WORLD[0], kind="crop", seed=1), copy(WORLD[0], kind="crop", seed=2))
  with pytest.raises(UserError, match="copy 'jpg'.*Did you mean 'jpeg'"):
    copy(WORLD[0], kind="jpg", seed=0)


def test_mistakes_in_the_layout_name_the_file(copydays, tmp_path):
  run = lambda **fields: CopyDetection(size=32, **fields)(Extract())
  with pytest.raises(UserError, match="config.evals.copy_detection.data=.*copyday: no such folder. Did you mean '.*copydays'"):
    run(data=str(tmp_path / "copyday"))
  with pytest.raises(UserError, match="no image in original/"):
    run(data=str(copydays / "crops"))
  with pytest.raises(UserError, match="whitening_dim=9: 25 vectors of 7"):
    run(data=str(copydays), output="gem", whitening="train", whitening_dim=9)
  save(copydays, {"strong/900000.png": WORLD[0]})
  with pytest.raises(UserError, match="1 of 25 copies have no original, the first is strong/900000.png"):
    run(data=str(copydays))
  (copydays / "strong/900000.png").rename(copydays / "strong/200009.png")
  (copydays / "strong/200009.png").write_bytes(b"no picture")
  with pytest.raises(UserError, match="1 of 33 images cannot be read, the first is strong/200009.png"):
    run(data=str(copydays))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"copies": ("blurr",)}, "no copy 'blurr'. Did you mean 'blur'"),
    ({"top": -1}, "top=-1"),
    ({"power": 0.0}, "power=0.0"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"output": "cls"}, "expected one of 'pooled', 'gem'"),
  ],
)
def test_impossible_options_are_clear_errors(fields, message):
  with pytest.raises(UserError, match=f"config.evals.copy_detection.*{message}"):
    build_named("evals", {"name": "copy_detection", **fields}, Evaluator, path="config.evals.copy_detection")
