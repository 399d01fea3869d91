"""The table of many runs."""

import json

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


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
  assert table.main([str(tmp_path / "none")]) == 2
  assert "no such folder" in capsys.readouterr().err
