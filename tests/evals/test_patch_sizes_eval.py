"""One ViT at many patch sizes: the scores are those of the same parameters in a model of that size."""

import jax
import numpy as np
import pytest

from big_ssl.core.method import Trunk
from big_ssl.core.types import UserError
from big_ssl.evals.base import Features
from big_ssl.evals.knn import Knn
from big_ssl.evals.patch_sizes import PatchSizes, PooledAt
from big_ssl.models.alexnet import AlexNet
from big_ssl.models.vit import ViT

TINY = ViT(variant="custom", width=8, depth=1, heads=2, mlp_dim=16, patch=4, image_size=16)


class Extract:
  """Labeled noise through a backbone."""

  size = (16, 16)

  def __init__(self, module=TINY):
    rng = np.random.default_rng(0)
    self.images = {split: rng.random((count, 16, 16, 3), np.float32) for split, count in (("train", 24), ("eval", 12))}
    self.trunk = Trunk(module, jax.tree.map(np.asarray, module.init(jax.random.key(0), self.images["train"][:1], train=False)))

  def __call__(self, split, *, output="pooled", weights="current"):
    x = self.images[split]
    out = x.reshape(len(x), -1) if output == "pixels" else jax.jit(lambda v, x: output(Trunk(self.trunk.module, v), x))(self.trunk.variables, x)
    return Features(np.asarray(out), np.arange(len(x)) % 3, np.arange(len(x)))


def of_model(module, split, extract):
  x = extract.images[split]
  pooled = jax.jit(lambda v, x: module.apply(v, x, train=False)["pooled"])(extract.trunk.variables, x)
  return Features(np.asarray(pooled), np.arange(len(x)) % 3, np.arange(len(x)))


def test_each_score_is_that_of_the_same_parameters_in_a_model_of_that_patch_size():
  extract = Extract()
  found = PatchSizes(sizes=(4, 2, 8), k=3, baselines=True)(extract)
  assert set(found.metrics) == {f"{prefix}top1/{size}" for prefix in ("", "random_init/") for size in (4, 2, 8)} | {"raw_pixels/top1"}
  models = {4: TINY, **{p: TINY.clone(patch=p, kernel_patch=4, pos_grid=(4, 4)) for p in (2, 8)}}
  for size, module in models.items():
    plain = lambda split, *, output, weights, module=module: of_model(module, split, extract)
    assert found.metrics[f"top1/{size}"] == Knn(k=3)(plain).metrics["top1_k3"]
  features = lambda size: extract("eval", output=PooledAt(size)).features
  np.testing.assert_allclose(features(4), of_model(TINY, "eval", extract).features, rtol=1e-5, atol=1e-6)
  assert np.abs(features(4) - features(8)).max() > 0.01
  assert "output 'pooled' of the backbone at patches of 4, 2, 8 (8 dimensions" in found.protocol


@pytest.mark.parametrize(
  ("sizes", "message"), [((), "each once"), ((4, 4), "each once"), ((0,), "each once"), ((4, 5), "5 does not divide the evaluation view of 16x16")]
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
  with pytest.raises(UserError, match=f"config.evals.patch_sizes.sizes=.*{message}"):
    PatchSizes(sizes=sizes)(Extract())


def test_a_backbone_without_patches_is_refused():
  extract = Extract()
  extract.trunk = Trunk(AlexNet(), {})
  with pytest.raises(UserError, match="config.evals.patch_sizes: AlexNet has one patch size"):
    PatchSizes(sizes=(4,))(extract)


@pytest.mark.parametrize(("field", "value"), [("k", 0), ("k", 25), ("temperature", 0.0), ("max_bank", -1)])
def test_settings_of_the_neighbors_are_refused_under_their_own_path(field, value):
  with pytest.raises(UserError, match=rf"^config\.evals\.patch_sizes\.{field}={value}:"):
    PatchSizes(sizes=(4,), **{field: value})(Extract())
