"""Fine-tuning: a run that starts from another one on few labels, layer by layer, and the constants of the recipes."""

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl import setup, start
from big_ssl.core import optim
from big_ssl.core.checkpoint import Checkpointer
from big_ssl.evals.classify import Classify
from big_ssl.evaluate import Extractor

TINY = engine.SMALL | engine.TINY["vit"] | {"batch_size": 8, "data.train_examples": 120, "data.labels_per_class": 1, "model.drop_path": 0.0}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
  """The work directory of a tiny MSN run, and its state."""
  path = tmp_path_factory.mktemp("msn")
  run = setup.make_run(engine.small("msn"), devices=jax.devices()[:1])
  state = run.initial_state()
  checkpointer = Checkpointer(path)
  checkpointer.save(state, meta=run.meta())
  checkpointer.close()
  return path, state


def test_a_saved_run_goes_on_with_layers_at_their_own_rates_and_is_scored_by_its_own_head(earlier):
  path, before = earlier
  exact = {"optim.warmup": "0steps", "optim.weight_decay": 0.0, "optim.clip": 0.0, "optim.eps": 1e-12, "method.mixup": 0.0}
  config = engine.load("finetune", **TINY | exact | {"total": "20steps", "init_from.path": str(path), "init_from.tree": "teacher"})
  run = setup.make_run(config, devices=jax.devices()[:1])
  notes = engine.Notes()
  state = first = start.start_from(config.init_from, run.initial_state(), notes, model=run.method.model)
  jax.tree.map(np.testing.assert_array_equal, state.params["encoder"]["backbone"], before.extra["teacher"]["backbone"])
  assert notes.lines[-1].endswith("as initialized: params/encoder/head/fc/bias, params/encoder/head/fc/kernel")
  start_params, losses, after_one = jax.tree.map(np.asarray, first.params), [], None
  with jax.set_mesh(run.mesh):
    function = run.jit_step()
    for raw in run.batches(0, 20, state.extra):
      state, metrics = function(state, raw, run.resident)
      losses.append(float(metrics["loss"]))
      after_one = jax.tree.map(np.asarray, state.params) if after_one is None else after_one
  # Adam's first step has the length of the learning rate in every coordinate with a gradient.
  expected = {"block_0": 0.75**2, "block_1": 0.75, "norm": 1.0, "patch_embed": 0.75**3, "cls_token": 0.75**3, "pos_embed": 0.75**3, "head": 1.0}
  for name, a, b in zip(optim.paths(start_params), jax.tree.leaves(start_params), jax.tree.leaves(after_one), strict=True):
    module = name.split("/")[2] if "backbone" in name else "head"
    assert np.abs(b - a).max() == pytest.approx(1e-3 * expected[module], rel=2e-2), name
  assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5]), losses
  extract = Extractor(run)
  extract.state = state
  report = Classify()(extract)
  assert "of 10 classes" in report.protocol and "40 of 40 labeled held-out images" in report.protocol
  logits = extract("eval", output="logits")
  assert report.metrics["top1"] == pytest.approx(100 * np.mean(logits.features.argmax(1) == logits.labels))


def test_an_epoch_is_over_the_labeled_images_and_the_classes_are_those_of_the_data(tmp_path):
  file = tmp_path / "labeled.txt"
  whole = setup.make_run(engine.load("finetune", **TINY | {"data.labels_per_class": 0}), devices=jax.devices()[:1])
  rows = np.flatnonzero(whole.sources["train"].labels < 4)[:16]  # a list without the last classes
  file.write_text("\n".join(map(str, rows)))
  options = {"data.labels_per_class": 0, "data.labels_file": str(file), "total": "6epochs"}
  run = setup.make_run(engine.load("finetune", **TINY | options), devices=jax.devices()[:1])
  assert (run.examples, run.total_steps, run.method.num_classes) == (16, 12, 10) and whole.examples == 120
  labels = np.concatenate([raw["label"] for raw in map(lambda i: run.pipelines[""].batch(i), range(2))])
  np.testing.assert_array_equal(np.bincount(labels, minlength=4), np.bincount(whole.sources["train"].labels[rows], minlength=4))
  assert len(run.sources["eval"]) == len(whole.sources["eval"])
  assert run.meta()["data"]["hash"] != whole.meta()["data"]["hash"]


def test_without_a_run_to_start_from_it_trains_from_scratch_and_says_so(tmp_path):
  run = setup.make_run(engine.load("finetune", **TINY), devices=jax.devices()[:1])
  assert run.config.init_from is None
  notes, checkpointer = engine.Notes(), Checkpointer(tmp_path)
  start.start_state(run, checkpointer, notes)
  checkpointer.close()
  assert "starts from scratch: no config.init_from.path" in notes.lines


