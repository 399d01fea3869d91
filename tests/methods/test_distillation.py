"""Distillation: one crop for both networks, a frozen teacher, weights of an earlier run, mistakes."""

import contextlib
import dataclasses
import types

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl import setup, start
from big_ssl.core.checkpoint import Checkpointer
from big_ssl.core.step import prepare_streams
from big_ssl.core.types import UserError
from big_ssl.methods.distillation import Distillation
from big_ssl.models.flexivit import FlexiViT
from big_ssl.models.patch_resize import resize_kernel

MODEL = FlexiViT(variant="custom", width=16, depth=1, heads=2, mlp_dim=16, patch=4, image_size=16, kernel_patch=8, patch_sizes=(2, 4))
METHOD = Distillation(model=MODEL, num_classes=3, size=16, teacher_size=16, mean=(), std=())
IMAGES = jax.random.uniform(jax.random.key(0), (6, 1, 16, 16, 3))
BATCH = {"crop": IMAGES, "teacher_crop": IMAGES, "label": jnp.array([0, 1, 2, 0, 1, -1])}


def loss(method, *, seed=1):
  params, extra = method.init(jax.random.key(0), BATCH)
  return method.loss(params, extra, BATCH, jax.random.key(seed), jnp.int32(0))


def test_both_networks_see_the_same_crop_at_their_sizes():
  run = setup.make_run(engine.small("distillation", **{"method.teacher_size": 64, "method.mean": (), "method.std": ()}), devices=jax.devices()[:1])
  raw = next(run.batches(0, 1, {}))
  batch = prepare_streams(run.method, raw, run.resident, jax.random.key(0))
  small, large = batch["crop"][:, 0], batch["teacher_crop"][:, 0]
  assert small.shape == (16, 32, 32, 3) and large.shape == (16, 64, 64, 3)
  halved = large.reshape(16, 32, 2, 32, 2, 3).mean(axis=(2, 4))
  apart = float(jnp.abs(halved - small).mean())
  assert apart < 0.25 * float(jnp.abs(halved[:, :, ::-1] - small).mean()), apart
  assert apart < 0.25 * float(jnp.abs(jnp.roll(halved, 1, axis=0) - small).mean()), apart


def test_the_teacher_is_one_plain_network_whatever_patch_the_student_trains_at():
  teachers = {method.teacher_model for method in setup.by_patch_size(METHOD).values()}
  (teacher,) = teachers
  assert (teacher.patch, teacher.kernel_patch, teacher.pos_grid, teacher.patch_sizes) == (8, 0, 0, ())
  other = METHOD.replace(teacher={"patch": 4, "image_size": 32}, teacher_size=32)
  assert (other.teacher_model.patch, other.teacher_model.table()) == (4, (8, 8))
  hash(other)


def test_a_student_with_the_teacher_s_weights_agrees_and_its_loss_is_zero():
  same = METHOD.replace(teacher={"patch": 4, "kernel_patch": 8, "pos_grid": 7})
  params, extra = same.init(jax.random.key(0), BATCH)
  apart, (_, metrics) = same.loss(params, extra, BATCH, jax.random.key(1), jnp.int32(0))
  assert apart > 1e-4
  value, (after, metrics) = same.loss(params, extra | {"teacher": params["encoder"]}, BATCH, jax.random.key(1), jnp.int32(0))
  assert abs(float(value)) < 1e-6 and float(metrics["top1_agreement"]) == 1
  assert float(metrics["accuracy"]) == float(metrics["teacher_accuracy"])
  jax.tree.map(np.testing.assert_array_equal, after["teacher"], params["encoder"])


def test_images_of_both_are_mixed_by_one_share_or_not_at_all(monkeypatch):
  seen = []
  mix = lambda x, *, share: (seen.append((x.shape, float(share))), x)[1]
  monkeypatch.setattr("big_ssl.methods.distillation.mixup.mix", mix)
  loss(METHOD)
  assert len(seen) == 2 and seen[0] == seen[1] and 0.5 <= seen[0][1] < 1
  loss(METHOD.replace(mixup=0.0))
  assert len(seen) == 2 and METHOD.replace(mixup=0.0).supports_accumulation and not METHOD.supports_accumulation


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"teacher": {"imagesize": 32}}, r"config.method.teacher.imagesize=32: no field.*Did you mean 'image_size'\?"),
    ({"teacher_size": 20}, "config.method.teacher_size=20: must be a multiple of the teacher's patch 8"),
    ({"size": 18}, "config.method.size=18: must be a multiple of config.model.patch=4"),
    ({"temperature": 0.0}, "config.method.temperature=0.0"),
    ({"mixup": -1.0}, "config.method.mixup=-1.0"),
  ],
)
def test_what_does_not_fit_is_one_clear_line(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(METHOD, **changes)


def test_labels_are_needed_to_know_the_classes():
  with pytest.raises(UserError, match="at least 2 classes, the data has 0"):
    METHOD.replace(num_classes=0).init(jax.random.key(0), BATCH)


def test_teacher_and_student_start_from_one_run_and_the_student_s_kernel_is_resized(tmp_path):
  earlier = setup.make_run(engine.small("supervised"), devices=jax.devices()[:1])
  before = earlier.initial_state()
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(before, meta=earlier.meta())
  checkpointer.close()
  lines = []
  notes = types.SimpleNamespace(notice=lines.append, timer=lambda name: contextlib.nullcontext())
  changes = {"init_from.path": str(tmp_path), "model.kernel_patch": 16, "method.teacher": {"patch": 8}}
  run = setup.make_run(engine.small("distillation", **changes), devices=jax.devices()[:1])
  after = start.start_from(run.config.init_from, run.initial_state(), notes, model=run.method.model)
  jax.tree.map(np.testing.assert_array_equal, after.extra["teacher"], before.params["encoder"])
  student = after.params["encoder"]
  kernel = np.asarray(before.params["encoder"]["backbone"]["patch_embed"]["conv"]["kernel"])
  np.testing.assert_allclose(student["backbone"]["patch_embed"]["conv"]["kernel"], resize_kernel(kernel, size=(16, 16)), atol=1e-6)
  assert "patch_embed/conv/kernel [8, 8, 3, 24] to [16, 16, 3, 24]" in lines[-1]
  jax.tree.map(np.testing.assert_array_equal, student["head"], before.params["encoder"]["head"])
