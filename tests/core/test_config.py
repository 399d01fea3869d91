"""Config errors name the path, the value, what is accepted and the nearest name."""

import json

import engine
import jax
import pytest

from big_ssl import setup
from big_ssl.core import config as config_lib
from big_ssl.core.config import CheckpointConfig
from big_ssl.core.types import Interval, UserError


def load(**overrides):
  return config_lib.load(str(engine.ROOT / "configs" / "msn.py"), {k.replace("__", "."): v for k, v in overrides.items()})[0]


def test_overrides_reach_every_depth_and_keep_their_types():
  config = load(optim__lr="3e-4", total="40steps", data__source="sprites", mesh__data="-1", evals__knn__k="5")
  assert config.optim.lr == 3e-4 and config.total == Interval(40, "steps") and config.evals["knn"]["k"] == 5


@pytest.mark.parametrize("text", ['{"name": "resnet", "sobel": true}', "{'name': 'resnet', 'sobel': True}"])
def test_a_mapping_is_read_as_python_or_as_json(text):
  assert load(model=text).model == {"name": "resnet", "sobel": True}


def test_an_evaluator_is_left_out_by_none_and_anything_else_is_a_clear_error():
  run = setup.make_run(engine.small("simclr", **{"evals.linear": None}), devices=jax.devices()[:1])
  assert set(run.evaluators) == {"knn", "health"}
  with pytest.raises(UserError, match="config.evals.linear=3: expected keys and values, or none"):
    setup.make_run(engine.small("simclr", **{"evals.linear": 3}), devices=jax.devices()[:1])


@pytest.mark.parametrize(
  "overrides,parts",
  [
    ({"optim__lrr": "1"}, ["config.optim.lrr=1", "unknown key", "'lr'"]),
    ({"batchsize": "8"}, ["config.batchsize=8", "'batch_size'"]),
    ({"batch_size": "many"}, ["config.batch_size='many'", "int"]),
    ({"total": "40"}, ["config.total=40", "'40steps'"]),
    ({"optim__name": "adam"}, ["config.optim.name='adam'", "'adamw'"]),
    ({"data__crop": "gpu"}, ["config.data.crop='gpu'", "'device'"]),
    ({"total": "1.2.3steps"}, ["config.total='1.2.3steps'", "'40steps'"]),
    ({"total": "1e400steps"}, ["config.total='1e400steps'"]),
    ({"seed": str(2**63)}, [f"config.seed={2**63}", "below 2**63"]),
    ({"log_every": "0steps"}, ["config.log_every=0steps", "above 0"]),
    ({"checkpoint__every": "0epochs"}, ["config.checkpoint.every=0epochs", "above 0"]),
    ({"checkpoint__keep_every": "0steps"}, ["config.checkpoint.keep_every=0steps", "above 0"]),
    ({"checkpoint__keep_last": "0"}, ["config.checkpoint.keep_last=0", "1 or more"]),
    ({"evals__knn__every": "0steps"}, ["config.evals.knn.every=0steps", "above 0"]),
    ({"evals__knn__every": "7"}, ["config.evals.knn.every=7", "'40steps'"]),
    ({"data__train_examples": "0"}, ["config.data.train_examples=0", "1 or more"]),
    ({"data__eval_examples": "-1"}, ["config.data.eval_examples=-1", "0 or more"]),
    ({"data__image_size": "0"}, ["config.data.image_size=0", "1 or more"]),
    ({"data__threads": "-1"}, ["config.data.threads=-1", "0 or more"]),
    ({"data__canvas": "-1"}, ["config.data.canvas=-1", "0 or more"]),
    ({"data__prefetch": "0"}, ["config.data.prefetch=0", "1 or more"]),
    ({"init_from__path": "runs/x", "init_from__skip": "("}, ["config.init_from.skip='('", "regular expression"]),
    ({"mesh__tensor_rules": "(('[', 0),)"}, ["config.mesh.tensor_rules='['", "regular expression"]),
    ({"optim__schedule": "cosine"}, ["config.optim.warmup=", "'cosine' has no warm-up", "0steps"]),
  ],
)
def test_a_wrong_value_is_one_clear_line(overrides, parts):
  with pytest.raises(UserError) as error:
    load(**overrides)
  message = str(error.value)
  assert "\n" not in message and all(p in message for p in parts), message


def test_text_that_reads_as_a_number_stays_text():
  config = load(data__source="2012", data__labels_file="001", data__dir="none", init_from__path="1e3", data__split="'train'")
  assert (config.data.source, config.data.labels_file, config.data.dir) == ("2012", "001", "none")
  assert config.init_from.path == "1e3" and config.data.split == "train"


def test_every_recipe_is_a_valid_config_without_a_warmup_that_does_nothing():
  for name, recipe in engine.recipes():
    optim = config_lib.load(f"{engine.ROOT / 'configs' / name}.py:{recipe}")[0].optim
    assert optim.schedule == "warmup_cosine" or optim.warmup.value == 0, f"{name}:{recipe}"


def test_an_unknown_recipe_and_an_unknown_file_name_the_nearest():
  with pytest.raises(UserError, match="Did you mean 'imagenet'"):
    config_lib.load(str(engine.ROOT / "configs" / "msn.py") + ":imagnet")
  with pytest.raises(UserError, match="Did you mean '.*msn.py'"):
    config_lib.load(str(engine.ROOT / "configs" / "mns.py"))


def test_the_config_of_a_run_is_a_config(tmp_path):
  config, tree = config_lib.load(str(engine.ROOT / "configs" / "msn.py"), {"total": "40steps", "method.focal_views": "3"})
  file = tmp_path / "config.json"
  file.write_text(json.dumps(tree, default=str))
  assert config_lib.load(str(file), {})[0] == config
  assert config_lib.load(str(file), {"total": "50steps"})[0].total == Interval(50, "steps")


@pytest.mark.parametrize(("name", "text", "told"), [("config.json", "{", "not readable as JSON"), ("config.json", "[1]", "an object of keys"), ("msn.yaml", "a: 1", "a Python file, or")])
def test_a_file_that_is_no_config_is_one_clear_line(tmp_path, name, text, told):
  (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=told):
    config_lib.load(str(tmp_path / name), {})


def test_intervals_convert_to_steps():
  assert Interval.parse("2epochs").steps(batch_size=10, examples=95) == 19
  assert Interval.parse("1e3images").steps(batch_size=10, examples=95) == 100


@pytest.mark.parametrize(
  "every,keep_every,steps,period",
  [
    ("1epochs", "100epochs", 1251, 125100),  # 1,251.1 and 125,113.96 steps, rounded one by one, do not divide
    ("350steps", "1epochs", 350, 1400),  # the whole number of saves nearest to it
    ("10epochs", "1steps", 12511, 12511),  # no more often than what is saved
    ("1images", "1epochs", 1, 1251),
  ],
)
def test_what_is_kept_for_good_is_saved_at_all(every, keep_every, steps, period):
  config = CheckpointConfig(every=Interval.parse(every), keep_every=Interval.parse(keep_every))
  imagenet = dict(batch_size=1024, examples=1281167)
  assert config.every.steps(**imagenet) == steps and period % steps == 0
  assert config.keep_period(**imagenet) == period


def test_nothing_is_kept_for_good_where_it_is_not_asked_for():
  assert CheckpointConfig().keep_period(batch_size=8, examples=64) is None
  assert Interval.parse("0steps").steps(batch_size=10, examples=95) == 0