def rates(recipe, steps_per_epoch=10, **options):
  """{epoch: (trunk lr, head lr)} and the decay, from the recipe's own numbers."""
  config = engine.load("finetune", recipe, **options).optim
  at = optim.learning_rate(config, total_steps=1000 * steps_per_epoch, batch_size=256, examples=256 * steps_per_epoch)
  paths = {"encoder": {"backbone": {"layer4_0": {"bn1": {"scale": 0}, "conv1": {"kernel": 0}, "se": {"fc1": {"bias": 0}}}}, "head": {"fc": {"bias": 0}}}}
  params = jax.tree.map(lambda _: jnp.zeros(1), paths)
  method_rules = setup.make_method(engine.load("finetune", recipe), num_classes=10).param_rules()
  table = optim.match_rules(params, (*config.rules, *method_rules), batch_size=1, examples=1)
  return (lambda epoch: float(at(epoch * steps_per_epoch))), {t.path.split("/", 1)[1]: t.rule for t in table}


def test_swav_has_a_fast_head_on_a_slow_trunk_and_two_drops():
  for recipe, trunk, head in (("swav_1pct", 0.02, 5.0), ("swav_10pct", 0.01, 0.2)):
    lr, rules = rates(recipe)
    assert [lr(e) for e in (0, 11.9, 12, 16)] == pytest.approx([trunk, trunk, trunk / 5, trunk / 25])
    assert rules["backbone/layer4_0/conv1/kernel"].lr_mult == 1 and lr(0) * rules["head/fc/bias"].lr_mult == pytest.approx(head)
    config = engine.load("finetune", recipe)
    assert (config.batch_size, str(config.total), config.optim.weight_decay) == (256, "20epochs", 0)
    assert config.data.source == f"tfds:imagenet2012_subset/{recipe.split('_')[1]}"


def test_seer_drops_its_rate_and_decays_biases_but_no_normalization():
  lr, rules = rates("seer_low_shot")
  assert [lr(e) for e in (0, 30, 60)] == pytest.approx([0.1, 0.01, 0.001])
  decayed = {name: rule.weight_decay for name, rule in rules.items()}
  assert decayed == {"backbone/layer4_0/bn1/scale": 0, "backbone/layer4_0/conv1/kernel": 1, "backbone/layer4_0/se/fc1/bias": 1, "head/fc/bias": 1}
  lr, _ = rates("seer_384")
  assert [lr(e) for e in (0, 30, 60, 90, 100)] == pytest.approx([0.1 * 0.1**i for i in range(5)])
  lr, _ = rates("seer_1pct")
  assert [lr(e) for e in (29.9, 30, 69)] == pytest.approx([0.05, 0.005, 0.005])
  one, ten = engine.load("finetune", "seer_1pct"), engine.load("finetune", "seer_10pct")
  assert ten.data.source == "tfds:imagenet2012_subset/10pct" and (one.method, one.optim, one.total) == (ten.method, ten.optim, ten.total)


def test_paws_is_tuned_on_the_labels_that_it_was_trained_with():
  for recipe, pretraining in (("paws_10pct", "imagenet"), ("paws_1pct", "imagenet_1pct")):
    tuned, trained = engine.load("finetune", recipe), engine.load("paws", pretraining)
    assert tuned.data.labels_per_class == trained.method["labels_per_class"] and tuned.data.labels_seed == 0 == trained.method.get("labels_seed", 0)
    assert tuned.init_from.path == f"runs/paws-{pretraining}" and tuned.data.source == trained.data.source


def test_the_vit_recipe_has_the_constants_of_the_paper():
  config = engine.load("finetune", "vit_imagenet")
  method, o = config.method, config.optim
  assert (method["label_smoothing"], method["mixup"], method["cutmix"], config.model["drop_path"]) == (0.1, 0.8, 1.0, 0.2)
  assert method["rand_augment"] == {"layers": 2, "magnitude": 9.0, "std": 0.5}
  assert (o.lr, o.layer_decay, str(o.warmup), str(config.total), config.batch_size) == (2e-3, 0.65, "5epochs", "100epochs", 1024)
  table = (engine.ROOT / "tests" / "tables" / "finetune-vit_imagenet.txt").read_text()
  decay = lambda name: next(line.split()[-5] for line in table.splitlines() if line.startswith(f"encoder/{name} "))
  assert [decay(n) for n in ("backbone/pos_embed", "backbone/cls_token", "head/fc/bias", "head/fc/kernel")] == ["0", "0", "0", "1"]
