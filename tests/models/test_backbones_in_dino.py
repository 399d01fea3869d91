"""Every backbone without a test elsewhere serves a method: one abstract step of DINO, with its multi-crop sizes."""

import engine
import jax
import pytest

from big_ssl import setup
from big_ssl.core.step import make_step
from big_ssl.core.types import UserError

MODELS = {
  "xcit": {"variant": "custom", "patch": 8, "width": 16, "depth": 1, "heads": 2, "drop_path": 0.1},
  "resmlp": {"variant": "custom", "patch": 8, "width": 16, "depth": 1, "image_size": 32, "resample": "bilinear"},
  "regnet": {"variant": "custom", "widths": (8, 16), "depths": (1, 2), "group_width": 8, "remat": "full"},
  "revnet": {"filters_factor": 0.25, "blocks": (1, 2), "strides": (2,)},
  "resnet": {"blocks": (1, 1), "strides": (2,), "stem_width": 8, "preactivation": True},
}


def abstract_step(model):
  data = {"data.train_examples": 32, "data.eval_examples": 8, "optim.warmup": "0steps"}
  run = setup.make_run(engine.load("dino", **data, model=model), devices=jax.devices()[:1])
  raw = {k: p.spec() for k, p in run.pipelines.items()}
  resident = {
    k: jax.ShapeDtypeStruct(p.resident.shape, p.resident.dtype)
    for k, p in run.pipelines.items()
    if p.resident is not None
  }
  step = make_step(run.method, run.optimizer, seed=0, accumulate=1)
  return run, jax.eval_shape(step, run.abstract_state, raw, resident)


@pytest.mark.parametrize("name", MODELS)
def test_one_abstract_step_keeps_the_shapes_of_the_state(name):
  run, (state, metrics) = abstract_step({"name": name} | MODELS[name])
  shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  assert shapes(state) == shapes(run.abstract_state) and metrics["loss"].shape == ()


def test_local_crops_of_a_resmlp_without_resampling_are_an_error_that_names_the_resolution():
  model = {"name": "resmlp"} | MODELS["resmlp"] | {"resample": "none"}
  with pytest.raises(UserError, match="config.model.image_size=32: .* found 2x2 patches of 16x16 images"):
    abstract_step(model)


def test_a_variant_that_brings_its_patch_size_needs_none_in_the_config():
  model = {"name": "resmlp", "variant": "S12", "depth": 1, "width": 16, "image_size": 32, "resample": "bilinear"}
  run, _ = abstract_step(model)
  assert run.method.model.size().patch == 16
