"""Features are extracted once per checkpoint and transform, and again as soon as either changes."""

import dataclasses
import os

import engine
import jax
import numpy as np
import pytest

from big_ssl import evaluate, setup
from big_ssl.core.types import UserError
from big_ssl.data.source import Python, Subset
from big_ssl.evals.base import Features
from big_ssl.evals.knn import Knn
from big_ssl.feature_cache import FeatureCache, MemoryCache, Stored, output_name


def stored(rows: int = 4, value: float = 1.0) -> Stored:
  return Stored(np.full((rows, 6), value, np.float32), np.arange(rows), (2, 3))


def cache(directory, *, gib: float = 1.0, **fields) -> FeatureCache:
  said: list[str] = []
  made = FeatureCache(directory, max_bytes=int(gib * 2**30), notice=said.append, **fields)
  object.__setattr__(made, "said", said)
  return made


def test_what_is_kept_is_read_back_with_its_shape_and_another_key_or_owner_has_nothing(tmp_path):
  kept = cache(tmp_path / "features")
  assert kept.load(owner="step1-a", key="k") is None and kept.said == []
  kept.save(stored(), owner="step1-a", key="k")
  found = kept.load(owner="step1-a", key="k")
  np.testing.assert_array_equal(found.features, stored().features)
  np.testing.assert_array_equal(found.index, np.arange(4))
  assert found.shape == (2, 3) and "read from" in kept.said[0]
  assert kept.load(owner="step1-b", key="k") is None and kept.load(owner="step1-a", key="l") is None


def test_features_of_the_last_checkpoint_alone_are_kept_beside_those_of_none(tmp_path):
  kept = cache(tmp_path)
  for owner, key in (("step1-a", "k"), ("step1-a", "l"), ("pixels", "k"), ("random-f", "k")):
    kept.save(stored(), owner=owner, key=key)
  assert len(os.listdir(tmp_path)) == 4
  kept.save(stored(), owner="step1-b", key="k")  # the same step of other weights
  assert sorted(os.listdir(tmp_path)) == ["pixels-k.npz", "random-f-k.npz", "step1-b-k.npz"]


def test_all_files_stay_below_the_limit_and_larger_features_are_told_and_not_kept(tmp_path):
  small = cache(tmp_path, gib=3500 / 2**30)
  for i in range(4):
    small.save(stored(40), owner="pixels", key=str(i))
    os.utime(tmp_path / f"pixels-{i}.npz", (i, i))
  assert sorted(os.listdir(tmp_path)) == ["pixels-2.npz", "pixels-3.npz"]
  small.save(stored(4000), owner="pixels", key="large")
  assert "not kept: config.checkpoint.features_gib" in small.said[-1] and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "garbage", "flip", "rows"])
def test_a_damaged_file_is_told_in_one_line_and_made_anew(tmp_path, damage):
  kept = cache(tmp_path)
  kept.save(stored(40), owner="pixels", key="k")
  file = tmp_path / "pixels-k.npz"
  data = bytearray(file.read_bytes())
  if damage == "rows":
    np.savez(file, features=np.zeros((3, 2)), index=np.arange(4), shape=np.array([2]))
  else:
    data[200] ^= 255
    file.write_bytes({"cut": data[:-40], "garbage": b"no archive", "flip": data}[damage])
  assert kept.load(owner="pixels", key="k") is None
  assert len(kept.said) == 1 and "\n" not in kept.said[0] and "damaged" in kept.said[0], kept.said
  kept.save(stored(40), owner="pixels", key="k")
  assert kept.load(owner="pixels", key="k") is not None


def test_features_of_another_user_are_read_though_their_time_cannot_be_set(tmp_path, monkeypatch):
  def refuse(*args, **kwargs):
    raise PermissionError(1, "Operation not permitted")

  kept = cache(tmp_path)
  kept.save(stored(), owner="pixels", key="k")
  monkeypatch.setattr(os, "utime", refuse)
  assert kept.load(owner="pixels", key="k") is not None
  assert len(kept.said) == 1 and "features read" in kept.said[0], kept.said


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  kept = cache(tmp_path)
  monkeypatch.setattr(np, "savez", full)
  kept.save(stored(), owner="pixels", key="k")
  assert "No space left on device" in kept.said[0] and os.listdir(tmp_path) == []
  cache(tmp_path / "other", write=False).save(stored(), owner="pixels", key="k")
  assert not (tmp_path / "other").exists()


