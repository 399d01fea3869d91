"""What probes read: pooled maps as recorded, and CLS tokens of any ViT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.method import Trunk
from big_ssl.core.types import UserError
from big_ssl.models.conv_probe import RESNET_POOLS, RESNET_STRIDES, pool_map, pool_to_grid, probe_features
from big_ssl.models.readouts import Readout, readouts


class Stub:
  """A trunk whose outputs are given."""

  def __init__(self, out, module=None):
    self._out, self.module = out, module

  def __call__(self, images):
    del images
    return self._out


def vit(**out):
  rng = np.random.default_rng(0)
  made = {"cls_layers": rng.normal(size=(2, 5, 4)), "tokens": rng.normal(size=(2, 9, 4))}
  return made | {"cls_layers_normed": 2 * made["cls_layers"]} | out


def test_pools_of_resnet_match_the_reference_with_and_without_the_padding(golden):
  z = golden("ssl_benchmark_pool")
  names = ("conv1", "res2", "res3", "res4", "res5")
  maps = [jnp.asarray(z[f"input/{name}"]) for name in names]
  for prefix, count_padding in (("output", True), ("output_excluding_pad", False)):
    settings = {"pools": RESNET_POOLS, "strides": RESNET_STRIDES, "kind": "average", "count_padding": count_padding}
    found = probe_features(maps, **settings)
    for i, name in enumerate(names, 1):
      expected = z.get(f"{prefix}/{name}", z[f"output/{name}"])  # the other maps have no padding
      np.testing.assert_allclose(found[f"conv{i}"], expected.transpose(0, 3, 1, 2).reshape(1, -1), atol=1e-6)


def test_channels_come_first_in_the_vector_of_a_map():
  x = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 4, 3)
  found = pool_map(x, kernel=2, stride=2, padding=0)
  assert found.shape == (2, 3, 4)
  np.testing.assert_allclose(found[1, 2], np.asarray(x)[1, :, :, 2].reshape(2, 2, 2, 2).mean((1, 3)).ravel())


def test_cells_of_a_grid_cover_the_map_and_overlap_where_they_do_not_divide_it():
  x = jnp.arange(7.0).reshape(1, 7, 1, 1)
  np.testing.assert_allclose(pool_to_grid(x, grid=(2, 1))[0, 0], [1.5, 4.5])  # rows 0 to 3 and 3 to 6
  np.testing.assert_allclose(pool_to_grid(x, grid=(1, 1))[0, 0], [3.0])


def test_cls_of_the_last_layers_is_normed_and_joined_in_order():
  out = vit()
  found = Readout(kind="cls", layers=4)(Stub(out), None)
  np.testing.assert_array_equal(found, out["cls_layers_normed"][:, 1:].reshape(2, 16))
  unnormed = Readout(kind="cls_unnormed")(Stub(out), None)
  np.testing.assert_array_equal(unnormed, out["cls_layers"][:, -1])


def test_cls_and_average_are_interleaved():
  out = vit()
  found = np.asarray(Readout(kind="cls_average")(Stub(out), None))
  np.testing.assert_allclose(found[:, 0::2], out["cls_layers_normed"][:, -1], atol=1e-6)
  np.testing.assert_allclose(found[:, 1::2], out["tokens"].mean(1), atol=1e-6)


def test_a_network_without_published_pools_stays_below_ten_thousand_numbers():
  stub = Stub({"stages": (jnp.ones((1, 16, 16, 64)), jnp.ones((1, 2, 2, 8)))})
  assert Readout(kind="stages", stage=1)(stub, None).shape == (1, 64, 144)
  assert Readout(kind="stages", stage=2)(stub, None).shape == (1, 8, 4)
  assert Readout(kind="stages", stage=1, grid=(2, 1))(stub, None).shape == (1, 64, 2)


@pytest.mark.parametrize("name", ["resnet", "alexnet"])
def test_the_published_pools_are_those_of_the_network(name):
  from big_ssl.models.alexnet import AlexNet
  from big_ssl.models.resnet import ResNet

  module = {"resnet": ResNet(), "alexnet": AlexNet()}[name]
  shape = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), shape)
  read = lambda i: jax.eval_shape(lambda v, x: Readout(kind="stages", stage=i)(Trunk(module, v), x), variables, shape)
  found = [read(i).shape[1:] for i in (1, 5)]
  assert found == {"resnet": [(64, 144), (2048, 4)], "alexnet": [(96, 100), (256, 36)]}[name]


def test_readouts_are_named_and_equal_ones_are_one_function():
  found = readouts("stages", output="pooled", layers=4, stages=(4, 5), grids=((2, 1), (1, 1)))
  assert [str(r) for r in found] == ["conv4_2x1", "conv4_1x1", "conv5_2x1", "conv5_1x1"]
  assert readouts("output", output="projection", layers=4, stages=()) == ("projection",)
  (cls,) = readouts("cls", output="pooled", layers=2, stages=())
  assert (
    str(cls) == "cls2" and cls == Readout(kind="cls", layers=2) and hash(cls) == hash(Readout(kind="cls", layers=2))
  )


@pytest.mark.parametrize(
  ("readout", "out", "message"),
  [
    (Readout(kind="cls"), {"tokens": 0}, "readout=cls needs a CLS token, config.model.name is NoneType"),
    (Readout(kind="cls", layers=6), vit(), "layers=6: the backbone has 5 blocks"),
    (Readout(kind="stages", stage=3), {"stages": (0, 0)}, "stages=3: NoneType has stages 1 to 2"),
    (Readout(kind="stages"), {}, "stages=1: NoneType has none"),
  ],
)
def test_what_the_backbone_does_not_have_is_named(readout, out, message):
  with pytest.raises(UserError, match=message):
    readout(Stub(out), None)
