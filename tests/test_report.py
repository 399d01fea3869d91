"""The report of a run: well-formed, self-contained, escaped, and in words that are true."""

import html.parser
import json
import re
import types

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.report import __main__ as command
from big_ssl.report import collect, page, svg, words, write
from big_ssl.visualize.drawing import Picture

VOID = {"meta", "img", "br", "link", "input", "hr"}
PROTOCOL = "weighted k-NN, cosine, k=20, T=0.07, classes <b>bold</b> & co"


def knn(step, score):
  scores = {"top1_k20": score, "random_init/top1_k20": 30.1, "raw_pixels/top1_k20": 26.3}
  return {"step": step} | {f"eval/knn/{k}": v for k, v in scores.items()} | {"eval/knn/protocol": PROTOCOL}


def line(step, **changes):
  numbers = {"loss": 4.0 - step / 1000, "lr": 1e-3, "rank": 5.0, "std": 0.7, "health": "healthy"}
  return {"step": step, "epoch": step / 64, "images_per_sec": 500.0, "data_wait_fraction": 0.02} | numbers | changes


FACTS = {
  "method": "MSN",
  "command": "python -m big_ssl.main --config=configs/msn.py",
  "version": "0.1",
  "seed": 0,
  "total_steps": 700,
  "examples": 8192,
  "status": "finished",
  "message": "",
  "data": {"train": {"name": "sprites/train", "count": 8192, "hash": "abc123"}, "labels": True, "classes": 10},
  "sessions": [{"started": "2026-01-01", "seconds": {"data": 1.0, "step": 8.0, "eval": 1.0}}],
  "problems": [["bad<i>.jpg", "not a picture"]],
  "problem_count": 1,
}


def make(workdir, *, rows=None, facts=FACTS, config=None, picture=True):
  """A work directory as a run leaves it."""
  rows = [line(50, rank=1.5, health="warning"), line(350), knn(350, 60.0), line(700), knn(700, 71.0)] if rows is None else rows
  config = {"method": {"name": "msn"}, "data": {"source": "sprites"}} if config is None else config
  (workdir / "config.json").write_text(json.dumps(config))
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  if facts is not None:
    (workdir / "run.json").write_text(json.dumps(facts))
  if picture:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    Picture("neighbors", noise[:20, :30], "the class <b> & its neighbors").save(workdir / "pictures")
    Picture("pca", noise, "a large one").save(workdir / "pictures")
  return workdir