def test_outputs_have_names_that_last_or_none():
  assert output_name("pooled") == "pooled" and output_name(stored).endswith("test_feature_cache.stored")
  assert output_name(lambda trunk, images: images) is None


def test_memory_drops_what_was_used_longest_ago():
  memory = MemoryCache(max_bytes=2 * 4 * 6 * 4)
  features = [Features(stored(value=i).features, None, np.arange(4)) for i in range(3)]
  memory.put("a", features[0])
  memory.put("b", features[1])
  assert memory.get("a") is features[0]
  memory.put("c", features[2])
  assert memory.get("b") is None and memory.get("a") is features[0] and memory.get("c") is features[2]


class Counting(evaluate.Extractor):
  """Counts the passes over images."""

  passes = 0

  def _compute(self, *args):
    self.passes += 1
    return super()._compute(*args)


CONFIG = {"data.train_examples": 24, "data.eval_examples": 21}


@pytest.fixture(scope="module")
def run():
  return setup.make_run(engine.small("msn", **CONFIG), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def state(run):
  return run.initial_state()


def extractor(run, state, kept=None) -> Counting:
  extract = Counting(run, kept=kept)
  extract.state = extract._random = state  # which spares a compilation
  return extract


def trained(state):
  change = lambda tree: jax.tree.map(lambda x: np.asarray(x) * np.asarray(1.1, x.dtype), tree)
  return state.replace(step=state.step + 1, params=change(state.params), extra=change(state.extra))


class Silent:
  def log_eval(self, *args):
    del args


def test_evaluators_of_one_step_extract_once_and_those_of_the_next_again(run, state):
  extract = extractor(run, state)
  first, again = extract("eval"), extract("eval")
  assert first is again and extract.passes == 1
  with pytest.raises(ValueError, match="read-only"):
    first.features[0] = 0
  extract.state = trained(state)
  extract("eval")
  assert extract.passes == 2
  extract.passes = 0
  two = dataclasses.replace(run, evaluators={"one": Knn(k=1, baselines=True), "two": Knn(k=2, baselines=True)})
  for passes in (6, 0, 2):  # train and eval, of the current weights and of two yardsticks, which last
    extract.passes = 0
    if passes == 2:
      extract.forget()
    evaluate.evaluate(two, extract, state, names=["one", "two"], logger=Silent(), step=0)
    assert extract.passes == passes


def test_another_process_reads_what_one_has_kept_until_weights_or_transform_change(run, state, tmp_path):
  first = extractor(run, state, cache(tmp_path))
  made = [first("eval"), first("eval", output="pixels"), first("eval", weights="random")]
  second = extractor(run, state, cache(tmp_path))
  read = [second("eval"), second("eval", output="pixels"), second("eval", weights="random")]
  assert (first.passes, second.passes) == (3, 0)
  for a, b in zip(made, read, strict=True):
    np.testing.assert_array_equal(a.features, b.features)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.source == b.source
  second("train")
  assert second.passes == 1
  second.passes, second.state = 0, trained(state)
  assert not np.array_equal(second("eval").features, made[0].features) and second.passes == 1
  second("eval", output="pixels")
  assert second.passes == 1


def test_whatever_changes_the_features_changes_their_key(run):
  data = lambda **fields: dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, **fields))
  model = dataclasses.replace(run.config, model=run.config.model | {"depth": 3})
  fewer = {"eval": Subset(run.sources["eval"], np.arange(5), name="five")}
  changes = [
    *({"method": run.method.replace(**field)} for field in ({}, {"eval_fraction": 0.9}, {"mean": (0.1, 0.2, 0.3)})),
    *({"config": config} for config in (data(crop="host"), data(canvas=64), model)),
    {"sources": fewer},
  ]
  key = lambda output="pooled", weights="current", **change: evaluate.Extractor(dataclasses.replace(run, **change))._key("eval", output, weights)
  keys = [*(key(**change) for change in changes), key("pixels"), key(weights="random")]
  assert len(set(keys)) == len(keys) and keys[0] == key()
  assert key(lambda trunk, images: images) is None
  assert key(sources={"eval": Python([np.zeros((8, 8, 3), np.uint8)])}) is None  # nothing tells what is in it


def test_an_output_that_the_method_does_not_have_is_named(run, state):
  with pytest.raises(UserError, match="output='poled' is none of config.method.name=msn. Did you mean 'pooled'"):
    extractor(run, state)("eval", output="poled")
