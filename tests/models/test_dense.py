"""Backbone outputs as maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.method import Trunk
from big_ssl.core.types import UserError
from big_ssl.models.alexnet import AlexNet
from big_ssl.models.dense import class_attention, patch_map
from big_ssl.models.resnet import ResNet
from big_ssl.models.vit import ViT

TINY = dict(variant="custom", width=8, depth=3, heads=2, mlp_dim=16, patch=4, image_size=8)


def trunk(module, *, side=8):
  return Trunk(module, module.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False))


def test_a_map_keeps_the_order_of_the_patches_and_pads_what_they_do_not_divide():
  vit = trunk(ViT(**TINY, registers=2))
  images = jax.random.uniform(jax.random.key(1), (2, 7, 12, 3))
  found = patch_map(vit, images)
  tokens = vit(jnp.pad(images, ((0, 0), (0, 1), (0, 0), (0, 0))))["tokens"]
  assert found.shape == (2, 2, 3, 8)
  np.testing.assert_array_equal(found[:, 1, 0], tokens[:, 3])


def test_several_layers_of_a_vit_are_normed_and_end_with_the_last():
  vit = trunk(ViT(**TINY, registers=1))
  images = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3))
  both = patch_map(vit, images, layers=2)
  np.testing.assert_allclose(both[..., 8:], patch_map(vit, images), rtol=1e-6, atol=1e-6)
  assert not np.allclose(both[..., :8], both[..., 8:], atol=1e-3)


def test_stages_of_a_convolutional_network_are_joined_at_the_size_of_the_first():
  net = trunk(ResNet(depth=18, stem="cifar", stem_width=8), side=16)
  images = jax.random.uniform(jax.random.key(1), (1, 16, 24, 3))
  stages, found = net(images)["stages"], patch_map(net, images, layers=2)
  assert patch_map(net, images).shape == stages[-1].shape == (1, 2, 3, 64)
  np.testing.assert_allclose(found[..., :32], stages[-2], rtol=1e-6)
  np.testing.assert_allclose(found[:, ::2, ::2, 32:], stages[-1], rtol=1e-6)
  np.testing.assert_allclose(found[:, 1::2, 1::2, 32:], stages[-1], rtol=1e-6)


def test_attention_of_cls_is_a_share_per_patch():
  vit = trunk(ViT(**TINY, registers=1))
  found = class_attention(vit, jnp.ones((2, 8, 12, 3)))
  assert found.shape == (2, 2, 2, 3)
  assert np.all(found > 0) and np.all(np.asarray(found).sum((2, 3)) < 1)


def test_what_a_backbone_does_not_have_is_said():
  vit = trunk(ViT(**TINY))
  with pytest.raises(UserError, match="last 4 blocks asked for, config.model has 3"):
    patch_map(vit, jnp.ones((1, 8, 8, 3)), layers=4)
  with pytest.raises(UserError, match="AlexNet has no attention"):
    class_attention(Trunk(AlexNet(), {}), jnp.ones((1, 64, 64, 3)))
