"""The benchmarks run and name what they measured; no figure of theirs decides a test."""

import json

import engine
import pytest

from big_ssl.benchmark import costs
from big_ssl.benchmark.__main__ import main


def run(tmp_path, *args) -> dict:
  assert main([*args, "--seconds=0.05", f"--json={tmp_path / 'out.json'}"]) == 0
  return json.loads((tmp_path / "out.json").read_text())


def test_a_backbone_is_timed_and_its_compilation_with_and_without_scan(tmp_path):
  fields = '{"variant": "custom", "width": 24, "depth": 2, "heads": 2, "mlp_dim": 48, "patch": 8, "image_size": 16}'
  found = run(tmp_path, "model", f"--fields={fields}", "--size=16", "--batch_size=2")
  assert found["parameters"] == 24 * (3 * 64 + 1) + 24 * (1 + 5) + 2 * (4 * 24**2 + 4 * 24 + 2 * 24 * 48 + 72 + 4 * 24) + 48
  assert found["big_ssl img/s"] > 0 and found["compilation s"] > 0 and found["compilation with scanned layers s"] > 0
  assert 0 < found["big_ssl share of a matmul"] < 1


def test_the_input_path_is_timed_beside_pillow(tmp_path):
  found = run(tmp_path, "input", "--batch_size=2", "--canvas=64")
  assert found["ratio to Pillow on one core"] == pytest.approx(
    found["decode and multi-crop img/s"] / found["Pillow multi-crop img/s (one core)"]
  )


def test_packed_images_are_timed_beside_squares_with_as_many_tokens(tmp_path):
  fields = '{"variant": "custom", "width": 8, "depth": 1, "heads": 1, "mlp_dim": 8, "patch": 64}'
  found = run(tmp_path, "packing", f"--fields={fields}", "--size=192", "--tokens=128")
  assert found["squares: tokens of an image"] == 3 * 3 and found["squares: padding"] == 0
  assert found["packed: padding"] < 0.1 < found["padded: padding"]
  assert found["packed, tokens dropped: tokens of an image"] < found["packed: tokens of an image"] < 4 * 4
  assert found["packed: img/s to squares"] == pytest.approx(found["packed: img/s"] / found["squares: img/s"])


@pytest.mark.parametrize(("flag", "message"), [('--fields={"name": "vit"}', "expected a navit, found vit"), ("--size=1000", "at most --tokens=2560 patches"), ("--tokens=300", "at least 512")])
def test_a_packing_that_cannot_be_is_one_clear_line(flag, message, capsys):
  assert main(["packing", flag]) == 2
  assert message in capsys.readouterr().err


def test_a_search_is_timed_beside_a_matmul_and_its_memory_is_planned(tmp_path):
  found = run(tmp_path, "eval", "--queries=100", "--bank=3000", "--dim=16", "--k=5")
  gflops = 2 * 100 * 3000 * 16 / found["k-NN s"] / 1e9
  assert found["k-NN GFLOP/s"] == pytest.approx(gflops) and found["k-NN"] == "100 x 3000 x 16, k=5"
  assert found["share of the matmul"] == pytest.approx(gflops / found["matmul GFLOP/s (float32, highest)"])
  assert found["peak memory of the process MiB"] > found["planned memory per device MiB"] > 3000 * 16 * 4 / 8 / 2**20


def test_a_bank_with_fewer_rows_than_neighbors_is_one_clear_line(capsys):
  assert main(["eval", "--bank=10", "--k=11"]) == 2
  assert "--k=11: more neighbors than the 10 rows of --bank." in capsys.readouterr().err


def test_a_field_that_is_none_is_one_clear_line(capsys):
  assert main(["model", '--fields={"widht": 3}']) == 2
  assert "--fields.widht=3: unknown key. Did you mean 'width'?" in capsys.readouterr().err


@pytest.mark.parametrize("index", [0, [v["name"] for v in costs.VARIANTS].index("resnet")])
def test_the_table_of_costs_is_what_the_command_prints(index):
  fields = costs.VARIANTS[index]
  numbers = lambda line: [float(cell.replace(",", "")) for cell in line.strip("| ").split(" | ")[1:]]
  lines = (engine.ROOT / "docs" / "models.md").read_text().splitlines()
  written = numbers(next(line for line in lines if line.startswith(f"| {costs.title(fields)} |")))
  found = numbers(costs.row(fields, size=224))
  assert found[0] == written[0] and found == pytest.approx(written, rel=0.05)  # XLA's versions count the cheap operations differently


def test_the_table_has_every_variant():
  listed = [line.split(" | ")[0].removeprefix("| ") for line in (engine.ROOT / "docs" / "models.md").read_text().splitlines()]
  assert set(map(costs.title, costs.VARIANTS)) <= set(listed)


def test_resnet_18_costs_what_is_published():
  found = costs.cost({"name": "resnet", "depth": 18}, size=224)
  assert found["parameters"] == 11_176_512  # torchvision's 11,689,512 without the classifier of 513,000
  assert found["flops"] == pytest.approx(2 * 1.814e9, rel=0.08)  # 1.814 billion multiply-adds (torchvision's table)
