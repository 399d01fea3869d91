"""A run that starts from the weights of an earlier one, of the same or of another method."""


import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl import setup, start
from big_ssl.core.checkpoint import Checkpointer, signature
from big_ssl.core.config import InitFrom
from big_ssl.core.types import TrainState, UserError
from big_ssl.core.warm_start import warm_start


def state(params, **extra) -> TrainState:
  return jax.tree.map(jnp.asarray, TrainState(step=np.int32(0), params=params, opt_state={"mu": params}, extra=extra))


def saved(state) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def tree(value: float, *, head: int = 3) -> dict:
  return {"backbone": {"w": np.full((2, 2), value)}, "head": {"w": np.full(head, value)}}


def never(path, value, *, shape):
  return None


EARLIER = saved(state({"encoder": tree(1)}, teacher=tree(2), batch_stats={"backbone": {"m": np.full(2, 3.0)}}, center=np.full(4, 9.0)))


def test_weights_and_statistics_are_taken_by_name_and_the_rest_stays():
  new = state({"encoder": tree(0, head=5), "classifier": np.zeros(1)}, batch_stats={"backbone": {"m": np.zeros(2)}}, center=np.zeros(4))
  found = warm_start(new, EARLIER, config=InitFrom(path="earlier"), adapt=never)
  assert found.taken == 2 and set(found.fresh) == {"params/encoder/head/w", "params/classifier"}
  assert np.all(found.state.params["encoder"]["backbone"]["w"] == 1) and np.all(found.state.extra["batch_stats"]["backbone"]["m"] == 3)
  for untouched in (found.state.opt_state, found.state.extra["center"], found.state.params["encoder"]["head"]):
    assert all(not np.any(x) for x in jax.tree.leaves(untouched))


def test_the_teacher_becomes_the_student_where_asked_and_a_new_teacher_starts_as_its_student():
  new = state({"encoder": tree(0)}, teacher=tree(0))
  assert np.all(warm_start(new, EARLIER, config=InitFrom(path="e"), adapt=never).state.extra["teacher"]["head"]["w"] == 2)
  student = warm_start(new, EARLIER, config=InitFrom(path="e", tree="teacher"), adapt=never).state.params["encoder"]
  assert np.all(student["backbone"]["w"] == 2)
  alone = saved(state({"encoder": tree(1)}))
  assert np.all(warm_start(new, alone, config=InitFrom(path="e"), adapt=never).state.extra["teacher"]["backbone"]["w"] == 1)
  with pytest.raises(UserError, match="config.init_from.tree='teacher'.*no teacher"):
    warm_start(new, alone, config=InitFrom(path="e", tree="teacher"), adapt=never)


def test_the_center_and_a_queue_come_along_with_the_heads_they_are_of():
  queue = {"queue": np.full((4, 3), 5.0), "queue_pointer": np.int32(2)}
  earlier = saved(state({"encoder": tree(1)}, center=np.full(4, 9.0), bank=np.ones(2), **queue))
  zeros = {"center": np.zeros(4), "bank": np.zeros(2), "queue": np.zeros((4, 3)), "queue_pointer": np.int32(0)}
  start_ = lambda *, head=3, skip="", **extra: warm_start(
    state({"encoder": tree(0, head=head)}, **(zeros | extra)), earlier, config=InitFrom(path="e", skip=skip), adapt=never
  )
  found = start_()
  assert found.beside == ("center", "queue", "queue_pointer")
  assert np.all(found.state.extra["center"] == 9) and np.all(found.state.extra["queue"] == 5)
  assert found.state.extra["queue_pointer"] == 2 and not np.any(found.state.extra["bank"])  # a bank is of other images
  longer = start_(queue=np.zeros((8, 3)))
  assert longer.beside == ("center",) and longer.state.extra["queue_pointer"] == 0
  assert start_(center=np.zeros(5)).beside == ("queue", "queue_pointer") and start_(skip="center|queue").beside == ()
  assert start_(head=5).beside == start_(skip="head/").beside == ()


def test_modules_are_found_wherever_a_method_keeps_them():
  """PAWS nests its statistics by module, LOCA its teacher."""
  new = state({"encoder": tree(0)}, teacher={"encoder": tree(0)}, batch_stats={"encoder": {"backbone": {"m": np.zeros(2)}}})
  found = warm_start(new, EARLIER, config=InitFrom(path="e"), adapt=never).state
  assert np.all(found.extra["batch_stats"]["encoder"]["backbone"]["m"] == 3)
  assert np.all(found.extra["teacher"]["encoder"]["backbone"]["w"] == 2)


