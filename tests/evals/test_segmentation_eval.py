"""The linear probe for segmentation: perfect features, other sizes, ignored labels, devices, and the errors."""

import dataclasses
import functools

import engine
import jax
import numpy as np
import pytest

from big_ssl import setup
from big_ssl.core.types import UserError
from big_ssl.data.decode import BadImage
from big_ssl.evals.segmentation import Segmentation
from big_ssl.evals.windows import resize
from big_ssl.evaluate import Extractor

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 200, 0]], np.uint8)
QUICK = dict(steps=150, batch_size=4, lrs=(0.03,), dropout=0.0)


@dataclasses.dataclass
class Pictures:
  """Blobs in a color per class."""

  count: int
  shape: tuple[int, int] = (12, 16)
  classes: int = 3
  seed: int = 0
  labels = None
  has_masks = True

  def __len__(self):
    return self.count

  def mask(self, i):
    y, x = np.mgrid[: self.shape[0], : self.shape[1]]
    wave = np.sin(0.3 * y + i + self.seed) + np.cos(0.4 * x + 2 * i)
    return np.clip((wave + 2) / 4 * self.classes, 0, self.classes - 1).astype(np.int32)

  def pixels(self, i):
    return COLORS[self.mask(i)]

  def name(self, i):
    return f"{i}.png"

  def describe(self):
    return {"name": "blobs"}


