"""The table of many runs."""

import json
import re
import shutil
import subprocess

import engine

from big_ssl import table


def write(folder, *rows):
  folder.mkdir(parents=True)
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores(step, top1, random_init=10.0):
  return {"step": step, "eval/knn/top1_k20": top1, "eval/knn/random_init/top1_k20": random_init, "eval/knn/protocol": "k-NN"}


def test_seeds_are_averaged_the_best_comes_first_and_yardsticks_last(tmp_path):
  write(tmp_path / "slow-0", {"step": 9, "loss": 1.0}, scores(9, 50.0))
  write(tmp_path / "fast_v2-0", {"step": 4, "loss": 1.0}, scores(4, 1.0), {"step": 9, "loss": 1.0}, scores(9, 70.0, 11.0))
  write(tmp_path / "fast_v2-1", {"step": 9, "loss": 1.0}, scores(9, 72.0, 12.0))
  write(tmp_path / "unfinished-0", scores(5, 99.0), {"step": 7, "loss": 1.0})
  lines = table.markdown(table.collect(tmp_path)).splitlines()
  assert lines[0] == "| Method | knn/top1_k20 | seeds |"
  assert lines[2:] == ["| fast_v2 | 71.0 ± 1.4 | 2 |", "| slow | 50.0 | 1 |", "| *random init* | 11.0 ± 1.0 | |"]


PYTHON = """#!/bin/sh
case "$*" in
  *big_ssl.table*) echo the table ;;
  *) echo "$*" >>log; case "$*" in *configs/byol.py*) exit $(cat code) ;; esac ;;
esac
"""


def sweep(folder, code, *flags):
  """launch/table.sh in a copy of the repository whose Python writes what it is called with to `log`; byol exits with `code`."""
  (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
  (folder / "launch").mkdir(exist_ok=True)
  shutil.copy(engine.ROOT / "launch" / "table.sh", folder / "launch")
  (folder / "launch" / "install.sh").write_text('fail() { echo "error: $*" >&2; exit 2; }\ninstall() { :; }\n')
  python = folder / ".venv" / "bin" / "python"
  python.write_text(PYTHON)
  python.chmod(0o755)
  shutil.copytree(engine.ROOT / "configs", folder / "configs", dirs_exist_ok=True)
  (folder / "code").write_text(str(code))
  (folder / "log").write_text("")
  # The stand-in of big_ssl.main makes no work directory.
  for file in (folder / "configs").glob("*.py"):
    (folder / "runs" / "sprites" / f"{file.stem}-0").mkdir(parents=True, exist_ok=True)
  done = subprocess.run(["bash", "launch/table.sh", *flags], cwd=folder, capture_output=True, text=True, check=False)
  return done, re.findall(r"configs/(\w+)\.py:sprites", (folder / "log").read_text())


def test_the_table_leaves_out_what_is_no_row_of_it_and_a_failed_run_is_named_and_made_again(tmp_path):
  done, trained = sweep(tmp_path, 4, "sprites")
  assert done.returncode == 1 and "failed: byol-0 (exit code 4)" in done.stderr and "the table" in done.stdout
  assert {"byol", "dino", "loca", "suncet", "swav"} <= set(trained)
  assert not {"common", "distillation", "finetune", "segmentation"} & set(trained)
  done, trained = sweep(tmp_path, 0, "sprites")
  assert (done.returncode, trained) == (0, ["byol"])


def test_a_signal_ends_the_table_and_an_unknown_recipe_is_one_line(tmp_path):
  done, trained = sweep(tmp_path, 3, "sprites")
  assert (done.returncode, trained) == (3, ["byol"])
  done, trained = sweep(tmp_path, 0, "sprite")
  assert (done.returncode, trained) == (2, []) and done.stderr == "error: RECIPE=sprite: no method in configs/ has a recipe of this name.\n"


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
  assert table.main([str(tmp_path / "none")]) == 2
  assert "no such folder" in capsys.readouterr().err
