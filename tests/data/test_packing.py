"""Packing: the goldens, every image placed once, no sequence overflows, the same plan for any number of hosts."""

import dataclasses

import numpy as np
import pytest

from big_ssl.core.packing import Packing, first_fit, layout
from big_ssl.core.types import UserError
from big_ssl.data import packing as lib

PACKING = Packing(patch=16, tokens=256, shard_size=16, sequences=8, max_images=8, side=(64, 256))


def some_sizes(count, seed=0):
  return np.random.default_rng(seed).integers(40, 700, (count, 2))


def test_next_fit_and_first_fit_of_the_golden(golden):
  z = golden("navit_packing")
  lengths, capacity = z["packing/grid_hw"].prod(axis=1), int(z["packing/max_len"])
  np.testing.assert_array_equal(first_fit(lengths, capacity=capacity, open_rows=1).row, z["packing/next_fit_group"])
  placed = first_fit(lengths, capacity=capacity)
  np.testing.assert_array_equal(placed.row, z["packing/first_fit_group"])
  rows = placed.row.max() + 1
  made = layout(placed, z["packing/grid_hw"], rows=rows, capacity=capacity, slots=placed.slot.max() + 1)
  np.testing.assert_allclose(made.padding, z["packing/first_fit_padding_fraction"], rtol=1e-6)


def test_the_largest_grid_of_a_token_budget_is_the_public_one(golden):
  rows = golden("navit_target_size")["rows"]
  for patch in np.unique(rows[:, 2]):
    some = rows[rows[:, 2] == patch]
    grid = lib.target_grid(some[:, :2], patch=patch, max_tokens=some[:, 3])
    np.testing.assert_array_equal(grid * patch, some[:, 4:])


def test_first_fit_of_ten_thousand_images_wastes_under_five_percent():
  positions = np.arange(10_000)
  side = lib.sides(PACKING, seed=0, positions=positions)
  grid = lib.native_grid(some_sizes(10_000), side, patch=16, max_tokens=np.full(10_000, 256), max_grid=32)
  placed = first_fit(grid.prod(axis=1), capacity=256)
  waste = 1 - grid.prod(axis=1).sum() / (256 * (placed.row.max() + 1))
  assert waste < 0.05, waste


@pytest.mark.parametrize("law", ["constant", "beta", "resolution", "schedule"])
def test_every_token_of_every_image_lies_in_exactly_one_place(law):
  packing = dataclasses.replace(PACKING, drop_law=law, drop_rate=(0.1, 0.6), drop_center=40, drop_width=10)
  sizes, positions = some_sizes(48), np.arange(96, 144)
  layouts = lib.plan(packing, sizes, seed=3, positions=positions)
  side = lib.sides(packing, seed=3, positions=positions)
  rate = lib.drop_rates(packing, sides=side, seed=3, positions=positions)
  assert len(layouts) == 3
  for shard, one in enumerate(layouts):
    for i in range(16):
      here = one.image == i
      row, slot = one.row[i], one.slot[i]
      assert here[row].sum() == here.sum() > 0
      assert (one.segment[here] == slot).all()
      height, width = one.grid[row, slot]
      y, x = one.y[here], one.x[here]
      assert y.max() < height and x.max() < width
      assert len(set(zip(y.tolist(), x.tolist(), strict=True))) == len(y) == lib.kept_count(np.array([[height, width]]), rate[16 * shard + i :][:1])[0]
    padding = one.image < 0
    assert (one.segment[padding] == -1).all() and (one.segment[~padding] >= 0).all()


def test_a_plan_is_the_same_for_one_two_and_four_hosts():
  sizes, positions = some_sizes(64), np.arange(640, 704)
  packing = dataclasses.replace(PACKING, drop_law="beta", drop_rate=(0.0, 0.5), drop_beta=(2.0, 3.0))
  whole = lib.as_batch(lib.plan(packing, sizes, seed=1, positions=positions))
  for hosts in (2, 4):
    parts = [lib.as_batch(lib.plan(packing, s, seed=1, positions=p)) for s, p in zip(np.split(sizes, hosts), np.split(positions, hosts), strict=True)]
    for key, value in whole.items():
      np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), value, err_msg=key)
  other = lib.as_batch(lib.plan(packing, sizes, seed=2, positions=positions))
  assert not np.array_equal(other["image"], whole["image"])


