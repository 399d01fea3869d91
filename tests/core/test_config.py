"""Config errors name the path, the value, what is accepted and the nearest name."""

import engine
import jax
import pytest

from big_ssl import setup
from big_ssl.core import config as config_lib
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
  ],
)
def test_a_wrong_value_is_one_clear_line(overrides, parts):
  with pytest.raises(UserError) as error:
    load(**overrides)
  message = str(error.value)
  assert "\n" not in message and all(p in message for p in parts), message


def test_an_unknown_recipe_and_an_unknown_file_name_the_nearest():
  with pytest.raises(UserError, match="Did you mean 'imagenet'"):
    config_lib.load(str(engine.ROOT / "configs" / "msn.py") + ":imagnet")
  with pytest.raises(UserError, match="Did you mean '.*msn.py'"):
    config_lib.load(str(engine.ROOT / "configs" / "mns.py"))


def test_intervals_convert_to_steps():
  assert Interval.parse("2epochs").steps(batch_size=10, examples=95) == 19
  assert Interval.parse("1e3images").steps(batch_size=10, examples=95) == 100
  assert Interval.parse("0steps").steps(batch_size=10, examples=95) == 0
