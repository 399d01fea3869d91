"""Attention masks: planted attention whose answer is known, and the attention of a small ViT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.config import build_named
from big_ssl.core.method import Trunk
from big_ssl.core.types import UserError
from big_ssl.data.decode import BadImage
from big_ssl.data.source import Arrays
from big_ssl.evals import attention_masks
from big_ssl.evals.attention_masks import AttentionMasks
from big_ssl.evals.base import Evaluator
from big_ssl.models.alexnet import AlexNet
from big_ssl.models.vit import ViT

TINY = ViT(variant="custom", width=8, depth=2, heads=2, mlp_dim=16, patch=4, image_size=16, registers=1)


class Extract:
  """A source of images and a backbone whose "random" weights are others."""

  def __init__(self, source, module=TINY, variables=None):
    self._source, self._module, self._variables = source, module, variables
    self.stride, self.shapes, self._compiled = (4, 4), [], {}

  def images(self, split):
    assert split == "eval"
    return self._source

  def apply(self, function, images, *, weights="current"):
    self.shapes.append(images.shape)
    variables = jax.tree.map(lambda x: x * (weights == "current"), self._variables)
    if function not in self._compiled:
      self._compiled[function] = jax.jit(lambda v, x: function(Trunk(self._module, v), x))
    return jax.tree.map(np.asarray, self._compiled[function](variables, images))


def objects(count=5, side=16):
  """Two objects, of red and of green, that patches of 4 divide; the mask of image 1 has only background."""
  labels = np.zeros((count, side, side), np.uint8)
  labels[:, :8, :4], labels[:, 8:12, 8:] = 1, 7
  labels[1] = 0
  images = np.stack([255 * (labels == 1), 255 * (labels == 7), 0 * labels], -1).astype(np.uint8)
  return Arrays(images, extras={"mask": labels}, name="objects")


@pytest.fixture
def planted(monkeypatch):
  """Heads that see red, green, and everything alike."""

  def attention(trunk, images, *, layer):
    del trunk, layer
    seen = images.reshape(len(images), images.shape[1] // 4, 4, -1, 4, 3).mean((2, 4))
    return jnp.moveaxis(seen.at[..., 2].set(1), -1, 1) + 1e-6

  monkeypatch.setattr(attention_masks, "class_attention", attention)


@pytest.fixture(scope="module")
def real():
  rng = np.random.default_rng(0)
  source = Arrays(rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8), extras={"mask": rng.integers(0, 3, (6, 16, 16))}, name="noise")
  variables = jax.jit(functools.partial(TINY.init, train=False))(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  return Extract(source, variables=jax.tree.map(lambda x: x + 0.3 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), variables))


def test_a_head_on_each_object_scores_100_for_the_best_head_and_its_share_for_the_mean(planted):
  # 0.99 of the mass is all patches of the object, and all patches of the image for the third head.
  report = AttentionMasks(size=16, keep=0.99, baselines=True)(Extract(objects()))
  m = report.metrics
  assert m["jaccard"] == m["random_init/jaccard"] == 100 and report.images == 4
  assert m["jaccard_head_0"] == m["jaccard_head_1"] == 50
  area = 100 * (2 / 16 + 2 / 16) / 2
  assert m["jaccard_head_2"] == pytest.approx(area) and m["jaccard_mean_head"] == pytest.approx((100 + area) / 3)
  for word in ("last block", "3 heads", "0.99", "4x4", "4 of 5 held-out", "squashed to 16", "objects", "255"):
    assert word in report.protocol, (word, report.protocol)


def test_images_are_enlarged_with_their_masks(planted):
  extract = Extract(objects())
  assert AttentionMasks(size=(48, 32), keep=0.9, batch_size=3)(extract).metrics["jaccard"] > 85
  assert set(extract.shapes) == {(3, 48, 32, 3)}


def test_what_patches_do_not_divide_is_cut_off(planted):
  extract = Extract(objects(side=19))
  assert AttentionMasks(size=0, keep=0.99)(extract).metrics["jaccard"] == 100
  assert set(extract.shapes) == {(32, 16, 16, 3)}
  with pytest.raises(UserError, match=r"config.evals.attention_masks.size=3: .* smaller than a patch of \(4, 4\)"):
    AttentionMasks(size=3)(extract)


@pytest.mark.parametrize("ignore", [255, 11])
def test_a_covered_void_counts_against_a_head(planted, ignore):
  source = objects()
  source.extras["mask"][:, :8, :2] = np.where(source.extras["mask"][:, :8, :2] == 1, ignore, 0)
  report = AttentionMasks(size=16, keep=0.99, ignore=ignore)(Extract(source))
  assert report.metrics["jaccard_head_0"] == pytest.approx(25) and report.metrics["jaccard_head_1"] == 50
  assert f"labels other than 0 and {ignore}" in report.protocol


def test_an_image_that_cannot_be_read_is_left_out(planted):
  class Damaged(Arrays):
    def pixels(self, index, *, canvas=0):
      if index == 2:
        raise BadImage("truncated")
      return super().pixels(index)

  good = objects()
  report = AttentionMasks(size=16, keep=0.99)(Extract(Damaged(good.images, extras=good.extras, name="d")))
  assert report.metrics["jaccard"] == 100 and "3 of 5 held-out" in report.protocol and "1 cannot be read" in report.protocol


def test_masks_that_cannot_be_read_are_told_with_the_first_reason():
  class Color(Arrays):
    def mask(self, index):
      raise BadImage("a mask of mode RGB")

  good = objects()
  report = AttentionMasks(size=16)(Extract(Color(good.images, extras=good.extras, name="d")))
  assert report.metrics == {} and "5 of the images cannot be read, 0: a mask of mode RGB" in report.protocol, report.protocol


@pytest.mark.parametrize("change", [dict(layer=0), dict(keep=0.2), dict(size=24), dict(max_images=2)], ids=lambda c: next(iter(c)))
def test_each_field_changes_the_numbers_and_the_protocol(change, real):
  plain = AttentionMasks(size=16, batch_size=4)
  one, other = plain(real), dataclasses.replace(plain, **change)(real)
  assert one.metrics != other.metrics and one.protocol != other.protocol


def test_a_batch_that_is_not_full_changes_nothing(real):
  one, other = (AttentionMasks(size=16, batch_size=b)(real).metrics for b in (6, 4))
  assert one == pytest.approx(other, abs=1e-9) and set(one) == {"jaccard", "jaccard_mean_head", "jaccard_head_0", "jaccard_head_1"}


def test_what_cannot_be_computed_says_why(real):
  report = AttentionMasks()(Extract(objects(), module=AlexNet(), variables={}))
  assert report.metrics == {} and "not computed: the backbone has no attention" in report.protocol
  assert "the data has no masks" in AttentionMasks()(Extract(Arrays(np.zeros((2, 8, 8, 3), np.uint8)))).protocol
  none = Arrays(np.zeros((2, 8, 8, 3), np.uint8), extras={"mask": np.full((2, 8, 8), 255)})
  assert "no object in any mask" in AttentionMasks(size=8)(Extract(none, variables=real._variables)).protocol
  with pytest.raises(UserError, match="attention of block 5: config.model has 2"):
    AttentionMasks(size=16, layer=5)(real)


@pytest.mark.parametrize(("fields", "message"), [({"keep": 1.0}, "keep=1"), ({"size": -4}, "size=-4"), ({"batch_size": 0}, "batch_size=0")])
def test_impossible_fields_are_refused(fields, message):
  with pytest.raises(UserError, match=f"config.evals.attention_masks.{message}"):
    AttentionMasks(**fields)


def test_a_config_builds_it():
  found = build_named("evals", {"name": "attention_masks", "size": 480}, Evaluator, path="config.evals.attention_masks")
  assert found == AttentionMasks(size=480)
