"""SuNCEt as a method: which statistics move, what the loss is, its trees beside those of PAWS, its errors."""

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.health import HealthConfig, judge
from big_ssl.core.types import UserError
from big_ssl.losses.semi import label_matrix, suncet_loss
from big_ssl.methods.paws import PAWS, embed
from big_ssl.methods.suncet import SuNCEt
from big_ssl.models.encoder import crop_major
from big_ssl.models.wide_resnet import WideResNet


@pytest.fixture(scope="module")
def tiny():
  sizes = dict(classes_per_step=3, images_per_class=2, output_dim=8, size=8)
  method = SuNCEt(model=WideResNet(depth=10, width=1), label_smoothing=0.1, **sizes)
  big = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 8, 8, 3)), jnp.float32)
  batch = {"big": big, "label": jnp.array([7, 2, 4, 7, 2, 4]), "index": jnp.arange(6)}
  params, extra = jax.jit(method.init)(jax.random.key(0), batch)
  return method, params, extra, batch


def loss_of(method, params, extra, batch):
  return engine.loss(method)(params, extra, batch, jax.random.key(0), jnp.int32(0))


def test_the_loss_is_that_of_the_projections_of_all_views(tiny):
  method, params, extra, batch = tiny
  z = embed(method, params, extra["batch_stats"], crop_major(batch["big"]), train=False)[0]["projection"]
  labels = label_matrix(jnp.tile(batch["label"], 2), columns=jnp.array([2, 4, 7]), smoothing=0.1)
  wanted = suncet_loss(z, labels=labels, temperature=0.1).loss
  np.testing.assert_allclose(loss_of(method, params, extra, batch)[0], wanted, rtol=1e-6)


def test_statistics_stay_where_they_are_fixed_and_move_where_not(tiny):
  method, params, extra, batch = tiny
  for fixed in (True, False):
    after = loss_of(method.replace(fixed_statistics=fixed), params, extra, batch)[1][0]
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(extra), strict=True)]
    assert all(same) if fixed else not any(same)


def test_its_trees_are_those_of_paws(tiny):
  method, params, extra, batch = tiny
  paws = PAWS(model=method.model, output_dim=8, prediction_head=False)
  other = paws.init(jax.random.key(1), {"support": batch})
  assert jax.tree.structure((params, extra)) == jax.tree.structure(other)


def test_equal_embeddings_are_judged_a_collapse(tiny):
  method, params, extra, batch = tiny
  head = params["encoder"]["head"] | {"fc3": {"kernel": jnp.zeros((64, 8)), "bias": jnp.ones(8)}}
  flat = params | {"encoder": params["encoder"] | {"head": head}}
  metrics = {k: float(v) for k, v in loss_of(method, flat, extra, batch)[1][1].items()}
  assert judge(metrics, thresholds=HealthConfig()).state == "collapsed", metrics


def test_one_image_in_one_view_of_each_class_is_a_clear_error(tiny):
  with pytest.raises(UserError, match="config.method.images_per_class=1"):
    tiny[0].replace(images_per_class=1, support_views=1)
