"""Every embedded run beats the random initialization of its network, by the margin that its config's docstring states."""

import ast
import json
import re
import subprocess
import sys

import engine
import pytest

# As in launch/table.sh: these start from the run of another method, or are judged by the labels of their own task.
APART = ("distillation", "finetune", "segmentation")
DEFAULTS = [name for name in engine.default_configs() if name not in APART]


def margin(name: str) -> tuple[str, float]:
  """The score and its points, as in "at least 20 points above its random initialization"; k-NN where it says no other."""
  docstring = ast.get_docstring(ast.parse((engine.ROOT / "configs" / f"{name}.py").read_text()))
  found = re.search(r"at least (\d+) points\s+(of mIoU\s+)?above\s+its\s+random\s+initialization", docstring)
  assert found, f"configs/{name}.py: the docstring states no margin over random initialization"
  return "segmentation/{}miou" if found[2] else "knn/{}top1_k20", float(found[1])


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_embedded_run_states_its_margin(name):
  assert margin(name)[1] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFAULTS)
def test_the_embedded_run_beats_its_random_initialization_by_the_margin(name, tmp_path):
  command = [sys.executable, "-m", "big_ssl.main", f"--config=configs/{name}.py", f"--workdir={tmp_path}"]
  done = subprocess.run(command, cwd=engine.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  score, points = margin(name)
  ours, yardstick = (f"eval/{score.format(prefix)}" for prefix in ("", "random_init/"))
  last = [row for row in rows if ours in row][-1]
  assert last[ours] - last[yardstick] >= points
