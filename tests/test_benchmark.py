"""The benchmarks run and name what they measured; no figure of theirs decides a test."""

import json

import pytest

from big_ssl.benchmark.__main__ import main


def run(tmp_path, *args) -> dict:
  assert main([*args, "--seconds=0.05", f"--json={tmp_path / 'out.json'}"]) == 0
  return json.loads((tmp_path / "out.json").read_text())


def test_a_backbone_is_timed_and_its_compilation_with_and_without_scan(tmp_path):
  fields = '{"variant": "custom", "width": 24, "depth": 2, "heads": 2, "mlp_dim": 48, "patch": 8, "image_size": 16}'
  found = run(tmp_path, "model", f"--fields={fields}", "--size=16", "--batch_size=2")
  assert found["parameters"] == 24 * (3 * 64 + 1) + 24 * (1 + 5) + 2 * (4 * 24**2 + 4 * 24 + 2 * 24 * 48 + 72 + 4 * 24) + 48
  assert found["big_ssl img/s"] > 0 and found["compilation s"] > 0 and found["compilation with scanned layers s"] > 0


def test_the_input_path_is_timed_beside_pillow(tmp_path):
  found = run(tmp_path, "input", "--batch_size=2", "--canvas=64")
  assert found["ratio to Pillow on one core"] == pytest.approx(
    found["decode and multi-crop img/s"] / found["Pillow multi-crop img/s (one core)"]
  )


def test_a_field_that_is_none_is_one_clear_line(capsys):
  assert main(["model", '--fields={"widht": 3}']) == 2
  assert "--fields.widht=3: unknown key. Did you mean 'width'?" in capsys.readouterr().err
