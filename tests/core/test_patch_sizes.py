"""A patch size drawn per step as an option of every ViT method (FlexiViT, arXiv 2212.08013)."""

import collections

import engine
import jax
import numpy as np
import pytest

from big_ssl import setup
from big_ssl.core.types import UserError

SIZES = {"model.patch_sizes": (4, 8, 16), "model.kernel_patch": 8, "model.pos_grid": 4}


def make(name: str = "simclr", **overrides) -> setup.Run:
  return setup.make_run(engine.small(name, **SIZES | overrides), devices=jax.devices()[:1])


def test_sizes_are_drawn_alike_by_seed_and_step_alone():
  one, other, seeded = make(total="3000steps"), make(total="3000steps"), make(total="3000steps", seed=1)
  drawn = [one.patch_at(step) for step in range(3000)]
  assert drawn == [other.patch_at(step) for step in range(3000)] != [seeded.patch_at(step) for step in range(3000)]
  counts = collections.Counter(drawn)
  assert set(counts) == {4, 8, 16} and min(counts.values()) > 900


def test_a_run_of_several_sizes_resumes_bit_equal():
  config = engine.small("simclr", **SIZES | {"model.patch_sizes": (4, 16)})
  whole, history = engine.train_steps(config)
  run = setup.make_run(config, devices=jax.devices()[:1])
  assert len({run.patch_at(step) for step in range(run.total_steps)}) > 1
  half, first = engine.train_steps(config, stop=3)
  placed = jax.tree.map(lambda x, a: jax.device_put(np.asarray(x), a.sharding), half, run.abstract_state)
  again, second = engine.train_steps(config, state=placed)
  assert first + second == history and engine.leaves_equal(again, whole)
  assert all(np.isfinite(h["loss"]) and h["skipped"] == 0 for h in history)


def test_all_sizes_train_one_set_of_parameters_and_none_of_them_is_another():
  run = make()
  sequences = set()
  for patch, method in run.methods.items():
    tokens = jax.eval_shape(
      lambda x, m=method.model: m.init_with_output(jax.random.key(0), x, train=False),
      jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32),
    )
    assert jax.tree.map(lambda a: a.shape, tokens[1]["params"]) == jax.tree.map(
      lambda a: a.shape, run.abstract_state.params["encoder"]["backbone"]
    )
    sequences.add(tokens[0]["tokens"].shape[1])
    assert (32 // patch) ** 2 in sequences
  assert len(sequences) == 3


def test_a_size_that_does_not_divide_the_views_is_one_clear_line():
  with pytest.raises(UserError, match=r"config.model.patch_sizes=\(8, 12\): 12 leaves a rest of images of 32x32"):
    make(**{"model.patch_sizes": (8, 12)}).trace_steps()
  with pytest.raises(UserError, match="config.model.patch_sizes.*LOCA"):
    setup.make_run(engine.small("loca", **{"model.patch_sizes": (4, 8)}), devices=jax.devices()[:1])
