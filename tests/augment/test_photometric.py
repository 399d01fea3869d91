"""Random photometric operations: how often, how much, in which order; and clear errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.augment import color
from big_ssl.augment.photometric import ColorJitter, Equalize, GaussianBlur, Grayscale, Normalize, Solarize
from big_ssl.core.types import UserError

NAMES = ("brightness", "contrast", "saturation", "hue")
ORDERS = list(itertools.permutations(range(4)))
IMAGE = jnp.asarray(np.random.default_rng(0).uniform(size=(6, 5, 3)), jnp.float32)
STYLES = {
  "pil": (color.brightness, color.contrast_luma, color.saturation_luma, color.shift_hue),
  "simclr": (color.brightness, color.contrast_channel, color.saturation_hsv, color.shift_hue),
  "byol": (color.brightness_add, color.contrast_channel, color.saturation_hsv, color.shift_hue),
}


def many(operation, n, image=IMAGE, seed=0):
  return np.asarray(jax.jit(jax.vmap(operation, (0, None)))(jax.random.split(jax.random.key(seed), n), image))


def composed(style, order, amounts, image=IMAGE):
  for i in order:
    image = jnp.clip(STYLES[style][i](image, amounts[NAMES[i]]), 0.0, 1.0)
  return image


@pytest.mark.parametrize("style", STYLES)
def test_the_jitter_is_the_composition_of_its_operations_in_every_order(style):
  jitter = ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, style=style)
  amounts = dict(brightness=jnp.float32(0.3 if style == "byol" else 1.3), contrast=jnp.float32(0.6),
                 saturation=jnp.float32(1.5), hue=jnp.float32(-0.15))
  slots = jnp.argsort(jnp.array(ORDERS), axis=-1)
  got = jax.jit(jax.vmap(lambda slot: jitter._jitter(list(NAMES), slot, amounts, IMAGE)))(slots)
  for order, picture in zip(ORDERS, got):
    np.testing.assert_allclose(picture, composed(style, order, amounts), atol=1e-5, err_msg=str(order))


def test_random_orders_are_all_24_and_the_fixed_one_is_the_order_of_the_fields():
  n = 500
  keys = jax.random.split(jax.random.key(1), n)
  strengths = dict(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p=1.0)
  jitter = ColorJitter(**strengths)
  slots = jnp.argsort(jnp.array(ORDERS), axis=-1)

  @jax.jit
  @jax.vmap
  def ordered(key):  # [24, H, W, C], each order with the amounts of this key
    amounts = jitter._amounts(jax.random.uniform(key, (16,))[1:5])
    return jax.vmap(lambda slot: jitter._jitter(list(NAMES), slot, amounts, IMAGE))(slots)

  options = np.asarray(ordered(keys))
  shuffled = many(jitter, n, seed=1)
  error = np.abs(options - shuffled[:, None]).max((2, 3, 4))
  assert error.min(1).max() < 1e-5
  clear = (error < 1e-5).sum(1) == 1  # some orders give the same picture
  counts = np.bincount(error.argmin(1)[clear], minlength=24)
  assert (counts > 0).all(), counts
  first = np.bincount([ORDERS[i][0] for i in error.argmin(1)[clear]], minlength=4) / clear.sum()
  np.testing.assert_allclose(first, 0.25, atol=0.1)
  fixed = many(ColorJitter(**strengths, order="fixed"), n, seed=1)
  np.testing.assert_allclose(fixed, options[:, ORDERS.index((0, 1, 2, 3))], atol=1e-5)


@pytest.mark.parametrize(
  "style,name,low,high",
  [("pil", "brightness", 0.6, 1.4), ("byol", "brightness", -0.4, 0.4), ("pil", "contrast", 0.0, 2.2),
   ("pil", "saturation", 0.8, 1.2), ("pil", "hue", -0.1, 0.1)],
)
def test_amounts_are_uniform_in_the_range_of_their_strength(style, name, low, high):
  jitter = ColorJitter(brightness=0.4, contrast=1.2, saturation=0.2, hue=0.1, style=style)
  draws = jnp.stack([jnp.linspace(0.0, 1.0, 5)] * 4, -1)
  np.testing.assert_allclose(jax.vmap(jitter._amounts)(draws)[name], np.linspace(low, high, 5), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_each_strength_alone_changes_the_picture_and_none_leaves_it(name):
  alone = {n: 0.0 for n in NAMES} | {name: 0.3}
  changed = many(ColorJitter(**alone, p=1.0), 4)
  assert (np.abs(changed - IMAGE).max((1, 2, 3)) > 1e-3).all()
  np.testing.assert_array_equal(many(ColorJitter(**(alone | {name: 0.0}), p=1.0), 1)[0], IMAGE)


@pytest.mark.parametrize(
  "operation",
  [ColorJitter(p=0.8), Grayscale(p=0.2), GaussianBlur(p=0.1, sigma=(1.0, 2.0)), Solarize(p=0.3), Equalize(p=0.4)],
  ids=lambda o: type(o).__name__,
)
def test_operations_happen_as_often_as_asked_and_stay_in_range(operation):
  n = 2000
  pictures = many(operation, n)
  rate = (np.abs(pictures - IMAGE).max((1, 2, 3)) > 1e-6).mean()
  assert abs(rate - operation.p) < 4 * np.sqrt(operation.p * (1 - operation.p) / n), rate
  assert pictures.min() >= 0 and pictures.max() <= 1 + 1e-6


@pytest.mark.parametrize("kind", [ColorJitter, Grayscale, GaussianBlur, Solarize, Equalize])
def test_probability_zero_is_the_identity(kind):
  np.testing.assert_array_equal(many(kind(p=0.0), 3), np.stack([IMAGE] * 3))


def test_the_sigma_of_the_blur_is_uniform_in_its_range():
  impulse = jnp.zeros((17, 17, 1)).at[8, 8].set(1.0)
  n = 2000
  pictures = many(GaussianBlur(p=1.0, sigma=(0.2, 2.0)), n, image=impulse)[..., 0].astype(np.float64)
  sigma = np.sqrt(-0.5 / np.log(pictures[:, 8, 9] / pictures[:, 8, 8]))
  assert sigma.min() > 0.199 and sigma.max() < 2.001
  gap = np.abs(np.sort((sigma - 0.2) / 1.8) - (np.arange(n) + 0.5) / n).max()
  assert gap < 1.95 / np.sqrt(n), gap


def test_taps_and_edge_of_the_blur_have_their_effect():
  impulse = jnp.zeros((40, 40, 1)).at[20, 20].set(1.0)

  def width(**options):
    return int((many(GaussianBlur(p=1.0, sigma=(2.0, 2.0), **options), 1, image=impulse)[0, 20, :, 0] > 0).sum())

  assert (width(taps=5), width(taps="tenth"), width(taps="full")) == (5, 5, 17)
  assert GaussianBlur(taps="tenth").radius(224) == 11 and GaussianBlur(taps="tenth").radius(48) == 2
  flat = jnp.ones((8, 8, 1))
  assert many(GaussianBlur(p=1.0, edge="zero"), 1, image=flat).min() < 0.99
  np.testing.assert_allclose(many(GaussianBlur(p=1.0), 1, image=flat), 1.0, atol=1e-6)


def test_a_pair_of_thresholds_is_drawn_from():
  ramp = jnp.linspace(0.0, 1.0, 256).reshape(1, 256, 1)
  pictures = many(Solarize(p=1.0, threshold=(0.25, 0.75)), 500, image=ramp)[:, 0, :, 0]
  threshold = (np.abs(pictures - np.asarray(ramp[0, :, 0])) < 1e-6).argmin(1) / 255
  assert threshold.min() >= 0.25 and threshold.max() <= 0.76
  assert abs(threshold.mean() - 0.5) < 0.03 and abs(threshold.std() - 0.5 / np.sqrt(12)) < 0.02


def test_gray_weights_of_byol_differ_from_those_of_pil():
  pil, byol = (many(Grayscale(p=1.0, luma=luma), 1)[0] for luma in ("pil", "byol"))
  np.testing.assert_allclose(byol, color.grayscale(IMAGE, weights=color.BYOL_LUMA), atol=1e-6)
  assert 1e-5 < np.abs(pil - byol).max() < 1e-3


def test_images_of_one_channel_pass_and_keep_their_channel():
  gray = IMAGE[..., :1]
  np.testing.assert_array_equal(many(Grayscale(p=1.0), 1, image=gray)[0], gray)
  assert many(ColorJitter(p=1.0), 2, image=gray).shape == (2, 6, 5, 1)
  assert np.abs(many(ColorJitter(p=1.0), 2, image=gray) - gray).max() > 1e-3
  np.testing.assert_array_equal(many(ColorJitter(brightness=0.0, contrast=0.0, p=1.0), 1, image=gray)[0], gray)
  normalized = many(Normalize(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)), 1, image=gray)[0]
  np.testing.assert_allclose(normalized, (gray - 0.5) / 0.2, atol=1e-5)


@pytest.mark.parametrize("operation", [ColorJitter(), Grayscale(), Normalize()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels_are_an_error_that_names_view_and_operation(operation, channels):
  with pytest.raises(UserError, match=f"view 'global': {type(operation).__name__}.*{channels}"):
    operation.validate(channels, view="global")
  with pytest.raises(UserError, match=type(operation).__name__):
    operation(jax.random.key(0), jnp.zeros((4, 4, channels)))


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize(
  "operation",
  [
    ColorJitter(p=0.0),
    ColorJitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0),
    ColorJitter(contrast=0.0, saturation=0.0, hue=0.0, p=1.0),
    ColorJitter(saturation=0.0, hue=0.0, p=1.0, style="simclr"),
    Grayscale(p=0.0),
  ],
  ids=["never", "nothing", "brightness", "contrast_of_each_channel", "never_gray"],
)
def test_where_no_color_is_needed_any_number_of_channels_passes(operation, channels):
  image = jnp.asarray(np.random.default_rng(0).uniform(0.1, 0.9, (6, 5, channels)), jnp.float32)
  operation.validate(channels)
  pictures = many(operation, 4, image=image)
  assert pictures.shape == (4, 6, 5, channels)
  idle = operation.p == 0 or not (operation.brightness or operation.contrast)
  assert (np.abs(pictures - image).max() > 1e-3) == (not idle)


def test_contrast_about_the_luma_needs_colors():
  with pytest.raises(UserError, match="ColorJitter.*got 4"):
    ColorJitter(saturation=0.0, hue=0.0).validate(4)


@pytest.mark.parametrize(
  "make,match",
  [
    (lambda: ColorJitter(order="randon"), "ColorJitter.order='randon'.*Did you mean 'random'"),
    (lambda: ColorJitter(style="PIL"), "ColorJitter.style"),
    (lambda: ColorJitter(hue=0.6), "ColorJitter.hue=0.6"),
    (lambda: ColorJitter(contrast=-1.0), "ColorJitter.contrast=-1.0"),
    (lambda: Grayscale(p=1.2), "Grayscale.p=1.2"),
    (lambda: Grayscale(luma="itu"), "Grayscale.luma"),
    (lambda: GaussianBlur(sigma=(2.0, 0.1)), "GaussianBlur.sigma"),
    (lambda: GaussianBlur(taps=4), "GaussianBlur.taps=4"),
    (lambda: GaussianBlur(edge="mirror"), "GaussianBlur.edge"),
    (lambda: Normalize(std=(0.1, 0.0, 0.1)), "Normalize.std"),
    (lambda: Normalize(mean=(0.1,)), "Normalize.mean"),
  ],
)
def test_impossible_fields_are_errors_at_construction(make, match):
  with pytest.raises(UserError, match=match):
    make()
