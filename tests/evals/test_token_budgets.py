"""k-NN at several token budgets: grids, features of an image alone, the number of shapes, mistakes."""

import jax
import numpy as np
import pytest

from big_ssl.core.config import build_named
from big_ssl.core.method import Trunk
from big_ssl.core.types import UserError
from big_ssl.data.source import Python
from big_ssl.evals.base import Evaluator, Features
from big_ssl.evals.knn import Knn
from big_ssl.evals.token_budgets import TokenBudgets
from big_ssl.evals.windows import filled, resize
from big_ssl.models.navit import NaViT
from big_ssl.models.vit import ViT

BUDGETS = TokenBudgets(budgets=(6, 20), k=3, batch_size=4)
# Height and width, and the largest grids of 4-pixel patches with at most 6 and 20 of them that keep the aspect.
GRIDS = {(24, 24): [(2, 2), (4, 4)], (16, 32): [(2, 3), (3, 6)], (40, 20): [(3, 2), (6, 3)]}


def source(count, seed, labels=True):
  """Images of three shapes, whose class is a color among noise."""
  rng, shapes = np.random.default_rng(seed), list(GRIDS)
  y = np.arange(count) % 3
  images = [rng.integers(0, 200, (*shapes[i // 3 % 3], 3), dtype=np.uint8) for i in range(count)]
  for image, label in zip(images, y, strict=True):
    image[..., label] += 40
  return Python(images, labels=y if labels else None)


class Means:
  """A backbone of 4-pixel patches: their mean color, weighted by place."""

  def __call__(self, images):
    n, h, w, c = images.shape
    tokens = np.asarray(images).reshape(n, h // 4, 4, w // 4, 4, c).mean((2, 4)).reshape(n, -1, c)
    return {"pooled": np.concatenate([tokens.mean(1), tokens.std(1)], axis=1), "tokens": tokens, "attention": {}}


class Extract:
  stride, size = (4, 4), (24, 24)

  def __init__(self, trunk=None, **splits):
    self.splits = {"train": source(24, 0), "eval": source(12, 1)} | splits
    self.trunk, self.shapes = trunk or Means(), []

  def images(self, split):
    return self.splits[split]

  def apply(self, function, images, *, weights="current"):
    self.shapes.append(images.shape)
    return np.asarray(function(self.trunk, images * (1.0 if weights == "current" else 0.0) + 0.1))


def one_by_one(extract, budget):
  """k-NN of features of every image alone."""

  def features(split, **kwargs):
    images, rows = extract.images(split), []
    for i in range(len(images)):
      image = images.pixels(i).astype(np.float32) / 255
      h, w = GRIDS[image.shape[:2]][budget]
      rows.append(np.asarray(extract.apply(BUDGETS.outputs, resize(image, shape=(4 * h, 4 * w))[None]))[0])
    return Features(np.stack(rows), images.labels, np.arange(len(images)))

  return Knn(k=3)(features).metrics["top1_k3"]


def test_the_accuracy_at_each_budget_is_that_of_images_one_by_one():
  extract = Extract()
  report = BUDGETS(extract)
  assert report.metrics == {f"top1/{budget}": one_by_one(Extract(), i) for i, budget in enumerate((6, 20))}, report.metrics
  assert 40 < report.metrics["top1/20"] <= 100 and report.images == 12
  # One shape, so one compilation, for each grid, and full batches.
  assert set(extract.shapes) == {(4, 4 * h, 4 * w, 3) for grids in GRIDS.values() for h, w in grids}
  for word in ("5.0 tokens of 6 in 3 grids", "17.0 tokens of 20 in 3 grids", "4x4 px patches", "k=3", "bank 24 of 24", "12 of 12 held-out"):
    assert word in report.protocol, report.protocol


@pytest.mark.parametrize("model", [NaViT, ViT])
def test_rectangles_have_the_same_features_in_a_batch_and_beside_nothing(model):
  module = model(variant="custom", width=8, depth=1, heads=2, mlp_dim=8, patch=4, image_size=24)
  variables = jax.jit(lambda key: module.init(key, np.zeros((1, 16, 16, 3), np.float32), train=False))(jax.random.key(0))
  run = jax.jit(lambda images: Trunk(module, variables)(images)["pooled"])
  wide = [image for image in source(27, 0).fetch(range(27)) if image.shape[1] == 32]  # all of one grid of 3x6 patches
  found = {}

  class Recording(Extract):
    def apply(self, function, images, *, weights="current"):
      out = super().apply(function, images, weights=weights)
      found.update((image.tobytes(), row) for image, row in zip(images, out, strict=True))
      return out

  split = Python(wide, labels=np.arange(9) % 3)
  extract = Recording(lambda images: {"pooled": run(images)}, train=split, eval=split)
  TokenBudgets(budgets=(20,), k=3, batch_size=4)(extract)
  assert set(extract.shapes) == {(4, 12, 24, 3)}
  for image in wide:
    image = resize(image.astype(np.float32) / 255, shape=(12, 24))
    np.testing.assert_allclose(found[image.tobytes()], run(filled(image[None] + np.float32(0.1), 4))[0], atol=1e-5)


def test_the_bank_and_the_queries_are_bounded_and_baselines_are_of_random_weights():
  extract = Extract()
  report = TokenBudgets(budgets=(6,), k=3, max_bank=9, max_queries=5, baselines=True)(extract)
  assert set(report.metrics) == {"top1/6", "random_init/top1/6"} and report.metrics["random_init/top1/6"] < 70
  assert "bank 9 of 24" in report.protocol and "5 of 12 held-out" in report.protocol and report.images == 5


def test_images_that_wait_are_run_before_they_fill_the_memory(monkeypatch):
  monkeypatch.setattr("big_ssl.evals.token_budgets.MOST_WAITING", 1)
  extract = Extract()
  assert BUDGETS(extract).metrics == BUDGETS(Extract()).metrics and len(extract.shapes) == 2 * 36


def test_images_without_a_label_or_that_cannot_be_read_are_left_out():
  class Torn(Python):
    def pixels(self, index, *, canvas=0):
      if index == 4:
        raise ValueError("torn")
      return super().pixels(index, canvas=canvas)

  images = [source(12, 1).pixels(i) for i in range(12)]
  labels = np.where(np.arange(12) == 7, -1, np.arange(12) % 3)
  report = BUDGETS(Extract(eval=Torn(images, labels=labels)))
  assert report.images == 10 and "1 images cannot be read" in report.protocol, report.protocol
  report = BUDGETS(Extract(eval=source(12, 1, labels=False)))
  assert report.metrics == {} and "no labels" in report.protocol


@pytest.mark.parametrize(
  "fields,message",
  [
    ({"budgets": (64, 0)}, "budgets=.64, 0.: expected numbers of tokens"),
    ({"budgets": (64, 64)}, "each once"),
    ({"k": 0}, "k=0: expected at least 1"),
    ({"max_bank": -1}, "max_bank=-1"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"temperature": 0.0}, "temperature=0.0"),
  ],
)
def test_impossible_options_are_clear_errors(fields, message):
  with pytest.raises(UserError, match=f"config.evals.token_budgets.*{message}"):
    build_named("evals", {"name": "token_budgets", **fields}, Evaluator, path="config.evals.token_budgets")


def test_what_cannot_be_evaluated_is_refused_in_one_line():
  free = Extract()
  free.stride = (1, 1)
  with pytest.raises(UserError, match="config.evals.token_budgets: needs a backbone of patches"):
    BUDGETS(free)
  with pytest.raises(UserError, match="k=30: more neighbors than the 24 images"):
    TokenBudgets(budgets=(6,), k=30)(Extract())
  with pytest.raises(UserError, match="output='cls': .*it has pooled, tokens"):
    TokenBudgets(budgets=(6,), k=3, output="cls")(Extract())
