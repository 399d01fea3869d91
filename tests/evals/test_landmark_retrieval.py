"""Revisited Oxford and Paris on a small folder of their layout: scores, invariances, geometry and a file that is not to be trusted."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from test_copy_detection import WORLD, Extract, save

from big_ssl.core.types import UserError
from big_ssl.evals import descriptors, landmark_ground_truth
from big_ssl.evals.landmark_retrieval import LandmarkRetrieval

LEVELS = ("easy", "medium", "hard")
FIELD = "config.evals.landmark_retrieval.data"


def landmarks(root, *, order=None, junk=(), name="roxford5k", protocol=None):
  """3 queries and 12 images: query q has q as easy, q + 3 as hard (a copy of another picture) and `junk`; a .json or .pkl."""
  order = np.arange(12) if order is None else order
  place = np.argsort(order)
  save(root, {f"jpg/im{i}.png": WORLD[i % 9] for i in range(12)} | {f"jpg/q{i}.png": WORLD[i] for i in range(3)})
  for file in (root / "jpg").glob("*.png"):
    file.rename(file.with_suffix(".jpg"))  # what a file is, its bytes tell
  gnd = [
    {"bbx": [4.0, 3.6, 28.0, 32.0], "easy": [place[q]], "hard": [place[q + 3]], "junk": [place[j] for j in junk]} for q in range(3)
  ]
  tree = {"imlist": [f"im{i}" for i in order], "qimlist": [f"q{i}" for i in range(3)], "gnd": gnd}
  if protocol is None:
    (root / f"gnd_{name}.json").write_text(json.dumps(tree, default=int))
  else:
    for entry in gnd:
      entry.update(easy=np.array(entry["easy"]), junk=np.array(entry["junk"], np.float64))
    (root / f"gnd_{name}.pkl").write_bytes(pickle.dumps(tree, protocol=protocol))
  return str(root)


def test_queries_that_are_in_the_database_are_found_first_and_the_protocol_is_told(tmp_path):
  report = LandmarkRetrieval(data=landmarks(tmp_path / "a"))(Extract())
  m = report.metrics
  assert m["easy_map"] == pytest.approx(100) and m["easy_precision_at_1"] == 100, m
  assert 0 < m["hard_map"] < 100 and m["hard_map"] < m["medium_map"] < 100, m
  assert report.images == dict.fromkeys(m, 3), "not all images of the run"
  words = ("roxford5k", "3 queries (not cropped", "3 easy, 3 medium, 3 hard", "against 12 images", "at most 224", "multiples of 4x4")
  for word in (*words, "'pooled' of the backbone", "no whitening", "trapezoidal", "at 1,5,10"):
    assert word in report.protocol, report.protocol


def test_neither_the_order_of_the_database_nor_junk_changes_a_score(tmp_path):
  base = LandmarkRetrieval(data=landmarks(tmp_path / "a", junk=(9, 10, 11)))(Extract()).metrics
  order = np.random.default_rng(0).permutation(12)
  permuted = LandmarkRetrieval(data=landmarks(tmp_path / "b", order=order, junk=(9, 10, 11)))(Extract()).metrics
  assert permuted == pytest.approx(base)
  root = tmp_path / "a"
  for i in range(9, 12):  # junk that is equal to the query, or far from it
    save(root, {"x.png": WORLD[i % 3] if i < 11 else np.zeros_like(WORLD[0])})
    (root / "x.png").rename(root / f"jpg/im{i}.jpg")
  assert LandmarkRetrieval(data=str(root))(Extract()).metrics == pytest.approx(base)
  assert LandmarkRetrieval(data=landmarks(tmp_path / "c"))(Extract()).metrics != pytest.approx(base)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_gives_what_the_json_gives(tmp_path, protocol):
  a = landmark_ground_truth.read(landmarks(tmp_path / "a", junk=(7,)), field=FIELD)
  b = landmark_ground_truth.read(landmarks(tmp_path / "b", junk=(7,), protocol=protocol), field=FIELD)
  assert a.images == b.images and a.queries == b.queries and b.hard.sum() == 3 and b.junk[:, 7].all()
  for kind in ("easy", "hard", "junk", "boxes"):
    np.testing.assert_array_equal(getattr(a, kind), getattr(b, kind))


def test_arrays_that_python_2_wrote_are_read(tmp_path):
  def array(*values):  # int64, as numpy's array pickles itself with protocol 2
    head = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K%c\x85" % len(values)
    kind = b"cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return head + kind + b"\x89U%c%stb" % (8 * len(values), np.array(values, "<i8").tobytes())

  text = lambda x: b"U%c%s" % (len(x), x)
  entry = b"(" + b"".join(text(k) + array(*v) for k, v in ((b"easy", (0, 200)), (b"hard", ()), (b"junk", (1,)))) + b"d"
  names = b"(" + b"".join(text(b"im%d" % i) for i in range(201)) + b"l"
  tree = b"\x80\x02(" + text(b"imlist") + names + text(b"qimlist") + b"(" + text(b"q") + b"l" + text(b"gnd") + b"(" + entry + b"ld."
  (tmp_path / "gnd_x.pkl").write_bytes(tree)
  found = landmark_ground_truth.read(str(tmp_path), field=FIELD)
  assert found.queries == ("q",) and np.flatnonzero(found.easy[0]).tolist() == [0, 200] and not found.hard.any() and found.junk[0, 1]


class Evil:
  def __init__(self, call, *args):
    self.call = (call, args)

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize(
  "value",
  [
    lambda marker: Evil(open, marker, "w"),
    lambda marker: Evil(eval, f"open({marker!r}, 'w')"),
    lambda marker: Evil(np.ndarray, (10**13,)),
    lambda marker: np.array([Evil(open, marker, "w")], dtype=object),
    lambda marker: np.array(["text"]),
  ],
)
def test_a_pickle_runs_nothing(tmp_path, value):
  marker = tmp_path / "ran"
  (tmp_path / "gnd_x.pkl").write_bytes(pickle.dumps({"imlist": value(str(marker))}))
  with pytest.raises(UserError, match="gnd_x.pkl: not readable as a ground truth"):
    landmark_ground_truth.read(str(tmp_path), field=FIELD)
  assert not marker.exists()


def test_paris_has_three_scales_at_512_and_their_sum_is_the_descriptor(tmp_path):
  root = tmp_path / "a"
  data = landmarks(root, name="rparis6k")
  Image.fromarray(np.tile(WORLD[0], (19, 15, 1))[:600, :450]).save(root / "jpg/im0.jpg", "PNG")
  extract = Extract()
  report = LandmarkRetrieval(data=data)(extract)
  assert "at scales 1, 0.707, 0.5 (summed" in report.protocol and "at most 512" in report.protocol
  # 512 x 384 and 32 x 32, times 0.707 and 0.5, rounded down to patches of 4.
  expected = {(512, 384), (360, 268), (256, 192), (32, 32), (20, 20), (16, 16)}
  assert {shape[1:3] for shape in extract.shapes} == expected
  evaluator = LandmarkRetrieval(data=data, scales=(1.0, 0.5))
  image = WORLD[0]
  (found,) = evaluator.describe(Extract(), load=lambda i: image, count=1, multiple=(4, 4), scales=(1.0, 0.5))
  parts = [Extract().apply(evaluator.rows, descriptors.scaled(image, factor=s)[None])[0] for s in (1.0, 0.5)]
  np.testing.assert_allclose(found, parts[0] + parts[1], rtol=1e-5)


def test_scaling_is_bilinear_between_the_pixels_and_keeps_a_ramp():
  ramp = np.tile(np.arange(0, 120, 3, dtype=np.uint8)[None, :, None], (9, 1, 3))
  found = descriptors.scaled(ramp, factor=0.5)
  assert found.shape == (4, 20, 3)
  np.testing.assert_allclose(found[0, :, 0] * 255, 3 * (np.arange(20) * 2 + 0.5), atol=1e-3)
  found = descriptors.scaled(ramp, factor=2**-0.5)
  np.testing.assert_allclose(found[1, :, 1] * 255, 3 * ((np.arange(28) + 0.5) * 2**0.5 - 0.5), atol=1e-3)


def test_images_are_shrunk_keeping_their_aspect_and_never_enlarged():
  assert descriptors.shrink(np.zeros((60, 200, 3), np.uint8), longest=100).shape == (30, 100, 3)
  assert descriptors.shrink(np.zeros((60, 20, 1), np.uint16), longest=100).shape == (60, 20, 1)
  assert descriptors.fit(np.ones((3, 21, 3)), multiple=(8, 8)).shape == (8, 16, 3)


def test_cropped_queries_keep_the_scale_of_their_image(tmp_path):
  extract = Extract()
  data = landmarks(tmp_path / "a")
  report = LandmarkRetrieval(data=data, crop_queries=True, size=16)(extract)
  # 24 x 28 of 32 x 32 pixels, halved: 12 x 14, rounded down to patches.
  assert {shape[1:3] for shape in extract.shapes} == {(16, 16), (12, 12)} and "cropped to their boxes" in report.protocol
  assert report.metrics != LandmarkRetrieval(data=data, size=16)(Extract()).metrics


@pytest.mark.parametrize("output", ["pooled", "rmac"])
def test_the_size_of_a_batch_changes_nothing(tmp_path, output):
  data = landmarks(tmp_path / "a")
  few, many = (LandmarkRetrieval(data=data, output=output, scales=(1.0, 0.7), batch_size=b, k=(2,))(Extract()).metrics for b in (2, 64))
  assert few == pytest.approx(many) and set(few) == {f"{lv}_{x}" for lv in LEVELS for x in ("map", "precision_at_2")}


def test_whitening_is_learned_on_another_folder_and_baselines_are_reported(tmp_path):
  save(tmp_path / "others", {f"{i}.png": WORLD[i] for i in range(9, 29)})
  fields = dict(data=landmarks(tmp_path / "a"), whitening=str(tmp_path / "others"), whitening_dim=3, baselines=True)
  report = LandmarkRetrieval(**fields)(Extract())
  assert "PCA to 3 dimensions" in report.protocol and "20 images of others" in report.protocol
  assert report.metrics["easy_map"] == pytest.approx(100) and "random_init/hard_map" in report.metrics


def test_without_data_there_is_no_number_and_the_protocol_says_why():
  report = LandmarkRetrieval()(Extract())
  assert report.metrics == {} and report.protocol == f"landmark retrieval not computed: give {FIELD}"


def edited(root, change):
  data = landmarks(root)
  file = root / "gnd_roxford5k.json"
  tree = json.loads(file.read_text())
  change(tree)
  file.write_text(json.dumps(tree))
  return data


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda t: [g.update(easy=[], hard=[]) for g in t["gnd"]], "no query has an easy or hard image to find"),
    (lambda t: t.pop("imlist"), "expected the keys imlist, qimlist and gnd, found qimlist, gnd"),
    (lambda t: t["gnd"].pop(), "an entry for each of the 3 queries"),
    (lambda t: t["gnd"][1].update(hard=[12]), "gnd of query q1: hard: expected numbers of images, from 0 to 11"),
    (lambda t: t["gnd"][1].update(junk=["a"]), "gnd of query q1: junk"),
    (lambda t: t["gnd"][2].pop("easy"), "gnd of query q2: has no 'easy'"),
    (lambda t: t["gnd"][0].update(bbx=[3, 3, 2, 9]), "bbx must be x0, y0, x1, y1"),
    (lambda t: t["imlist"].__setitem__(3, "im0"), "imlist names an image twice: im0"),
    (lambda t: t["imlist"].__setitem__(3, "im33"), "1 images are missing, the first is jpg/im33.jpg. Did you mean 'jpg/im3.jpg'"),
  ],
)
def test_mistakes_in_the_ground_truth_are_clear_errors(tmp_path, change, message):
  data = edited(tmp_path / "a", change)
  with pytest.raises(UserError, match=message):
    LandmarkRetrieval(data=data)(Extract())


def test_a_level_without_anything_to_find_has_no_number(tmp_path):
  data = edited(tmp_path / "a", lambda t: [g.update(hard=[]) for g in t["gnd"]])
  report = LandmarkRetrieval(data=data)(Extract())
  assert "hard_map" not in report.metrics and report.metrics["easy_map"] == report.metrics["medium_map"]
  assert "3 easy, 3 medium, 0 hard" in report.protocol


def test_missing_files_and_impossible_options_are_clear_errors(tmp_path):
  (tmp_path / "jpg").mkdir()
  with pytest.raises(UserError, match=f"{FIELD}=.*no images in it"):
    LandmarkRetrieval(data=str(tmp_path))(Extract())
  save(tmp_path, {"jpg/a.png": WORLD[0]})
  with pytest.raises(UserError, match=f"{FIELD}=.*expected one gnd_<name>.pkl or gnd_<name>.json, found none"):
    LandmarkRetrieval(data=str(tmp_path))(Extract())
  data = edited(tmp_path / "b", lambda t: t["gnd"][1].pop("bbx"))
  with pytest.raises(UserError, match="crop_queries=True: query q1 has no bbx"):
    LandmarkRetrieval(data=data, crop_queries=True)(Extract())
  for fields in ({"size": -1}, {"scales": (2.0,)}, {"k": ()}, {"whitening_dim": -1}):
    with pytest.raises(UserError, match=f"config.evals.landmark_retrieval.{next(iter(fields))}="):
      LandmarkRetrieval(**fields)