def test_what_is_skipped_stays_and_another_backbone_is_an_error_that_names_what_differs():
  found = warm_start(state({"encoder": tree(0)}), EARLIER, config=InitFrom(path="e", skip="head/"), adapt=never)
  assert not np.any(found.state.params["encoder"]["head"]["w"]) and found.fresh == ("params/encoder/head/w",)
  wide = {"encoder": {"backbone": {"w": np.zeros((2, 3)), "v": np.zeros(1)}}}
  with pytest.raises(UserError, match=r"path='e'.*missing: params/encoder/backbone/v; different: .*\[2, 2\] there, \[2, 3\] here"):
    warm_start(state(wide), EARLIER, config=InitFrom(path="e"), adapt=never)
  warm_start(state(wide), EARLIER, config=InitFrom(path="e", skip="backbone/"), adapt=never)


def test_paws_is_fine_tuned_with_the_first_layer_of_its_projection_head(tmp_path):
  earlier = setup.make_run(engine.small("paws", **{"method.hidden_dim": 0}), devices=jax.devices()[:1])
  before = earlier.initial_state()
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(before.replace(step=jnp.int32(4)), meta=earlier.meta())
  checkpointer.close()
  options = {"method.hidden_layers": 1, "method.zero_init": True, "data.train_examples": 120, "init_from.path": str(tmp_path)}
  run = setup.make_run(engine.small("supervised", **options), devices=jax.devices()[:1])
  notes = engine.Notes()
  after = start.start_from(run.config.init_from, run.initial_state(), notes, model=run.method.model)
  assert signature(after) == signature(run.initial_state()) and int(after.step) == 0
  jax.tree.map(np.testing.assert_array_equal, after.params["encoder"]["backbone"], before.params["encoder"]["backbone"])
  head = after.params["encoder"]["head"]
  for layer in ("fc1", "bn1"):
    jax.tree.map(np.testing.assert_array_equal, head[layer], before.params["encoder"]["head"][layer])
  assert set(head) == {"fc1", "bn1", "fc"} and not np.any(head["fc"]["kernel"])
  assert "step 4" in notes.lines[-1] and "params/encoder/head/fc/kernel" in notes.lines[-1]


def test_a_vit_goes_on_with_other_channels_patches_and_sizes(tmp_path):
  """On gray images, with patches of twice the side, a network of one channel sees what it saw."""
  earlier = setup.make_run(engine.small("simclr"), devices=jax.devices()[:1])
  before = earlier.initial_state()
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(before, meta=earlier.meta())
  checkpointer.close()
  options = {"init_from.path": str(tmp_path), "model.patch": 16, "model.image_size": 64, "model.channels": 1}
  config = engine.small("simclr", **options)
  method = setup.make_method(config, num_examples=40, channels=1)
  images = jnp.zeros((2, 2, 64, 64, 1))
  params, extra = method.init(jax.random.key(0), {"views": images})
  fresh, notes = TrainState(step=jnp.int32(0), params=params, opt_state={}, extra=extra), engine.Notes()
  after = start.start_from(config.init_from, fresh, notes, model=method.model)
  kernel = after.params["encoder"]["backbone"]["patch_embed"]["conv"]["kernel"]
  assert kernel.shape == (16, 16, 1, 24) and "patch_embed/conv/kernel [8, 8, 3, 24] to [16, 16, 1, 24]" in notes.lines[-1]
  gray = np.random.default_rng(0).uniform(size=(8, 8)).astype(np.float32)
  old = np.einsum("hw,hwcd->d", gray, before.params["encoder"]["backbone"]["patch_embed"]["conv"]["kernel"])
  large = np.asarray(jax.image.resize(gray, (16, 16), "linear", antialias=False))
  np.testing.assert_allclose(np.einsum("hw,hwcd->d", large, kernel), old, atol=1e-4)
  table = after.params["encoder"]["backbone"]["pos_embed"]
  np.testing.assert_allclose(table, before.params["encoder"]["backbone"]["pos_embed"], atol=1e-6)  # 4 x 4 again


def test_the_backbone_can_wait_until_a_fresh_head_has_learned(tmp_path):
  options = {"init_from.path": str(tmp_path), "init_from.freeze_backbone": "2steps"}
  run = setup.make_run(engine.small("supervised", **options), devices=jax.devices()[:1])
  assert {t.path: t.freeze_steps for t in run.optimizer.tensors} == {
    t.path: 2 if "backbone" in t.path.split("/") else 0 for t in run.optimizer.tensors
  }
  assert {t.freeze_steps for t in run.optimizer.tensors} == {0, 2}


def test_a_folder_without_checkpoints_is_a_clear_error(tmp_path):
  with pytest.raises(UserError, match="config.init_from.path='.*': not the work directory of a run"):
    start.start_from(InitFrom(path=str(tmp_path)), state({"encoder": tree(0)}), engine.Notes(), model=None)
  assert list(tmp_path.iterdir()) == []
