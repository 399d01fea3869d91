"""Position tables against what every public code base makes of them."""

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models import positions

RULES = {
  "dino": ("dino", "dinov2_offset0.1_noaa"),
  "hf": ("hf_size_noaa",),
  "antialias": ("dinov2reg_size_antialias", "timm_bicubic_antialias"),
  "linear": ("flexivit_runtime_linear", "loca_runtime_bilinear"),
  "msn": ("msn",),
  "bilinear": ("timm_bilinear_noaa",),
  "corners": ("bigvision_load_zoom_order1",),
}


def test_position_tables_resample_by_every_public_rule(golden):
  z = golden("vit_pos_embed_interpolation")
  table, seen = z["pos_embed_with_cls"][0], 0
  for rule, names in RULES.items():
    for name in names:
      for key in (k for k in z if k.endswith(f"/{name}")):
        grid = tuple(int(n) for n in key.split("/")[0].split("x"))
        out = positions.resample(table[1:].astype(np.float64), rule=rule, grid=grid, image=(grid[0] * 16, grid[1] * 16))
        wanted = z[key][0][1:] if z[key].shape[1] == grid[0] * grid[1] + 1 else z[key][0]
        np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=0, err_msg=key)
        seen += 1
  assert seen >= 40


def test_a_table_that_is_no_square_needs_its_grid():
  with pytest.raises(UserError, match="12 patches: not a square .3x3 has 9.; give its grid to resample it to 5x7"):
    positions.resample(np.zeros((12, 4)), rule="dino", grid=(5, 7), image=(80, 112))
  with pytest.raises(UserError, match="12 patches: does not fit the grid 5x3"):
    positions.table_grid(12, (5, 3))
  assert positions.table_grid(12, (3, 4)) == (3, 4)


def test_an_unchanged_grid_is_the_identity_except_under_dino_where_the_image_is_not_square():
  make = lambda rule, image: positions.resample_matrices(rule, table=(4, 4), grid=(4, 4), image=image)
  assert all(make(rule, (64, 64)) is None for rule in positions.RULES)
  assert all((make(rule, (64, 70)) is None) == (rule != "dino") for rule in positions.RULES)


@pytest.mark.parametrize("rule", positions.RULES)
def test_a_constant_table_stays_constant(rule):
  out = positions.resample(np.ones((16, 3)), rule=rule, grid=(7, 7), image=(112, 112))
  np.testing.assert_allclose(out, np.ones((49, 3)), atol=1e-12)


def test_flexivit_leaves_a_table_of_as_many_patches_alone_and_else_is_linear():
  """The public model compares counts, not grids."""
  table = np.random.default_rng(0).normal(size=(16, 3))
  run = lambda rule, grid: positions.resample(table, rule=rule, grid=grid, image=(64, 64))
  np.testing.assert_array_equal(run("flexivit", (2, 8)), table)
  assert np.abs(run("linear", (2, 8)) - table).max() > 0.1
  np.testing.assert_array_equal(run("flexivit", (5, 7)), run("linear", (5, 7)))


@pytest.mark.parametrize("grid", [(3, 5), (2, 8), (6, 4)])
def test_the_rule_of_msn_scales_each_axis_of_a_rectangle_by_itself(grid):
  found = positions.resample_matrices("msn", table=(4, 4), grid=grid, image=(8 * grid[0], 8 * grid[1]))
  axes = [positions.resample_matrices("hf", table=(4, 4), grid=(n, n), image=(8 * n, 8 * n)) for n in grid]
  for i, matrix in enumerate(found):
    np.testing.assert_allclose(matrix, np.eye(4) if axes[i] is None else axes[i][i], atol=1e-12)


def test_an_unknown_rule_names_the_nearest():
  with pytest.raises(UserError, match="pos_rule='antialiased'.*Did you mean 'antialias'"):
    positions.resample(np.zeros((16, 4)), rule="antialiased", grid=(5, 5), image=(80, 80))


def test_the_fixed_sines_are_those_of_moco_v3_also_on_its_scrambled_grid(golden):
  z = golden("mocov3_posembed")
  grid, wanted = tuple(z["grid"].tolist()), z["pos_embed"][0, 1:]
  np.testing.assert_allclose(positions.sincos(grid, width=32, scrambled=True), wanted, atol=1e-6)
  assert np.abs(positions.sincos(grid, width=32) - wanted).max() > 0.5


def test_fixed_sines_give_rows_and_columns_their_own_half():
  table = positions.sincos((3, 5), width=32).reshape(3, 5, 32)
  np.testing.assert_array_equal(table[:, :, :16], np.broadcast_to(table[:, :1, :16], (3, 5, 16)))
  np.testing.assert_array_equal(table[:, :, 16:], np.broadcast_to(table[:1, :, 16:], (3, 5, 16)))
  np.testing.assert_array_equal(positions.sincos((4, 4), width=32), positions.sincos((4, 4), width=32, scrambled=True))
  with pytest.raises(UserError, match="config.model.width=30"):
    positions.sincos((2, 2), width=30)


def test_the_fixed_sines_of_big_vision_put_columns_first_and_end_at_the_temperature():
  table = positions.sincos2d((3, 5), width=16).reshape(3, 5, 16)
  frequency = np.array([1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
  np.testing.assert_allclose(table[2, 4, :4], np.sin(4 * frequency), atol=1e-6)
  np.testing.assert_allclose(table[2, 4, 12:], np.cos(2 * frequency), atol=1e-6)
  with pytest.raises(UserError, match="config.model.width=4"):
    positions.sincos2d((2, 2), width=4)
