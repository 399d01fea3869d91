"""The method of the README, in a folder of its own: nothing in the library knows it."""

import json
import os
import re
import subprocess
import sys

import engine


def test_the_method_of_the_readme_trains_from_a_folder_of_its_own(tmp_path):
  blocks = re.findall(r"```python\n# (\S+)\n(.*?)```", (engine.ROOT / "README.md").read_text(), re.DOTALL)
  assert [name for name, _ in blocks] == ["my_methods/simsiam.py", "simsiam_config.py"]
  (tmp_path / "my_methods").mkdir()
  for name, text in blocks:
    (tmp_path / name).write_text(text)
  fields = engine.SMALL | engine.TINY["vit"] | {"method.width": 32}
  flags = [f"--config.{k}={v}" for k, v in fields.items()]
  command = [sys.executable, "-m", "big_ssl.main", "--config=simsiam_config.py", "--workdir=work", *flags]
  environment = os.environ | {"PYTHONPATH": str(engine.ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout + done.stderr
  rows = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
  losses = [row["loss"] for row in rows if "loss" in row]
  assert len(losses) == 6 and losses[-1] < losses[0]
  assert any("eval/knn/top1_k20" in row for row in rows)
