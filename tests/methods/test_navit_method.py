"""Training on packed images of native aspect: the plan of a batch, its pixels, hosts, mistakes."""

import engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import patches, resample
from big_ssl.core.step import prepare
from big_ssl.core.types import UserError
from big_ssl.data.pipeline import Pipeline
from big_ssl.data.source import Python
from big_ssl.methods.navit import NaViTClassification
from big_ssl.models.navit import NaViT

MODEL = NaViT(variant="custom", width=16, depth=1, heads=2, mlp_dim=16, patch=4, image_size=64)
METHOD = NaViTClassification(model=MODEL, num_classes=3, tokens=48, shard_size=4, sequences=2, max_images=4, side=(8, 32), size=16)


def rectangles(count=24):
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), dtype=np.uint8) for _ in range(count)]
  return Python(images, labels=np.arange(count) % 3)


def pipeline(rows=(0, 8), method=METHOD):
  return Pipeline(rectangles(), method.inputs(), batch_size=8, seed=0, rows=rows, canvas=64, threads=1)


@pytest.fixture(scope="module")
def prepared():
  return jax.jit(lambda raw: prepare(METHOD.inputs(), raw, None, jax.random.key(0)))(pipeline().batch(0))


def test_a_batch_is_the_same_for_one_and_two_hosts_at_any_step():
  whole, halves = pipeline().batch(5), [pipeline(rows).batch(5) for rows in ((0, 4), (4, 8))]
  for key, value in whole.items():
    np.testing.assert_array_equal(np.concatenate([h[key] for h in halves]), value, err_msg=key)
    assert value.shape == pipeline().spec()[key].shape and value.dtype == pipeline().spec()[key].dtype, key
  assert not np.array_equal(pipeline().batch(6)["crop/plan/image"], whole["crop/plan/image"])


def test_patches_are_those_of_each_crop_at_its_own_size(prepared):
  raw = pipeline().batch(0)
  view = METHOD.inputs().views[0]
  sequences = patches.pack_native(prepared["crop"][:, 0], prepared["crop_plan"], patch=4)
  plan = {key.rpartition("/")[2]: value for key, value in raw.items() if "/plan/" in key}
  for i in range(8):
    size = tuple(int(n) * 4 for n in plan["extent"][i])
    box, flip = raw["crop/box"][i : i + 1], raw["crop/flip"][i : i + 1]
    alone = resample.cut(jnp.asarray(raw["canvas"][i : i + 1]), box, flip, size=size)[0, 0]
    for operation in view.augment:
      alone = operation(jax.random.key(0), alone)  # normalization
    flat = patches.patchify(alone, 4).reshape(-1, 48)
    shard, image = divmod(i, 4)
    here = plan["image"] == image
    here[: 2 * shard] = here[2 * shard + 2 :] = False
    np.testing.assert_allclose(sequences.patches[here], flat, atol=2e-5)
    box = box[0, 0]
    assert abs(np.log(box[2] / box[3] * size[1] / size[0])) < 0.7, (box, size)  # the aspect, but for rounding to patches


def test_unpacked_features_belong_to_their_images():
  plan = {k.rpartition("/")[2]: jnp.asarray(v) for k, v in pipeline().batch(0).items() if "/plan/" in k}
  slots = jnp.zeros((4, 4, 1)).at[:].set(-1.0)
  for shard in range(2):
    for i in range(4):
      n = 4 * shard + i
      slots = slots.at[2 * shard + plan["row"][n], plan["slot"][n], 0].set(n)
  np.testing.assert_array_equal(patches.unpack_images(slots, plan)[:, 0], np.arange(8))


def test_the_loss_is_that_of_the_images_one_by_one(prepared):
  batch = prepared
  params, extra = jax.jit(METHOD.init)(jax.random.key(0), batch)
  params = jax.tree.map(lambda x: x + 0.1, params)
  loss, _ = jax.jit(METHOD.loss)(params, extra, batch, jax.random.key(1), jnp.int32(0))
  apply = jax.jit(lambda images: METHOD.encoder.apply({"params": params["encoder"]}, images, train=False))
  losses = []
  for i in range(8):
    height, width = (int(n) * 4 for n in batch["crop_plan"]["extent"][i])
    out = apply(batch["crop"][i, :, :height, :width])
    losses.append(-jax.nn.log_softmax(out["projection"][0])[batch["label"][i]])
  np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


def test_a_shard_that_does_not_divide_the_batch_of_a_device_is_refused():
  with pytest.raises(UserError, match="config.method.shard_size=3: must divide the 8 images of each device"):
    engine.train_steps(engine.small("navit", batch_size=8, **{"method.shard_size": 3}))


def test_positions_that_end_before_the_largest_image_are_refused():
  with pytest.raises(UserError, match="lower config.method.max_grid"):
    METHOD.replace(model=MODEL.clone(pos_coordinates="absolute", image_size=16))
