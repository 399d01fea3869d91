"""VGG-16 with BN of DeepCluster and DeeperCluster: the public network, its sizes and the folded Sobel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.encoder import Encoder, encode
from big_ssl.models.sobel import Sobel
from big_ssl.models.vgg import VGG
from big_ssl.weights import transfer
from big_ssl.weights.convnets import fold_sobel
from big_ssl.weights.families import load

nhwc = lambda x: jnp.asarray(np.moveaxis(x, 1, -1))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_public_network_is_reproduced(golden, mode):
  z = golden("deepercluster_vgg_tiny")
  net = load("deepercluster", {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")})
  assert net.model["variant"] == "deepercluster" and net.model["widths"] == (4, 6, 8, 12, 16)
  train, encoder, head = mode == "train", Encoder(transfer.backbone(net.model)), net.weights.params["head"]["fc"]

  def logits(images):
    out = encode(encoder, net.weights.params, net.weights.batch_stats, images, train=train)
    return out.out["relu"] @ head["kernel"] + head["bias"], (out.out, out.batch_stats)

  scores, pullback, (out, stats) = jax.vjp(logits, nhwc(z["input"]), has_aux=True)
  np.testing.assert_allclose(scores, z[f"output/{mode}_logits"], atol=2e-5, rtol=2e-5)
  np.testing.assert_allclose(out["pooled"], z[f"output/{mode}_features"], atol=2e-5, rtol=2e-5)
  for i, stage in enumerate(out["stages"], 1):
    wanted = z[f"output/{mode}_conv{i}"]
    found = stage if wanted.ndim == 4 else stage.mean((1, 2))
    np.testing.assert_allclose(found, nhwc(wanted) if wanted.ndim == 4 else wanted, atol=2e-5, rtol=2e-5)
  gradient = pullback(jnp.asarray(z["cotangent_logits"]))[0]
  np.testing.assert_allclose(gradient, nhwc(z[f"grad_input_{mode}"]), atol=2e-5, rtol=2e-5)
  if train:
    for i, index in enumerate((1, 4, 8, 11, 15, 18, 21, 25, 28, 31, 35, 38, 41), 1):
      for kind in ("mean", "var"):
        wanted = z[f"new_state/body.features.{index}.running_{kind}"]
        np.testing.assert_allclose(stats["backbone"][f"bn{i}"][kind], wanted, atol=2e-5, rtol=2e-5)


def test_sobel_folds_into_the_first_convolution(golden):
  z = golden("deepercluster_vgg_tiny")
  small = z["merge_conv1_in"].transpose(2, 3, 1, 0)
  # The public code fills the upper left 3x3 places only and leaves the others at their random start.
  np.testing.assert_allclose(fold_sobel(small)[:3, :3], z["merge_conv1_out"].transpose(2, 3, 1, 0)[:3, :3], atol=2e-5)
  images = jax.random.normal(jax.random.key(0), (1, 12, 12, 3))
  conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  two = conv(Sobel(padding=0).apply({}, images), jnp.asarray(small))
  np.testing.assert_allclose(conv(images, jnp.asarray(fold_sobel(small))), two, atol=1e-4)


@pytest.mark.parametrize("variant,sobel,first", [("deepcluster", True, 224), ("deepercluster", True, 226), ("deepercluster", False, 226)])
def test_full_sizes_are_the_published_ones(variant, sobel, first):
  model = VGG(variant=variant, sobel=sobel)
  shape = lambda x: model.init_with_output(jax.random.key(0), x, train=False)
  out, variables = jax.eval_shape(shape, jnp.zeros((1, 224, 224, 3)))
  assert variables["params"]["fc6"]["kernel"].shape == (25088, 4096)
  sides = [s.shape[1] for s in out["stages"]]
  assert sides[0] == first and sides[2] == first // 2 and sides[12] == 14 and len(sides) == 13


def test_linear_layers_start_as_in_the_public_codes():
  sizes = {"widths": (4,) * 5, "fc": 400, "image_size": 32}
  kernel = {}
  for variant in ("deepcluster", "deepercluster"):
    params = VGG(variant=variant, **sizes).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)["params"]
    kernel[variant] = np.asarray(params["fc7"]["kernel"])
  np.testing.assert_allclose(kernel["deepcluster"].std(), 0.01, rtol=0.05)
  assert 0.045 < np.abs(kernel["deepercluster"]).max() <= 400**-0.5


def test_images_that_do_not_fit_are_clear_errors():
  with pytest.raises(UserError, match="image_size=224: fc6 expects a last map of 7x7; images of 96x96 give 3x3"):
    VGG().init(jax.random.key(0), jnp.zeros((1, 96, 96, 3)), train=False)
