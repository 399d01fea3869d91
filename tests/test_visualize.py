"""Pictures of a backbone: every kind on a tiny run, and the arithmetic behind the colors."""

import dataclasses
import json
import sys
import types
import typing

import engine
import jax
import numpy as np
import pytest
from PIL import Image

from big_ssl import setup
from big_ssl.core import config as config_lib
from big_ssl.core import report_config
from big_ssl.core.logger import Logger
from big_ssl.core.types import UserError
from big_ssl.evals.base import Features, unit
from big_ssl.report.write import write_report
from big_ssl.visualize import __main__ as command
from big_ssl.visualize import drawing, embedding, kinds, pca, prototypes
from big_ssl.visualize.subject import Options, open_run

FEW = {"model.registers": 2, "model.depth": 1, "method.num_prototypes": 8, "method.hidden_dim": 16, "data.train_examples": 24, "data.eval_examples": 20}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  engine.saved("msn", folder, **FEW)
  return folder


@pytest.fixture(scope="module")
def subject(workdir):
  return open_run(workdir, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Pictures of other sizes, one of them damaged."""
  root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
  for i, shape in enumerate([(40, 60), (64, 30), (33, 33), (200, 20)]):
    Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(root / f"{i}.png")
  (root / "4.jpg").write_bytes(b"no picture")
  return root


@pytest.fixture(scope="module")
def own(subject, folder):
  return subject.of_folder(str(folder))


@pytest.mark.parametrize("kind", ["attention", "pca", "neighbors", "prototypes", "embedding"])
def test_every_kind_is_a_picture_with_a_caption(subject, kind, tmp_path):
  (picture,) = kinds.KINDS[kind](subject, Options(count=3))
  with Image.open(picture.save(tmp_path)) as read:
    assert read.text[drawing.CAPTION] == picture.caption and len(picture.caption) > 40
    pixels = np.asarray(read)
  assert pixels.shape == picture.pixels.shape and pixels.std() > 5, f"{kind}: an empty picture"


@pytest.mark.parametrize("kind", ["pca", "neighbors", "prototypes", "embedding"])
def test_another_folder_of_any_sizes_needs_no_labels(own, kind):
  options = Options(count=4, clusters=2 if kind == "prototypes" else 0, size=(32, 48))
  (picture,) = kinds.KINDS[kind](own, options)
  assert picture.pixels.std() > 5 and own.images.labels is None
  assert kind != "neighbors" or "among 4 " in picture.caption, f"the damaged one is left out: {picture.caption}"


def test_the_command_writes_the_file_and_says_what_it_shows(workdir, folder, tmp_path, capsys):
  flags = [f"--workdir={workdir}", f"--images={folder}", f"--out={tmp_path}", "--count=2", "--size=16x24"]
  assert command.main(["attention", *flags]) == 0
  assert f"{tmp_path}/attention.png: Attention of the class token" in capsys.readouterr().out
  assert (tmp_path / "attention.png").stat().st_size > 500


def test_attention_of_a_rectangle_has_its_grid_without_registers_and_cls(subject):
  seen = subject.seen(np.zeros((40, 60, 3), np.uint8), ())
  assert seen.shape == (64, 96, 3), "the shorter side is twice the evaluation view of 32, the aspect stays"
  assert subject.seen(np.zeros((40, 60, 3), np.uint8), (50, 30)).shape == (48, 32, 3), "whole patches of 8"
  assert subject.seen(np.zeros((10, 900, 3), np.uint8), ()).shape == (64, 256, 3), "a panorama is squeezed to 1:4"
  (heads,) = subject.maps(kinds.attention.class_attention, [seen])
  assert heads.shape == (2, 8, 12) and np.all(heads.sum((1, 2)) < 1), "registers and CLS keep their share"


def test_prototypes_are_those_of_the_head_and_clusters_where_asked_for(subject):
  found = prototypes.assign(subject)
  state, method = subject.extract.state, subject.run.method
  features = subject.extract("eval", output="projection").features
  q = np.asarray(state.params["prototypes"])
  cosine = unit(features) @ unit(q).T
  np.testing.assert_array_equal(found.assigned, cosine.argmax(1))
  assert found.total == method.num_prototypes == 8
  clusters = prototypes.assign(subject, clusters=3)
  assert clusters.total == 3 and set(clusters.assigned) == {0, 1, 2}


def test_pca_finds_the_object_and_gives_equal_patches_equal_colors():
  rng = np.random.default_rng(0)
  background, body, head = np.eye(8)[0], 3 * np.eye(8)[1], 3 * np.eye(8)[1] + np.eye(8)[2]
  maps, truth = [], []
  for top in (1, 2):
    mask, image = np.zeros((6, 8), int), rng.normal(0, 0.01, (6, 8, 8))
    mask[top : top + 3, 2:6] = 1
    mask[top, 2:6] = 2
    maps.append(image + np.array([background, body, head])[mask])
    truth.append(mask)
  found = pca.color(maps)
  assert found.masked
  for mask, foreground in zip(truth, found.foreground, strict=True):
    np.testing.assert_array_equal(foreground, mask > 0)
  red = [[colors[mask == part, 0] for part in (1, 2)] for colors, mask in zip(found.colors, truth, strict=True)]
  assert all(np.ptp(bodies) < 0.2 and np.ptp(heads) < 0.2 and abs(bodies[0] - heads[0]) > 0.8 for bodies, heads in red), red
  assert abs(red[0][0].mean() - red[1][0].mean()) < 0.1, "of one part in both images"


def test_pca_colors_everything_where_the_first_component_parts_images_not_patches():
  rng = np.random.default_rng(0)
  maps = [offset + rng.normal(0, 0.1, (4, 4, 5)) for offset in (0.0, 0.0, 9.0)]
  found = pca.color(maps)
  assert not found.masked and all(m.all() for m in found.foreground)


def test_pca_of_a_foreground_too_small_for_three_components_colors_everything():
  tokens = np.random.default_rng(0).normal(0, 0.01, (8, 8, 6))
  tokens[3, 3:5] += 5
  found = pca.color([tokens])
  assert not found.masked and found.foreground[0].all() and np.isfinite(found.colors[0]).all()


def test_equal_features_have_one_panel_and_the_caption_says_why(monkeypatch):
  def project(x, *, how):
    assert how == "PCA", f"{how} of equal rows"
    return plane(x, how=how)

  plane = embedding.project
  monkeypatch.setattr(embedding, "project", project)
  monkeypatch.setattr(embedding, "_installed", lambda name: True)
  rows = np.full((30, 6), 6**-0.5, np.float32)
  looked_at = types.SimpleNamespace(features=Features(rows, np.arange(30) % 3, np.arange(30)), class_name=str)
  (picture,) = embedding.draw(looked_at, Options())
  assert "in a plane (PCA)" in picture.caption and "t-SNE and UMAP left out, as all images have the same features" in picture.caption


@pytest.mark.parametrize(("count", "start"), [(3, "random"), (30, "spectral")])
def test_umap_is_asked_for_what_it_can_do_with_so_many_images(monkeypatch, count, start):
  class UMAP:
    def __init__(self, **settings):
      self.settings = settings

    def fit_transform(self, x):
      return self.settings

  monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
  asked = embedding.project(np.ones((count, 6), np.float32), how="UMAP")
  assert asked == {"n_neighbors": min(15, count - 1), "init": start, "random_state": 0, "n_jobs": 1}


def test_attention_is_the_same_function_at_every_report(subject):
  functions = []

  @dataclasses.dataclass
  class Recording:
    run, images = subject.run, subject.images

    def __getattr__(self, name):
      return getattr(subject, name)

    def maps(self, function, images):
      functions.append(function)
      return [np.ones((2, 4, 4)) for _ in images]

  for layer in (-1, -1, 0):
    kinds.attention.draw(Recording(), Options(count=1, layer=layer))
  assert len({functions[0], functions[1]}) == 1 and functions[2] != functions[0], "compiled anew, and kept"


def test_clusters_of_one_class_are_two(subject):
  x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
  bare = types.SimpleNamespace(state=None, over_training_set=lambda *args, **kwargs: np.zeros((12, 0)))
  features = Features(x, np.zeros(12, np.int32), np.arange(12))
  found = prototypes.assign(types.SimpleNamespace(extract=bare, run=subject.run, features=features, images=range(12)))
  assert found.total == 2 and set(found.assigned) == {0, 1}


def test_otsu_cuts_between_two_heaps():
  values = np.concatenate([np.linspace(0, 1, 50), np.linspace(5, 6, 20)])
  assert 1 <= pca.otsu(values) <= 5


def test_a_block_that_is_not_there_is_a_user_error(subject):
  with pytest.raises(UserError, match="block 7: config.model has 1"):
    kinds.KINDS["attention"](subject, Options(count=1, layer=7, size=(16,) * 2))


def test_mistakes_are_one_line(workdir, tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  (tmp_path / "bare").mkdir()
  (tmp_path / "bare" / "config.json").write_text((workdir / "config.json").read_text())
  for flags, words in (
    ([f"--workdir={tmp_path / 'none'}"], "no such folder"),
    ([f"--workdir={tmp_path / 'empty'}"], "no config.json"),
    ([f"--workdir={tmp_path / 'bare'}"], "no checkpoint"),
    ([f"--workdir={workdir}", f"--images={tmp_path / 'empty'}"], "--images="),
    ([f"--workdir={workdir}", "--size=big"], "--size=big"),
    ([f"--workdir={workdir}", "--count=0"], "--count=0"),
  ):
    assert command.main(["attention", *flags]) == 2, flags
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and words in error, (flags, error)
  assert not (tmp_path / "bare" / "checkpoints").exists(), "looking must not write"


def test_views_are_the_crops_of_the_first_step_to_scale(subject):
  (picture,) = kinds.KINDS["views"](subject, Options(count=2))
  assert "1 'target' of 32x32 px, 1 'rand' of 32x32 px, 6 'focal' of 16x16 px" in picture.caption
  assert picture.pixels.shape == (2 * 96 + 3 * 4, 2 * 96 + 6 * 48 + 9 * 4, 3), "two rows of two large and six small tiles"
  assert picture.pixels[4:100, 4:100].std() > 3, "normalized pixels would be clipped"


def test_the_report_draws_the_pictures_that_the_config_asks_for(subject, workdir, tmp_path):
  (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
  wanted = report_config.ReportConfig(pictures=("neighbors",), images=2)
  run = dataclasses.replace(subject.run, config=dataclasses.replace(subject.run.config, report=wanted))
  logger = Logger(tmp_path, total_steps=6, examples_per_epoch=24, batch_size=16, terminal=False)
  write_report(run, tmp_path, logger, status="evaluated", extract=subject.extract)
  assert [f.name for f in (tmp_path / "pictures").iterdir()] == ["neighbors.png"]
  with Image.open(tmp_path / "pictures" / "neighbors.png") as picture:
    assert 2 * 104 < picture.height < 3 * 104, "two queries"
  text, facts = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "run.json").read_text())
  assert text.count("<img ") == 1 and "evaluated, not trained here" in text
  assert facts["method"] == "MSN" and facts["data"]["train"]["count"] == 24 and facts["data"]["classes"] == 10


def test_a_report_shows_at_least_one_image():
  with pytest.raises(UserError, match="config.report.images=0"):
    engine.load("msn", **{"report.images": 0})


def test_a_backbone_without_attention_says_so_and_leaves_no_picture_in_a_report(subject, tmp_path):
  @dataclasses.dataclass
  class Convolutional:
    images, run = subject.images, subject.run

    def __getattr__(self, name):
      return getattr(subject, name)

    def maps(self, function, images):
      raise UserError("config.model.name: ResNet has no attention of CLS to patches in every block; vit has.")

  (tmp_path / "attention.png").write_bytes(b"of an older backbone")
  said = []
  kinds.draw_for_report(Convolutional(), tmp_path, names=("attention", "neighbors"), count=2, warn=said.append)
  assert [f.name for f in tmp_path.iterdir()] == ["neighbors.png"] and not said


def test_a_failing_picture_is_one_line_and_the_others_are_drawn(subject, tmp_path, monkeypatch):
  monkeypatch.setitem(kinds.KINDS, "pca", lambda subject, options: 1 / 0)
  said = []
  kinds.draw_for_report(subject, tmp_path, names=("pca", "neighbors"), count=2, warn=said.append)
  assert [f.name for f in tmp_path.iterdir()] == ["neighbors.png"] and len(said) == 1 and "ZeroDivisionError" in said[0]


def test_a_picture_that_cannot_be_written_leaves_no_process_alone_with_the_next(subject, tmp_path, monkeypatch):
  def full(self, directory):
    raise OSError(28, "No space left on device")

  drawn, said = [], []
  for name in ("pca", "neighbors"):
    monkeypatch.setitem(kinds.KINDS, name, lambda s, o, name=name: drawn.append(name) or [drawing.Picture(name, np.zeros((2, 2, 3), np.uint8), "")])
  monkeypatch.setattr(drawing.Picture, "save", full)
  kinds.draw_for_report(subject, tmp_path, names=("pca", "neighbors"), count=2, warn=said.append)
  assert drawn == ["pca", "neighbors"] and len(said) == 2 and all("No space left" in line for line in said), said


def test_a_report_may_ask_for_every_kind_and_no_other():
  assert set(typing.get_args(report_config.Picture)) == set(kinds.KINDS) == set(command.NAMES)


def test_tiles_keep_the_aspect_and_every_kind_of_pixels_becomes_rgb():
  tile = drawing.tile(np.zeros((10, 40, 3), np.uint8), height=60, width=60)
  assert tile.shape == (60, 60, 3) and (tile.sum((1, 2)) == 0).sum() == 15 and (tile[0] == 255).all()
  deep = np.full((2, 2, 1), 65535, np.uint16)
  assert drawing.to_rgb(deep).shape == (2, 2, 3) and drawing.to_rgb(deep).min() == 255
  assert drawing.resized(deep, height=3, width=5).shape == (3, 5, 1)
  assert drawing.words("a very long name of a class", width=40).shape[1] == 40
  assert len({drawing.color_of(i) for i in range(12)}) == 12
  light = drawing.heat(np.linspace(0, 1, 9)[None]).sum(-1)[0]
  assert (np.diff(light) > 0).all(), light


def test_the_config_is_read_back_as_it_was(workdir):
  config, tree = config_lib.read(workdir)
  assert config == engine.load("msn", **engine.SMALL | engine.TINY["vit"] | FEW)
  assert json.loads(json.dumps(tree, default=str)) == json.loads((workdir / "config.json").read_text())
  assert config_lib.read(workdir, {"data.source": "photos"})[0].data.source == "photos"


def test_every_method_with_prototypes_scores_images():
  for name in ("dino", "swav", "deepcluster_v2", "deepcluster"):
    run = setup.make_run(engine.small(name), devices=jax.devices()[:1])
    batch = {"image": jax.ShapeDtypeStruct((3, 1, *run.method.eval_view().shape, 3), np.float32)}
    scores = jax.eval_shape(run.method.assignments, run.abstract_state.params, run.abstract_state.extra, batch)
    assert scores.shape[0] == 3 and scores.shape[1] > 1, name
