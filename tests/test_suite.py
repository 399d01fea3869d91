"""One checkpoint on many data sets: the table, what is skipped and why, and mistakes in the manifest."""

import dataclasses
import json
import pathlib
import types

import engine
import jax
import numpy as np
import pytest
from PIL import Image

from big_ssl import setup, suite
from big_ssl.core.checkpoint import Checkpointer
from big_ssl.core.types import UserError
from big_ssl.data.opening import open_splits
from big_ssl.evals.base import Report
from big_ssl.evaluate import Extractor, foreign_classes
from big_ssl.start import saved_state

TINY = engine.SMALL | engine.TINY["vit"] | {"data.train_examples": 24, "data.eval_examples": 21}


def leaked(path: pathlib.Path, *, channels: int = 3, labels: bool = True) -> str:
  """Noise whose class is a colored patch; of shuffled labels where there is no patch."""
  rng = np.random.default_rng(0)
  arrays = {}
  for split in ("train", "test"):
    y = np.arange(64) % 2
    x = rng.integers(0, 90, (64, 40, 40, channels), np.uint8)
    x[y == 1, 8:32, 8:32] = 250
    arrays |= {f"x_{split}": x} | ({f"y_{split}": y} if labels else {})
  np.savez(path, **arrays)
  return str(path)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A work directory as a run leaves it, of random weights."""
  path = tmp_path_factory.mktemp("run")
  from big_ssl.core import config as config_lib

  config, tree = config_lib.load(str(engine.ROOT / "configs" / "msn.py"), {k: str(v) for k, v in TINY.items()})
  (path / "config.json").write_text(json.dumps(tree, default=str))
  run = setup.make_run(config, devices=jax.devices()[:1])
  checkpointer = Checkpointer(path)
  checkpointer.save(run.initial_state(), meta=run.meta())
  checkpointer.close()
  return path


def test_tasks_are_evaluated_or_skipped_with_the_reason_and_written_as_two_tables(workdir, tmp_path, capsys, monkeypatch):
  make = setup.make_run
  monkeypatch.setattr(setup, "make_run", lambda config: make(config, devices=jax.devices()[:1]))
  tasks = [
    {"name": "leak", "data": leaked(tmp_path / "leak.npz"), "evals": {"knn": {"k": 5}, "knn_all": {"name": "knn", "k": 99}}},
    {"name": "gone", "data": str(tmp_path / "gone.npz"), "evals": {"knn": {}}},
    {"name": "gray", "data": leaked(tmp_path / "gray.npz", channels=1), "evals": {"knn": {}}},
    {"name": "bare", "data": leaked(tmp_path / "bare.npz", labels=False), "evals": {"knn": {"k": 5}}},
    {"name": "squashed", "data": str(tmp_path / "leak.npz"), "eval_fraction": 0, "eval_examples": 20, "evals": {"knn": {"k": 5}}},
  ]
  manifest = tmp_path / "tasks.json"
  manifest.write_text(json.dumps(tasks))
  assert suite.main([f"--workdir={workdir}", f"--manifest={manifest}", f"--out={tmp_path / 'out'}"]) == 0, capsys.readouterr().err
  rows = json.loads((tmp_path / "out" / "results.json").read_text())
  found = {(r["task"], r["evaluator"], r["metric"]): r for r in rows}
  leak = found["leak", "knn", "top1_k5"]
  assert leak["value"] > 95 and leak["n"] == 64 and leak["low"] < leak["value"] <= leak["high"] and leak["seconds"] > 0, leak
  assert "k=5" in leak["protocol"] and "leak.npz" in leak["protocol"]
  assert found["squashed", "knn", "top1_k5"]["n"] == 20
  reasons = {key[:2]: r["skipped"] for key, r in found.items() if r["skipped"]}
  for key, words in {
    ("leak", "knn_all"): "k=99: more neighbors than the 64 images",
    ("gone", ""): "gone.npz",
    ("gray", ""): "1 channel, the checkpoint is for images of 3",
    ("bare", "knn"): "no labels",
  }.items():
    assert words in reasons.pop(key), (key, reasons)
  assert not reasons
  text = (tmp_path / "out" / "results.md").read_text()
  assert "| leak | knn | top1_k5 |" in text and "- gone: --data=" in text and "leak, knn: weighted k-NN" in text
  assert len(list((workdir / "features").glob("*.npz"))) == 6  # both splits of three tasks


def test_images_without_labels_are_scored_by_their_copies_and_others_are_not(tmp_path):
  for labels in (True, False):
    run = setup.make_run(engine.small("msn", **{"data.source": leaked(tmp_path / f"{labels}.npz", labels=labels)}), devices=jax.devices()[:1])
    assert ("copy_detection" in run.evaluators) != labels and "knn" in run.evaluators
  extract = Extractor(run)
  extract.state = run.initial_state()
  report = run.evaluators["copy_detection"](extract)
  assert 0 < report.metrics["map"] <= 100 and "random_init/map" in report.metrics


def test_held_out_folders_that_are_no_training_classes_are_told(tmp_path):
  for name in ("train/cat", "train/dog", "val/plane"):
    (tmp_path / name).mkdir(parents=True)
    for i in range(12):
      Image.fromarray(np.full((8, 8, 3), 9 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
  sources = open_splits(str(tmp_path))
  why = foreign_classes(types.SimpleNamespace(sources=sources))
  assert why == "none of the 12 held-out images, such as plane/0.png, is in a folder of a training class (cat, dog, ...)"
  assert foreign_classes(types.SimpleNamespace(sources=sources | {"eval": sources["train"]})) == ""
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="config.data.eval_split='empty'.*no such folder of images.*There are: train, val"):
    open_splits(str(tmp_path), eval_split="empty")


@pytest.mark.parametrize(
  "name,changes,message",
  [
    ("msn", {"method.mean": (0.1, 0.2, 0.3)}, r"made with config.method.mean=\[0.485, .*, this config has \[0.1, 0.2, 0.3\]"),
    ("msn", {"model.patch": 4}, "made with config.model.patch=8, this config has 4"),
    ("simclr", {}, "made with config.method.name=msn, this config has simclr"),
    ("msn", {"method.num_prototypes": 32}, "the checkpoint does not fit this config. different: .*prototypes"),
  ],
)
def test_a_checkpoint_of_another_protocol_is_refused_in_one_line(workdir, name, changes, message):
  other = setup.make_run(engine.small(name, **TINY | changes), devices=jax.devices()[:1])
  with pytest.raises(UserError, match=message) as error:
    saved_state(other, workdir, types.SimpleNamespace(warning=print))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "text,message",
  [
    ("[", "not JSON"),
    ("{}", "expected a list of tasks"),
    ("[]", "expected a list of tasks"),
    ('[{"name": "a", "evals": {"knn": {}}}]', "task 0 has no data"),
    ('[{"name": "a", "data": "x", "evals": {"knn": {}}, "spilt": "b"}]', "a.spilt='b': unknown key. Did you mean 'split'"),
    ('[{"name": "a", "data": "x", "evals": {"knn": {}}}, {"name": "a", "data": "y", "evals": {"knn": {}}}]', "'a' is there twice"),
  ],
)
def test_a_wrong_manifest_is_one_clear_line(tmp_path, text, message):
  file = tmp_path / "tasks.json"
  file.write_text(text)
  with pytest.raises(UserError, match=message):
    suite.read_manifest(file)


def test_a_wrong_evaluator_or_directory_ends_it_before_anything_is_computed(workdir, tmp_path, capsys):
  manifest = tmp_path / "tasks.json"
  manifest.write_text('[{"name": "a", "data": "x", "evals": {"knn": {"kk": 3}}}]')
  assert suite.main([f"--workdir={workdir}", f"--manifest={manifest}"]) == 2
  assert suite.main([f"--workdir={tmp_path}", f"--manifest={manifest}"]) == 2
  assert suite.main([f"--workdir={workdir}", f"--manifest={tmp_path / 'no.json'}"]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert "config.evals.knn.kk=3: unknown key" in lines[0] and "no config.json" in lines[1] and "no.json: cannot be read" in lines[2]
  assert len(lines) == 3


def test_ends_of_an_interval_go_with_their_number_and_accuracies_get_one():
  metrics = {"top1": 50.0, "top1_masked": 60.0, "top1_masked_low": 55.0, "top1_masked_high": 65.0, "map": 7.0}
  metrics |= {"group/a/top1": 40.0, "group/a/low": 30.0, "group/a/high": 50.0, "group/a/n": 12.0, "top1_5img_std": 1.0}
  rows = {r.metric: r for r in suite.metric_rows(Report(metrics, "p", images=100), images=7, common={"task": "t", "evaluator": "e"})}
  assert set(rows) == {"top1", "top1_masked", "map", "group/a/top1", "top1_5img_std"}
  assert (rows["top1_masked"].low, rows["top1_masked"].high, rows["top1_masked"].n) == (55.0, 65.0, 100)
  assert (rows["group/a/top1"].low, rows["group/a/top1"].high, rows["group/a/top1"].n) == (30.0, 50.0, 12)
  assert rows["top1"].low == pytest.approx(40.38, abs=0.01) and rows["map"].low is None and rows["top1_5img_std"].low is None


def test_a_baseline_of_a_group_has_the_images_and_the_interval_of_the_group():
  metrics = {f"random_init/group/a/{k}": v for k, v in {"top1": 40.0, "low": 30.0, "high": 50.0, "n": 12.0}.items()}
  (row,) = suite.metric_rows(Report(metrics, "p", images=100), images=7, common={"task": "t", "evaluator": "e"})
  assert (row.metric, row.low, row.high, row.n) == ("random_init/group/a/top1", 30.0, 50.0, 12)


def test_metrics_of_different_images_have_each_their_number():
  report = Report({"easy_map": 1.0, "hard_map": 2.0, "other": 3.0}, "p", images={"easy_map": 4, "hard_map": 5})
  rows = suite.metric_rows(report, images=7, common={"task": "t", "evaluator": "e"})
  assert [row.n for row in rows] == [4, 5, 7]


def test_the_labels_that_a_run_was_trained_on_do_not_choose_those_of_a_task(monkeypatch):
  @dataclasses.dataclass
  class Run:
    config: object
    method: object = None

  monkeypatch.setattr(setup, "on_other_data", lambda run, config: config.data)
  run = Run(engine.load("msn", **{"data.labels_per_class": 13, "data.labels_seed": 2, "data.labels_file": "mine.txt", "data.canvas": 64}))
  task = {"name": "pets", "data": "pets", "evals": {"knn": {}}}
  plain, few = (suite.task_run(run, suite.Task(**task, **more)) for more in ({}, {"labels_share": 0.1}))
  assert (plain.source, plain.labels_per_class, plain.labels_share, plain.labels_seed, plain.labels_file) == ("pets", 0, 0.0, 0, "")
  assert plain.canvas == 64 and (few.labels_per_class, few.labels_share, few.labels_file) == (0, 0.1, "")
