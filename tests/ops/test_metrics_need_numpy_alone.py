"""Metrics can be used without the rest of the library, and without jax."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
METRICS = ("geolocation", "group_scores", "retrieval", "target_bins")


def test_each_metric_is_imported_without_jax():
  code = f"""
import sys, importlib
sys.modules.update({{name: None for name in ("jax", "flax", "scipy", "sklearn")}})
for name in {METRICS!r}:
  importlib.import_module(f"big_ssl.ops.{{name}}")
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
