"""PAWS and SuNCEt: the recorded values and gradients, what carries gradient, and what the labels are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.losses.semi import label_matrix, paws_loss, soft_neighbors, suncet_loss


def recorded(z, memax_weight, anchors=None, anchor_supports=None, targets=None, target_supports=None):
  given = lambda x, name: z[name] if x is None else x
  return paws_loss(
    given(anchors, "anchor_views"),
    given(anchor_supports, "anchor_supports"),
    given(targets, "target_views_unswapped"),
    given(target_supports, "target_supports"),
    labels=z["support_labels"],
    temperature=float(z["tau"]),
    sharpen=float(z["sharpen_T"]),
    memax_weight=memax_weight,
  )


@pytest.mark.parametrize("name,weight", [("memax0", 0.0), ("memax1", 1.0)])
def test_paws_terms_and_gradients_are_the_recorded_ones(golden, name, weight):
  z = golden("paws_loss")
  out = recorded(z, weight)
  np.testing.assert_allclose(out.ce, z[f"{name}/ce_loss"], rtol=1e-5)
  np.testing.assert_allclose(out.total - out.ce, z[f"{name}/memax_loss"], rtol=1e-5)
  np.testing.assert_allclose(out.probabilities, z["anchor_probs"], atol=1e-5)
  np.testing.assert_allclose(out.targets, z["targets"], atol=1e-5)
  total = lambda a, s: recorded(z, weight, anchors=a, anchor_supports=s).total
  to_views, to_supports = jax.grad(total, argnums=(0, 1))(z["anchor_views"], z["anchor_supports"])
  np.testing.assert_allclose(to_views, z[f"{name}/grad_anchor_views"], atol=1e-5)
  np.testing.assert_allclose(to_supports, z[f"{name}/grad_anchor_supports"], atol=1e-5)


def test_paws_gives_the_side_of_the_targets_no_gradient_and_the_anchors_side_some(golden):
  z = golden("paws_loss")
  sides = [z[k] for k in ("anchor_views", "anchor_supports", "target_views_unswapped", "target_supports")]
  grads = jax.grad(lambda *x: recorded(z, 1.0, *x).total, argnums=(0, 1, 2, 3))(*sides)
  assert [bool(np.any(g)) for g in grads] == [True, True, False, False]


def test_swapping_the_two_big_views_of_every_image_leaves_the_loss(golden):
  z, b = golden("paws_loss"), 5
  swap = lambda x: np.concatenate([x[b : 2 * b], x[:b], x[2 * b :]])
  swapped = recorded(z, 1.0, anchors=swap(z["anchor_views"]), targets=swap(z["target_views_unswapped"]))
  np.testing.assert_allclose(swapped.total, recorded(z, 1.0).total, rtol=1e-6)


def test_targets_are_swapped_and_small_views_get_the_mean():
  h = jnp.eye(4)[jnp.array([0, 1, 2, 3])]  # two images, two big views each: 0 1 | 2 3
  out = paws_loss(
    jnp.concatenate([h, h[:2]]), jnp.eye(4), h, jnp.eye(4), labels=jnp.eye(4), temperature=0.1, sharpen=0.25
  )
  np.testing.assert_array_equal(np.argmax(out.targets[:4], axis=1), [2, 3, 0, 1])
  np.testing.assert_allclose(out.targets[4], [0.5, 0, 0.5, 0], atol=1e-4)


def test_targets_below_the_floor_are_zero_and_the_rest_is_not_renormalized():
  rng = np.random.default_rng(0)
  h, s = rng.normal(size=(20, 6)), rng.normal(size=(15, 6))
  labels = label_matrix(jnp.arange(15) % 5, columns=jnp.arange(5), smoothing=0.1)
  options = dict(labels=labels, temperature=0.1, sharpen=0.25)
  floored = paws_loss(h, s, h, s, floor=1e-2, **options).targets
  whole = paws_loss(h, s, h, s, floor=0.0, **options).targets
  assert np.any((whole > 0) & (whole < 1e-2))
  np.testing.assert_array_equal(floored, np.where(whole < 1e-2, 0, whole))


def test_without_smoothing_loss_and_gradient_stay_finite_where_a_probability_underflows():
  h = jnp.eye(4)
  loss = lambda x: paws_loss(x, -x, x, -x, labels=jnp.eye(4), temperature=1e-3, sharpen=0.25).total
  value, grad = jax.value_and_grad(loss)(h)
  assert np.isfinite(value) and np.isfinite(grad).all()


def test_constant_embeddings_give_uniform_predictions_and_one_class_the_largest_memax():
  labels = label_matrix(jnp.arange(12) % 4, columns=jnp.arange(4), smoothing=0.1)
  one, s = jnp.ones((8, 3)), jnp.ones((12, 3))
  out = paws_loss(one, s, one, s, labels=labels, temperature=0.1, sharpen=0.25)
  np.testing.assert_allclose(out.probabilities, 0.25, atol=1e-6)
  np.testing.assert_allclose(out.memax, -np.log(4), rtol=1e-5)
  apart = jnp.eye(4)[jnp.arange(12) % 4]
  same = jnp.eye(4)[jnp.zeros(8, int)]
  assert paws_loss(same, apart, same, apart, labels=labels, temperature=0.1, sharpen=0.25).memax > -0.1


def test_impossible_shapes_and_a_single_class_are_errors():
  x = jnp.ones((5, 3))
  with pytest.raises(ValueError, match="5 anchors and 4 targets"):
    paws_loss(x, x, x[:4], x, labels=jnp.ones((5, 2)), temperature=0.1, sharpen=0.25)
  with pytest.raises(UserError, match="classes_per_step=1"):
    paws_loss(x[:4], x, x[:4], x, labels=jnp.ones((5, 1)), temperature=0.1, sharpen=0.25)


@pytest.mark.parametrize("case", [0, 1])
def test_label_matrices_are_the_recorded_ones(golden, case):
  z = golden("paws_labels")
  classes, images, world, _, smoothing = z[f"case{case}/classes_imgs_world_unique_smoothing"]
  classes, images, world = int(classes), int(images), int(world)
  device = np.arange(classes * images) % classes
  labels = np.concatenate([device + classes * d for d in range(world)])  # each device has its own classes
  got = label_matrix(jnp.asarray(labels), columns=jnp.arange(classes * world), smoothing=float(smoothing))
  np.testing.assert_allclose(got, z[f"case{case}/labels"], atol=1e-6)


def test_rows_of_the_same_classes_on_two_devices_sum_to_one(golden):
  # The reference makes columns per device that nothing fills; its rows sum to more than 1. This is the definition.
  z = golden("paws_labels")
  smoothing = float(z["case2/classes_imgs_world_unique_smoothing"][-1])
  got = label_matrix(jnp.arange(12) % 3, columns=jnp.arange(3), smoothing=smoothing)
  np.testing.assert_allclose(got, z["case2/labels"][:, :3], atol=1e-6)
  np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)
  assert np.all(z["case2/labels"].sum(1) > 1.1)


def test_suncet_loss_and_gradient_are_the_recorded_ones(golden):
  z = golden("paws_suncet_loss")
  loss = lambda x: suncet_loss(x, labels=z["labels"], temperature=float(z["tau"])).loss
  value, grad = jax.value_and_grad(loss)(z["embeddings"])
  np.testing.assert_allclose(value, z["loss"], rtol=1e-5)
  np.testing.assert_allclose(grad, z["grad_embeddings"], atol=1e-5)


def test_soft_neighbors_are_the_recorded_ones(golden):
  z = golden("paws_snn_eval")
  labels = np.eye(int(z["num_classes"]), dtype=np.float32)[z["support_labels"]]
  got = soft_neighbors(z["query_embeddings"], z["support_embeddings"], labels=labels, temperature=float(z["tau"]))
  np.testing.assert_allclose(got, z["probs"], atol=1e-5)
