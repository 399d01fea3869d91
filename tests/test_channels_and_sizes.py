"""Images of any number of channels, normalized by their own numbers; and sizes that a backbone's patches do not divide."""

import re

import engine
import jax
import numpy as np
import pytest

from big_ssl import setup
from big_ssl.core.types import UserError
from big_ssl.methods.parts import check_views
from big_ssl.models.resnet import ResNet
from big_ssl.models.vit import ViT
from big_ssl.models.xcit import XCiT

_NO_COLORS = {"method.color_strength": 0, "method.gray": 0}


@pytest.fixture
def images(tmp_path):
  def write(channels: int) -> dict:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 36, channels), dtype=np.uint8)
    np.savez(tmp_path / f"{channels}.npz", images=pixels)
    return {"data.source": str(tmp_path / f"{channels}.npz"), "evals": {}}

  return write


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("method", ["msn", "simclr"])
def test_a_run_is_normalized_by_as_many_numbers_as_the_images_have_channels(method, channels, images):
  mean = tuple(round(0.3 + 0.1 * c, 1) for c in range(channels))
  changes = images(channels) | {"method.mean": mean, "method.std": (0.2,) * channels} | (_NO_COLORS if channels > 3 else {})
  run = setup.make_run(engine.small(method, **{"model.depth": 1} | changes), devices=jax.devices()[:1])
  assert run.protocol()["mean"] == mean and run.method.image_channels == channels
  kernels = jax.tree.leaves(run.abstract_state.params["encoder"]["backbone"]["patch_embed"])
  assert [k.shape[2] for k in kernels if k.ndim == 4] == [channels]
  run.trace_steps()


@pytest.mark.parametrize(
  "channels,changes,found",
  [
    (1, {"method.mean": (0.5, 0.5, 0.5), "method.std": (0.2, 0.2, 0.2)}, r"mean=\(0.5, 0.5, 0.5\).*the images have 1 channel, .* or \(\) for none"),
    (5, {"method.mean": (0.5,), "method.std": (0.2,)}, "the images have 5 channels"),
    (5, {}, "ColorJitter needs .*; got 5. Set config.method.color_strength=0 and config.method.gray=0"),
  ],
)
def test_what_images_of_these_channels_cannot_pass_is_a_clear_error(channels, changes, found, images):
  with pytest.raises(UserError, match=found):
    setup.make_run(engine.small("simclr", **images(channels), **changes), devices=jax.devices()[:1])


def test_as_many_means_as_deviations_are_asked_for_before_the_data_is_opened():
  config = engine.load("simclr", **{"method.mean": (0.5, 0.5), "method.std": (0.2,), "data.source": "/no/such/folder"})
  with pytest.raises(UserError, match="config.method.mean=.*as many values of both"):
    setup.make_run(config, devices=jax.devices()[:1])


def method_of(name: str, *, channels: int = 3, **changes):
  config = engine.load(name, **changes)
  return setup.make_method(config, total_steps=100, num_examples=4096, channels=channels, num_classes=10)


@pytest.mark.parametrize("name", engine.methods())
def test_the_error_about_colors_says_what_to_set(name):
  method = method_of(name, channels=5, **{"method.mean": (), "method.std": ()})
  try:
    check_views(method)
  except UserError as error:
    fields = dict(re.findall(r"config\.method\.(\w+)=([0-9,]+)", str(error)))
    values = {key: tuple(map(int, text.split(","))) if "," in text else int(text) for key, text in fields.items()}
    check_views(method.replace(**values))
  else:
    assert not getattr(method, "gray", 0)


PATCHED = ["simclr", "byol", "moco", "moco_v3", "paws", "sela", "deepcluster", "segmentation", "supervised"]


@pytest.mark.parametrize("name", PATCHED)
def test_a_size_that_patches_do_not_divide_is_refused_and_other_backbones_take_it(name):
  field, vit = "big_size" if name == "paws" else "size", ViT(variant="Ti", patch=8)
  method = method_of(name).replace(model=vit)
  check_views(method)
  with pytest.raises(UserError, match=rf"config.method.{field}=\(32, 30\): must be a multiple of config.model.patch=8"):
    check_views(method.replace(**{field: (32, 30)}))
  for model in (ResNet(depth=18), XCiT(patch=8), ViT(variant="Ti", patch=8, stem_channels=(8, 16, 32))):
    check_views(method.replace(model=model, **{field: (32, 30)}))


@pytest.mark.parametrize("name", ["simclr", "navit"])
def test_of_packed_images_the_evaluation_is_held_to_the_patches_and_no_size_is_nothing(name):
  method = method_of(name, **{"model.patch": 8})
  with pytest.raises(UserError, match="config.method.size=30: must be a multiple of config.model.patch=8"):
    check_views(method.replace(size=30))
  for size in (0, (32, 0), -8):
    with pytest.raises(UserError, match=re.escape(f"config.method.size={size}: expected at least 1 pixel")):
      check_views(method.replace(size=size))


def test_the_crop_of_a_teacher_is_not_held_to_the_patches_of_the_student():
  method = method_of("distillation").replace(teacher={"patch": 6, "image_size": 30}, teacher_size=30)
  assert 30 % method.model.patch
  check_views(method)