class Mean:
  """A backbone whose tokens are the mean colors of its patches; random weights see nothing."""

  def __init__(self, patch):
    self.patch = patch

  def __call__(self, images):
    n, h, w, c = images.shape
    tokens = images.reshape(n, h // self.patch, self.patch, w // self.patch, self.patch, c).mean((2, 4))
    return {"tokens": tokens.reshape(n, -1, c)}


@dataclasses.dataclass
class Fake:
  train: Pictures
  held_out: Pictures
  patch: int = 1
  decoder: bool = False
  shapes: list = dataclasses.field(default_factory=list)

  def images(self, split):
    return self.train if split == "train" else self.held_out

  @property
  def stride(self):
    return self.patch, self.patch

  def apply(self, function, images, *, weights="current"):
    self.shapes.append(images.shape)
    trunk = functools.partial(Mean(self.patch))
    trunk.module = Mean(self.patch)
    if self.decoder:  # red, green and blue are the logits of the classes, or of no class with random weights
      trunk.segment = lambda images: images if weights == "current" else -images
    out = jax.jit(functools.partial(function, trunk))(images if weights == "current" or self.decoder else 0 * images)
    return jax.tree.map(np.asarray, out)


def blobs(patch=1, held_out=3, **kwargs):
  return Fake(Pictures(7, **kwargs), Pictures(held_out, seed=9, **kwargs), patch)


def test_features_that_say_the_class_score_100_and_the_baselines_are_told_apart():
  report = Segmentation(**QUICK, baselines=True, class_names=("sky",))(blobs())
  m = report.metrics
  assert m["miou"] == m["mean_dice"] == m["pixel_accuracy"] == m["mean_accuracy"] == m["iou/sky"] == m["iou/2"] == 100, m
  assert m["raw_colors/miou"] == 100 and m["random_init/miou"] < 40, m
  for word in (
    "150 AdamW steps of 4",
    "lr 0.03",
    "3 held-out",
    "7 of 7 training",
    "label 255 ignored",
    "blobs",
    "576 pixels",
  ):
    assert word in report.protocol, report.protocol


def test_windows_scales_and_flips_of_an_image_at_any_size_keep_perfect_features_near_perfect():
  options = dict(size=14, window=8, stride=5, scales=(1.0, 1.5), flip=True)
  m = Segmentation(**QUICK, **options)(blobs()).metrics
  assert m["miou"] > 90, m  # mirrored images that are not mirrored back would score far less


def test_every_batch_is_full_and_what_fills_it_changes_nothing():
  few, fake = blobs(held_out=3), blobs(held_out=3)
  one = Segmentation(**QUICK)(few).metrics
  other = Segmentation(**QUICK | {"batch_size": 4, "max_images": 7})(fake).metrics
  assert one == other and {s[0] for s in fake.shapes} == {4}, fake.shapes


def test_patches_that_do_not_divide_the_image_are_padded_and_cut_back():
  fake = blobs(patch=4, shape=(10, 14))
  fake.apply = lambda f, images, **kw: Fake.apply(fake, f, images, **kw)
  m = Segmentation(**QUICK)(fake).metrics
  assert 50 < m["miou"] < 100, m


def test_ignored_and_dropped_labels_count_for_nothing():
  fake = blobs(classes=3)
  m = Segmentation(**QUICK, ignore=2)(fake).metrics
  assert "iou/2" not in m and m["miou"] == 100, m
  report = Segmentation(**QUICK, drop_first=True)(fake)
  assert "iou/2" not in report.metrics and "label 0 dropped" in report.protocol, report
  counted = sum((fake.held_out.mask(i) > 0).sum() for i in range(3))
  assert f"{counted} pixels" in report.protocol, report.protocol


def test_a_class_without_a_training_pixel_is_missed_and_lowers_the_mean():
  fake = Fake(Pictures(7, classes=3), Pictures(3, classes=4))
  m = Segmentation(**QUICK)(fake).metrics
  assert m["iou/3"] == 0 and m["miou"] < m["mean_dice"] < 100, m


def test_the_learning_rate_is_chosen_on_training_images():
  fake = blobs(classes=4)
  fake.train.count = 20
  report = Segmentation(**QUICK | {"lrs": (1e-7, 0.03)})(fake)
  assert report.metrics["miou"] == 100 and "lr 0.03 of (1e-07, 0.03) by a tenth" in report.protocol, report
  assert "(at the edge of these)" in report.protocol


def test_images_that_do_not_fit_into_the_memory_are_left_out_and_told():
  report = Segmentation(**QUICK, memory_gib=3 * 12 * 16 * 8 / 2**30)(blobs())
  assert "3 of 7 training images" in report.protocol, report.protocol


def test_a_trained_decoder_is_scored_as_it_is_and_asked_of_a_method_that_has_none_a_clear_error():
  fake = blobs()
  fake.decoder = True
  report = Segmentation(head="trained", baselines=True, batch_size=4)(fake)
  assert report.metrics["miou"] == 100 and report.metrics["random_init/miou"] == 0, report
  assert "by the trained decoder" in report.protocol and len(fake.shapes) == 2, "training images were read"
  with pytest.raises(UserError, match="head='trained': config.method has no decoder"):
    Segmentation(head="trained")(blobs())


def test_images_that_cannot_be_read_are_not_counted_and_the_first_reason_is_told_where_none_is_left():
  fake, mask = blobs(), Pictures(3, seed=9).mask
  fake.decoder = True

  def damaged(rows):
    def read(i):
      if i in rows:
        raise BadImage("a mask of mode RGB")
      return mask(i)

    return read

  fake.held_out.pixels = lambda i: COLORS[mask(i)]
  fake.held_out.mask = damaged({1})
  report = Segmentation(head="trained", batch_size=4)(fake)
  assert report.images == 2 and "2 held-out images" in report.protocol, report
  fake.held_out.mask = damaged({0, 1, 2})
  report = Segmentation(head="trained", batch_size=4)(fake)
  assert report.metrics == {} and "3 of the images cannot be read, 0.png: a mask of mode RGB" in report.protocol, report


def test_recipes_score_as_their_sources_do():
  stride = {recipe: engine.load("segmentation", recipe).evals["segmentation"]["stride"] for recipe in ("ade20k_linear", "ade20k_mask", "cityscapes")}
  assert stride == {"ade20k_linear": 341, "ade20k_mask": 512, "cityscapes": 512}
  augreg = engine.load("segmentation", "cityscapes").method
  assert tuple(augreg["mean"]) == tuple(augreg["std"]) == (0.5, 0.5, 0.5)


def test_without_masks_there_is_no_number():
  fake = blobs()
  fake.held_out.has_masks = False
  report = Segmentation()(fake)
  assert report.metrics == {} and "no masks" in report.protocol


def test_unfit_masks_and_images_are_clear_errors():
  with pytest.raises(UserError, match="num_classes=2: the mask of .*png holds the label 2; ignored is 255"):
    Segmentation(**QUICK, num_classes=2)(blobs())
  mixed = blobs()
  mixed.train.mask = lambda i: np.zeros((12, 16) if i else (6, 8), np.int32)
  mixed.train.pixels = lambda i: np.zeros((12, 16, 3) if i else (6, 8, 3), np.uint8)
  with pytest.raises(UserError, match="size=0: training images become .*; give .height, width., or a window"):
    Segmentation(**QUICK)(mixed)
  turned = blobs()
  turned.train.pixels = lambda i: np.zeros((16, 12, 3), np.uint8)
  with pytest.raises(UserError, match="image and mask are 16x12 and 12x16"):
    Segmentation(**QUICK)(turned)


@pytest.mark.parametrize(
  "field,value", [("layers", 0), ("stride", 3), ("lrs", ()), ("scales", (0.0,)), ("size", -2), ("output", "cls")]
)
def test_impossible_options_are_clear_errors(field, value):
  with pytest.raises(UserError, match=f"config.evals.segmentation.{field}="):
    Segmentation(**{field: value})


def test_windows_between_which_pixels_would_be_left_out_are_refused():
  assert Segmentation(window=8, stride=8).stride == 8
  with pytest.raises(UserError, match=r"config.evals.segmentation.stride=9: expected at most config.evals.segmentation.window=8"):
    Segmentation(window=8, stride=9)


def test_images_are_resized_as_the_mean_of_what_is_under_a_pixel():
  image = np.random.default_rng(0).uniform(size=(6, 8, 3)).astype(np.float32)
  np.testing.assert_allclose(resize(image, shape=(1, 1))[0, 0].mean(), image.mean(), atol=0.05)
  np.testing.assert_allclose(resize(image, shape=(12, 16)), jax.image.resize(image, (12, 16, 3), "linear"), atol=1e-6)


def test_eight_devices_give_the_numbers_of_one_for_a_probe_and_for_the_trained_decoder():
  probe = Segmentation(steps=20, batch_size=16, lrs=(0.01,))
  decoder = Segmentation(head="trained", batch_size=16)
  found = []
  for devices in (1, 8):
    sizes = {"data.train_examples": 20, "data.eval_examples": 9, "data.image_size": 24}
    run = setup.make_run(engine.small("segmentation", **sizes), devices=jax.devices()[:devices])
    extract = Extractor(run)
    extract.state = run.initial_state()
    found.append([e(extract, mesh=run.mesh).metrics for e in (probe, decoder)])
  for one, eight in zip(*found, strict=True):
    assert one == pytest.approx(eight, abs=0.05) and one["miou"] > 5, found