class Page(html.parser.HTMLParser):
  """Open tags must be closed in order; addresses and visible words are kept."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.open, self.tags, self.addresses, self.words = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, f"never closed: {self.open}"
    self.text = re.sub(r"\s+", " ", " ".join(self.words))

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data") or (k == "style" and "url" in v)]
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
    self.open.pop()

  def handle_data(self, data):
    if self.open and self.open[-1] != "style":
      self.words.append(data)


def render(workdir):
  return page.render(collect.collect(workdir))


def test_the_page_is_well_formed_self_contained_and_without_scripts(tmp_path):
  text = render(make(tmp_path))
  read = Page(text)
  assert read.addresses and all(a.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for a in read.addresses)
  assert "script" not in read.tags and "http" not in text and "@import" not in text and "url(" not in text
  assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_words_from_outside_are_escaped(tmp_path):
  text = render(make(tmp_path))
  read = Page(text)
  assert not {"b", "i"} & set(read.tags)
  assert PROTOCOL in read.text and "bad<i>.jpg" in read.text and "the class <b> & its neighbors" in read.text


def test_the_headline_says_what_happened(tmp_path):
  found = words.headline(collect.collect(make(tmp_path)))
  score = "k-NN 71.0 % against 30.1 % at random initialization and 26.3 % for raw pixels"
  assert found == f"MSN, 700 steps on sprites (8,192 images): {score}; healthy."


@pytest.mark.parametrize(
  "facts,part",
  [
    ({"status": "stopped", "total_steps": 1000}, "700 of 1,000 steps"),
    ({"status": "stopped"}, "stopped before the end"),
    ({"status": "failed", "message": "training failed at step 700: NaN."}, "training failed"),
    ({"status": "training"}, "still training"),
  ],
)
def test_an_unfinished_run_says_so(tmp_path, facts, part):
  record = collect.collect(make(tmp_path, facts=FACTS | facts))
  assert part in words.headline(record)
  assert facts.get("message", "") in " ".join(words.findings(record))


def test_without_labels_nothing_is_called_an_accuracy(tmp_path):
  rows = [line(50, rank=2.5), line(100, rank=7.5), {"step": 100, "eval/knn/protocol": "k-NN not computed: the data has no labels"}]
  facts = FACTS | {"data": {"train": {"name": "photos", "count": 40, "hash": "x"}, "labels": False}, "total_steps": 100, "examples": 40}
  record = collect.collect(make(tmp_path, rows=rows, facts=facts))
  assert words.headline(record) == "MSN, 100 steps on photos (40 images); healthy."
  said = " ".join(words.findings(record))
  assert "no labels" in said and "7.5 main directions (2.5 at first)" in said
  assert "k-NN not computed: the data has no labels" in Page(page.render(record)).text


def test_the_findings_tell_health_speed_and_problems(tmp_path):
  said = " ".join(words.findings(collect.collect(make(tmp_path))))
  assert "healthy since step 350" in said and "Dimensional collapse" in said and "step 50" in said
  assert "500 images/s, 2%" in said and "1 image could not be read" in said


def test_protocols_baselines_times_and_the_making_are_on_the_page(tmp_path):
  text = Page(render(make(tmp_path))).text
  for part in ("71.0 %", "30.1 %", "abc123", "python -m big_ssl.main", "not a picture", "training steps", "80.0%", '"name": "msn"'):
    assert part in text, part


@pytest.mark.parametrize(
  ("score", "title", "value"),
  [("top1_k20", "top-1, k=20", "71.0 %"), ("top1/64", "top-1 at 64", "71.0 %"), ("lr/0.1_wd/0", "learning rate 0.1, weight decay 0", "71.0 %"), ("rank", "main directions that embeddings fill", "71"), ("random_init/top1/8", None, "71.0 %")],
)
def test_scores_are_named_and_have_their_unit(score, title, value):
  assert title is None or words.title(score) == title
  assert words.value(score, 71.0) == value


@pytest.mark.parametrize(
  ("score", "percent"),
  [
    *[(name, True) for name in ("j", "random_init/f", "first_mask/j_and_f", "jaccard_head_0", "strong_map", "easy_map", "hard_precision_at_5")],
    *[(name, True) for name in ("mean_accuracy", "raw_colors/miou", "iou/sky", "worst_group", "disparity_low", "shape_bias", "group/a/low")],
    *[(name, False) for name in ("group/a/n", "random_init/group/a/n", "effective_rank", "uniformity", "used_dimensions")],
  ],
)
def test_every_score_that_is_a_share_has_its_unit(score, percent):
  assert words.value(score, 41.5) == ("41.5 %" if percent else "41.5")


def test_yardsticks_of_dense_evaluations_are_columns_not_scores(tmp_path):
  scores = {"j_and_f": 60.0, "random_init/j_and_f": 20.0, "first_mask/j_and_f": 30.0, "raw_colors/j_and_f": 10.0}
  row = {"step": 700, "eval/video/protocol": "J and F"} | {f"eval/video/{k}": v for k, v in scores.items()}
  record = collect.collect(make(tmp_path, rows=[line(700), row]))
  assert record.latest[0].own == {"j_and_f": 60.0}
  text = Page(page.render(record)).text
  assert "the first mask kept" in text and "mean colors of patches" in text and "30.0 %" in text


def test_an_old_run_of_two_files_has_a_report_too(tmp_path):
  make(tmp_path, facts=None, picture=False)
  with (tmp_path / "metrics.jsonl").open("a") as f:
    f.write('not json\n[1]\n{"step": 701, "loss": nu')
  assert command.main([f"--workdir={tmp_path}"]) == 0
  text = (tmp_path / "report.html").read_text()
  assert "MSN, 700 steps on sprites: k-NN 71.0 %" in Page(text).text
  assert command.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'again.html'}"]) == 0
  assert (tmp_path / "again.html").read_text() == text, "a function of the work directory"


def test_a_run_that_has_logged_nothing_yet_has_a_page(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  assert "0 steps" in Page(render(tmp_path)).text


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
  assert command.main([f"--workdir={tmp_path}"]) == 2
  error = capsys.readouterr().err.strip()
  assert error.startswith("error: ") and "config.json" in error and "\n" not in error


def test_a_damaged_picture_is_left_out(tmp_path):
  make(tmp_path)
  (tmp_path / "pictures" / "attention.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
  assert [p.name for p in collect.collect(tmp_path).pictures] == ["pca", "neighbors"]


def test_not_finite_numbers_are_gaps(tmp_path):
  make(tmp_path, rows=[line(50), line(100, loss=None, health="collapsed"), line(150)])
  record = collect.collect(tmp_path)
  assert record.series("loss")[1] == (100, None) and "not finite" in record.verdicts[1].message
  assert svg.curve(record.series("loss"), title="loss").count("<circle") == 2
  Page(page.render(record))


def test_a_long_run_is_thinned_without_losing_its_spikes():
  points = [(float(i), 1.0 + (i == 7777)) for i in range(20000)]
  thinned = svg.thin(points)
  assert len(thinned) < 700 and (7777.0, 2.0) in thinned and thinned == sorted(thinned)


@pytest.mark.parametrize("low,high", [(0.0, 1.0), (3.1, 4.1), (-0.5, 70.0), (5.0, 5.0), (0.0, 0.0), (1e-7, 3e-7), (2e6, 9e6)])
def test_ticks_are_few_round_and_around_the_values(low, high):
  ticks = svg.nice_ticks(low, high)
  assert 2 <= len(ticks) <= 8 and ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high - 1e-9 * abs(high) and ticks[0] < ticks[-1], ticks


def test_a_failure_to_write_is_one_warning_and_no_exception(tmp_path):
  said = []
  logger = types.SimpleNamespace(warning=said.append)
  write.write_report(types.SimpleNamespace(), tmp_path, logger, status="training")
  assert len(said) == 1 and said[0].startswith("report.html not written") and "\n" not in said[0]


def test_an_unwritable_page_is_a_user_error(tmp_path):
  make(tmp_path, picture=False)
  with pytest.raises(UserError, match="cannot be written"):
    write.write_page(tmp_path, to=tmp_path / "none" / "report.html")