def test_images_that_ask_for_too_much_are_made_smaller_until_they_fit():
  tight = dataclasses.replace(PACKING, sequences=3, side=(200, 256), side_law="uniform")
  (one,) = lib.plan(tight, some_sizes(16), seed=0, positions=np.arange(16))
  assert sorted(np.unique(one.image[one.image >= 0])) == list(range(16))
  assert one.padding < 0.25, one.padding


def test_the_aspect_is_kept_and_the_area_is_the_drawn_one():
  sizes, sides = np.array([[300, 600], [600, 300], [400, 400]]), np.full(3, 256.0)
  grid = lib.native_grid(sizes, sides, patch=16, max_tokens=np.full(3, 1000), max_grid=64)
  np.testing.assert_array_equal(grid, [[11, 23], [23, 11], [16, 16]])


def test_an_extreme_aspect_has_at_least_one_patch_per_side():
  grid = lib.native_grid(np.array([[10, 4000]]), np.array([64.0]), patch=16, max_tokens=np.array([256]), max_grid=32)
  np.testing.assert_array_equal(grid, [[1, 32]])


def test_sides_follow_the_truncated_normal():
  draws = lib.sides(PACKING, seed=0, positions=np.arange(20_000))
  z = np.linspace(-1, 1, 20_001)
  density = np.exp(-((z + 0.5) ** 2) / 2)
  mean = 64 + 192 * ((z * density).sum() / density.sum() + 1) / 2
  assert abs(draws.mean() - mean) < 1.5 and draws.min() >= 64 and draws.max() <= 256
  flat = lib.sides(dataclasses.replace(PACKING, side_law="uniform"), seed=0, positions=np.arange(20_000))
  assert abs(flat.mean() - 160) < 1.5 and draws.mean() < flat.mean() - 10


def test_drop_rates_follow_their_laws():
  positions, make = np.arange(4000), dataclasses.replace
  side = lib.sides(PACKING, seed=0, positions=positions)
  rates = lambda **kw: lib.drop_rates(make(PACKING, **kw), sides=side, seed=0, positions=positions)
  assert (rates(drop_rate=(0.0, 0.5)) == 0.5).all()
  beta = rates(drop_law="beta", drop_rate=(0.0, 0.8), drop_beta=(2.0, 6.0))
  assert abs(beta.mean() - 0.2) < 0.01 and beta.max() < 0.8
  by_size = rates(drop_law="resolution", drop_rate=(0.1, 0.5))
  np.testing.assert_allclose(by_size, 0.1 + 0.4 * (side - 64) / 192)
  falling = rates(drop_law="schedule", drop_rate=(0.1, 0.5), drop_center=2000, drop_width=100)
  assert (np.diff(falling) < 0).all() and abs(falling[2000] - 0.3) < 1e-9


def test_the_kept_tokens_of_an_image_change_with_its_position():
  packing = dataclasses.replace(PACKING, drop_rate=(0.5, 0.5), side=(128, 128))
  first, second = (lib.plan(packing, np.full((16, 2), 128), seed=0, positions=np.arange(16) + 16 * i)[0] for i in range(2))
  tokens = lambda one, i: set(zip(one.y[one.image == i].tolist(), one.x[one.image == i].tolist(), strict=True))
  assert len(tokens(first, 0)) == 32 and tokens(first, 0) != tokens(second, 0) != tokens(first, 1)


@pytest.mark.parametrize(
  "fields,message",
  [
    ({"shard_size": 100}, "config.method.shard_size=100"),
    ({"side": (256, 64)}, "config.method.side"),
    ({"drop_rate": (0.0, 1.0)}, "config.method.drop_rate"),
    ({"drop_law": "betta"}, "Did you mean 'beta'"),
    ({"side_law": "norml"}, "Did you mean 'normal'"),
    ({"tokens": 0}, "config.method.tokens=0"),
    ({"side_std": 0.0}, "side_std"),
  ],
)
def test_a_packing_that_cannot_be_names_its_field(fields, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(PACKING, **fields)


def test_positions_that_cut_a_shard_are_refused():
  with pytest.raises(UserError, match="config.method.shard_size=16: must divide"):
    lib.plan(PACKING, some_sizes(16), seed=0, positions=np.arange(8, 24))


def test_an_image_longer_than_a_sequence_is_refused():
  with pytest.raises(UserError, match="300 tokens in sequences of 256"):
    first_fit([3, 300], capacity=256)
