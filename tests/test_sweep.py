"""Any method with any backbone that can serve it: one abstract step each, and a few compiled ones on other image shapes."""

import importlib
import inspect
import pkgutil

import engine
import jax
import numpy as np
import pytest

from big_ssl import models, setup
from big_ssl.core.step import make_step
from big_ssl.core.types import UserError
from big_ssl.models.layers import Backbone

_SMALL_VIT = {"variant": "custom", "width": 24, "depth": 2, "heads": 2, "mlp_dim": 48, "patch": 8, "image_size": 32}
BACKBONES = {
  "vit": _SMALL_VIT,
  "resnet": {"depth": 18, "stem": "cifar", "stem_width": 8, "blocks": (1, 1, 1, 1)},
  "wide_resnet": {"depth": 10, "width": 1},
  "alexnet": {"stem": "cifar", "widths": (8, 8, 8, 8, 8), "fc": 16, "image_size": 32},
  "vgg": {"widths": (8, 8, 8, 8, 8), "fc": 16, "image_size": 32},
  "xcit": {"variant": "custom", "width": 24, "depth": 1, "heads": 2, "patch": 8, "class_layers": 1},
  "resmlp": {"variant": "custom", "width": 24, "depth": 2, "patch": 8, "image_size": 32, "resample": "bilinear"},
  "regnet": {"variant": "custom", "widths": (8, 16), "depths": (1, 1), "group_width": 8},
  "revnet": {"filters_factor": 0.5, "blocks": (1, 1), "strides": (2,)},
  "flexivit": _SMALL_VIT | {"kernel_patch": 8, "pos_grid": 4, "patch_sizes": ()},
  "vit22b": _SMALL_VIT,
  "navit": _SMALL_VIT,
}
# What a method asks of a backbone, and the words of the refusal.
_TOKENS = "config.model: LOCA needs a ViT"
REFUSED = {("loca", name): _TOKENS for name in BACKBONES if name not in ("vit", "flexivit", "vit22b")}
_PACKED = "config.model.name: packed sequences need navit"
REFUSED |= {(method, name): _PACKED for method in ("navit", "navit_contrastive") for name in BACKBONES if name != "navit"}


def test_every_backbone_takes_part():
  found = set()
  for module in pkgutil.iter_modules(models.__path__):
    for _, value in inspect.getmembers(importlib.import_module(f"big_ssl.models.{module.name}"), inspect.isclass):
      public = issubclass(value, Backbone) and value is not Backbone and not value.__name__.startswith("_")
      if public and value.__module__.endswith("." + module.name):
        found.add(module.name)
  assert found == set(BACKBONES)


def abstract_step(run: setup.Run):
  raw = {k: p.spec() for k, p in run.pipelines.items()}
  resident = {k: jax.ShapeDtypeStruct(p.resident.shape, p.resident.dtype) for k, p in run.pipelines.items() if p.resident is not None}
  return jax.eval_shape(make_step(run.method, run.optimizer, seed=0), run.abstract_state, raw, resident)


def options(method: str, backbone: str) -> dict:
  """The default recipe's overrides for another backbone: all views of one size where the backbone takes only one."""
  found = {"model": {"name": backbone} | BACKBONES[backbone]}
  if method == "msn" and backbone != "vit":
    found["method.patch_drop"] = 0.0
  if backbone in ("alexnet", "vgg"):  # their fully connected layers fix the size
    sizes = {"msn": "focal_size", "dino": "local_size", "paws": "small_size"}
    sizes |= dict.fromkeys(("swav", "deepcluster_v2", "sela_v2"), "small_size")
    if method in sizes:
      found[f"method.{sizes[method]}"] = 32
  return found


def pairs() -> list:
  """All of them; beyond the usual backbones and three dissimilar methods they are in the slow tests."""
  usual = lambda method, backbone: backbone in ("vit", "resnet") or method in ("simclr", "dino", "deepcluster")
  every = [(m, b) for m in engine.methods() for b in BACKBONES]
  return [pytest.param(m, b, marks=() if usual(m, b) else pytest.mark.slow) for m, b in every]


@pytest.mark.parametrize("method,backbone", pairs())
def test_a_method_takes_a_step_with_a_backbone_or_says_why_not(method, backbone):
  build = lambda: setup.make_run(engine.small(method, **options(method, backbone)), devices=jax.devices()[:1])
  if (method, backbone) in REFUSED:
    with pytest.raises(UserError, match=REFUSED[method, backbone]):
      build()
    return
  run = build()
  state, metrics = abstract_step(run)
  assert jax.tree.map(lambda a: a.shape, state) == jax.tree.map(lambda a: a.shape, run.abstract_state)
  assert metrics["loss"].shape == ()


SIDES = {
  "dino": ("global_size", "local_size"),
  "loca": ("reference_size", "query_size", "focal_size"),
  "msn": ("rand_size", "focal_size"),
  "paws": ("big_size", "small_size"),
} | dict.fromkeys(("swav", "deepcluster_v2", "sela_v2"), ("large_size", "small_size"))


@pytest.mark.parametrize("method", engine.methods())
def test_views_may_be_rectangles(method):
  names = SIDES.get(method, ("size",))
  shapes = [(32, 48), (16, 24), (16, 24)] if method != "loca" else [(32, 48), (32, 48), (16, 24)]
  sizes = {f"method.{name}": shape for name, shape in zip(names, shapes, strict=False)}
  run = setup.make_run(engine.small(method, **sizes), devices=jax.devices()[:1])
  assert run.method.eval_view().shape == (32, 48)
  _, metrics = abstract_step(run)
  assert metrics["loss"].shape == ()


@pytest.mark.parametrize("method,backbone,channels", [("simclr", "resnet", 1), ("deepcluster", "vit", 5)])
def test_a_compiled_step_on_rectangles_of_other_channels_is_finite(method, backbone, channels, tmp_path):
  """One channel passes all photometric operations; five pass a method without them."""
  rng = np.random.default_rng(0)
  np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (40, 40, 56, channels), dtype=np.uint8))
  sizes = dict(zip((f"method.{name}" for name in SIDES.get(method, ("size",))), ((32, 48), (16, 24)), strict=False))
  none = {"method.mean": (), "method.std": ()}
  changes = options(method, backbone) | sizes | none | {"data.source": str(tmp_path / "images.npz"), "evals": {}}
  state, history = engine.train_steps(engine.small(method, **changes), stop=2)
  assert all(np.isfinite(h["loss"]) and h["skipped"] == 0 for h in history)
  kernels = [x for x in jax.tree.leaves(state.params) if x.ndim == 4]
  assert any(k.shape[2] == channels for k in kernels)
