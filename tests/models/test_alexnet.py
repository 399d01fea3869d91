"""AlexNet, VGG's sibling of the clustering papers, and their Sobel front end: the public networks, in and out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.alexnet import AlexNet
from big_ssl.models.encoder import Encoder, encode
from big_ssl.models.resnet import ResNet
from big_ssl.models.sobel import Sobel
from big_ssl.weights import transfer
from big_ssl.weights.families import LAYOUTS, load
from big_ssl.weights.family import convert, detect

nhwc = lambda x: jnp.asarray(np.moveaxis(x, 1, -1))


def states(z):
  return {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}


@pytest.mark.parametrize("name,padding", [("deepcluster", 1), ("deepercluster", 2)])
def test_sobel_maps_and_gradients_are_those_of_the_public_codes(golden, name, padding):
  z = golden("deepcluster_sobel")
  out, pullback = jax.vjp(lambda x: Sobel(padding=padding).apply({}, x), nhwc(z["input"]))
  np.testing.assert_allclose(out, nhwc(z[f"out_{name}"]), atol=2e-5)
  np.testing.assert_allclose(pullback(nhwc(z[f"cotangent_{name}"]))[0], nhwc(z[f"grad_input_{name}"]), atol=2e-5)


def test_sobel_sees_no_constant_and_a_ramp_in_one_channel_only():
  inside = (slice(None), slice(1, -1), slice(1, -1))
  assert np.abs(Sobel().apply({}, jnp.full((1, 9, 9, 3), 0.7))[inside]).max() < 1e-5
  ramp = jnp.broadcast_to(jnp.arange(9.0)[None, None, :, None], (1, 9, 9, 3))
  out = np.asarray(Sobel().apply({}, ramp)[inside])
  np.testing.assert_allclose(out[..., 0], -8.0, atol=1e-4)
  np.testing.assert_allclose(out[..., 1], 0.0, atol=1e-4)


@pytest.mark.parametrize("name,heads", [("deepcluster_alexnet_tiny", 1), ("sela_alexnet_tiny", 3)])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_public_network_is_reproduced(golden, name, heads, mode):
  z = golden(name)
  net = load("alexnet", states(z))
  params, before = net.weights.params, net.weights.batch_stats
  head = params["head"] if heads > 1 else jax.tree.map(lambda x: x[None], params["head"]["fc"])
  assert len(head["kernel"]) == heads and net.model["sobel"] == ("sobel.0.weight" in states(z))
  train, encoder = mode == "train", Encoder(backbone=transfer.backbone(net.model))

  def logits(images):  # without a key there is no dropout
    out = encode(encoder, params, before, images, train=train)
    scores = out.out["relu"] @ head["kernel"] + head["bias"][:, None]
    return scores.reshape(z[f"output/{mode}_logits"].shape), (out.out, out.batch_stats)

  scores, pullback, (out, stats) = jax.vjp(logits, nhwc(z["input"]), has_aux=True)
  np.testing.assert_allclose(scores, z[f"output/{mode}_logits"], atol=2e-5, rtol=2e-5)
  np.testing.assert_allclose(out["pooled"], z[f"output/{mode}_fc7_prerelu"], atol=2e-5, rtol=2e-5)
  for i, stage in enumerate(out["stages"], 1):
    wanted = z[f"output/{mode}_conv{i}"]
    found = stage if wanted.ndim == 4 else stage.mean((1, 2))
    np.testing.assert_allclose(found, nhwc(wanted) if wanted.ndim == 4 else wanted, atol=2e-5, rtol=2e-5)
  gradient = pullback(jnp.asarray(z["cotangent_logits"]))[0]
  np.testing.assert_allclose(gradient, nhwc(z[f"grad_input_{mode}"]), atol=2e-5, rtol=2e-5)
  if train:
    for i, index in enumerate((1, 5, 9, 12, 15), 1):
      for kind in ("mean", "var"):
        wanted = z[f"new_state/features.{index}.running_{kind}"]
        np.testing.assert_allclose(stats["backbone"][f"bn{i}"][kind], wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["deepcluster_alexnet_tiny", "sela_alexnet_tiny", "deepercluster_vgg_tiny"])
@pytest.mark.parametrize("infix", ["", "features.module.", "module."])
def test_import_and_export_are_bit_equal_under_every_public_prefix(golden, name, infix):
  named = state = states(golden(name))
  if infix == "module.":
    named = {f"module.{k}": v for k, v in state.items()}
  elif infix:
    named = {k.replace("features.", infix): v for k, v in state.items()}
  out = convert(named, layout=detect(named, LAYOUTS), expected=transfer.expected).tensors()
  assert out.keys() == named.keys()
  assert all(np.array_equal(out[k], named[k]) for k in named)


def test_a_vgg_without_the_prefix_of_deeper_cluster_is_deep_clusters(golden):
  state = {k.removeprefix("body."): v for k, v in states(golden("deepercluster_vgg_tiny")).items() if not k.endswith("num_batches_tracked")}
  net = load("vgg", {k.replace("features.", "features.module."): v for k, v in state.items()})
  assert net.model["variant"] == "deepcluster" and transfer.backbone(net.model).map_size(net.model["image_size"]) == 2
  out = net.layout.keymap(net.model, state).dump(net.weights)
  assert out.keys() == state.keys() and all(np.array_equal(out[k], state[k]) for k in state)


@pytest.mark.parametrize("name", ["features.0.bias", "features.5.running_var", "classifier.4.weight", "top_layer.bias"])
def test_a_missing_tensor_is_named(golden, name):
  state = states(golden("deepcluster_alexnet_tiny"))
  del state[name]
  with pytest.raises(UserError, match=f"missing 1: {name}|2 linear layers|1 linear layer"):
    convert(state, layout=detect(state, LAYOUTS), expected=transfer.expected)


def test_a_tensor_without_a_place_and_other_sobel_filters_are_refused(golden):
  state = states(golden("deepcluster_alexnet_tiny"))
  with pytest.raises(UserError, match="features.99x.weight"):
    load("alexnet", state | {"features.99x.weight": np.zeros(3)})
  with pytest.raises(UserError, match="Sobel"):
    load("alexnet", state | {"sobel.1.weight": 2 * state["sobel.1.weight"]})


def shapes(model, size):
  variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))
  return jax.tree.map(lambda x: x.shape, variables["params"])


def test_full_sizes_are_the_published_ones():
  big, small = shapes(AlexNet(sobel=True), 224), shapes(AlexNet(variant="small"), 224)
  assert big["conv1"]["kernel"] == (11, 11, 2, 96) and big["fc6"]["kernel"] == (9216, 4096)
  assert small["conv1"]["kernel"] == (11, 11, 3, 64) and small["conv4"]["kernel"] == (3, 3, 384, 256)
  assert shapes(AlexNet(stem="cifar", image_size=32), 32)["fc6"]["kernel"] == (256 * 7 * 7, 4096)
  out = jax.eval_shape(lambda x: AlexNet().init_with_output(jax.random.key(0), x, train=False)[0], jnp.zeros((1, 224, 224, 3)))
  assert [s.shape[1] for s in out["stages"]] == [55, 27, 13, 13, 13]


@pytest.mark.parametrize(
  "model,size,message",
  [
    (AlexNet(), 160, "image_size=224: fc6 expects a last map of 6x6; images of 160x160 give 4x4"),
    (AlexNet(image_size=32), 32, "image_size=32: too small"),
    (AlexNet(widths=(4, 4)), 224, "widths"),
    (AlexNet(channels=1), 224, "channels=1"),
  ],
)
def test_images_that_do_not_fit_are_clear_errors(model, size, message):
  with pytest.raises(UserError, match=message):
    shapes(model, size)


def test_dropout_needs_training_and_a_key():
  model = Encoder(backbone=AlexNet(widths=(4,) * 5, fc=64, stem="cifar", image_size=16))
  images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  variables = model.init(jax.random.key(1), images, train=False)
  run = lambda train, rng: encode(model, variables["params"], variables["batch_stats"], images, train=train, rng=rng).out["pooled"]
  a, b = jax.random.key(2), jax.random.key(3)
  np.testing.assert_array_equal(run(False, a), run(False, None))
  assert not np.allclose(run(True, a), run(True, b)) and not np.allclose(run(True, a), run(True, None))
  np.testing.assert_array_equal(run(True, a), run(True, a))


def test_a_resnet_behind_sobel_is_blind_to_color_and_level():
  model = ResNet(depth=18, blocks=(1, 1), stem_width=4, stem="cifar", sobel=True)
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  variables = model.init(jax.random.key(1), images, train=False)
  assert variables["params"]["conv1"]["kernel"].shape == (3, 3, 2, 4)
  swapped = images[..., ::-1]
  np.testing.assert_allclose(
    model.apply(variables, images, train=False)["pooled"], model.apply(variables, swapped, train=False)["pooled"], atol=1e-5
  )
