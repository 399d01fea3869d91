"""Video object segmentation on clips whose answer is known, with the colors of patches as features."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.config import build_named
from big_ssl.core.types import UserError
from big_ssl.data.clips import ArrayClip, SpriteClips
from big_ssl.evals.base import Evaluator
from big_ssl.evals.video_segmentation import VideoSegmentation
from big_ssl.ops import label_propagation


class Colors:
  """A backbone whose tokens are mean and deviation of a patch; with patch=None it has stages, and no stride."""

  def __init__(self, patch, side=8):
    self.patch, self.module, self._side = patch, self, side

  def __call__(self, images):
    p = self._side
    n, h, w, c = images.shape
    cells = images.reshape(n, h // p, p, w // p, p, c)
    cells = np.concatenate([cells.mean((2, 4)), 2 * cells.std((2, 4))], -1)
    return {"tokens": jnp.asarray(cells.reshape(n, -1, 2 * c))} if self.patch else {"stages": (jnp.asarray(cells),)}


class Extract:
  """Clips and the features of `Colors`; with random weights, of images whose pixels are shuffled."""

  def __init__(self, clips, patch=8, side=8):
    self._clips, self._trunk, self.asked, self.shapes = clips, Colors(patch, side), [], set()
    self.stride = (patch, patch) if patch else (1, 1)

  def clips(self, path="", *, field):
    self.asked.append((path, field))
    return self._clips

  def apply(self, function, images, *, weights="current"):
    self.shapes.add(images.shape)
    shuffled = np.random.default_rng(0).permutation(images.ravel()).reshape(images.shape)
    return np.asarray(function(self._trunk, (shuffled if weights == "random" else images) - 0.5))


SPRITES = SpriteClips(count=2, frames=5, size=48)
SMALL = VideoSegmentation(size=96, window=3, baselines=True)
EXACT = VideoSegmentation(size=(192, 48), topk=1, window=2, judge_last=True)


@pytest.fixture(scope="module")
def report():
  return SMALL(Extract(SPRITES))


def clip(frames, masks):
  return ArrayClip("planted", frames, masks, np.zeros(1), np.zeros(1))


def moving(frames=6, void=False):
  """Noise of 8 x 8 cells, whose rows move down by a cell per frame; so does the mask, whose edges are horizontal."""
  cells = np.random.default_rng(0).integers(0, 256, (24, 6, 3), dtype=np.uint8)
  labels = np.select([np.arange(24) // 4 == 1, np.arange(24) // 4 == 3], [1, 2])[:, None].repeat(6, 1).astype(np.uint8)
  grow = lambda x: x.repeat(8, 0).repeat(8, 1)
  cut = lambda x, t: grow(np.roll(x, t, axis=0))[:192]
  masks = np.stack([cut(labels, t) for t in range(frames)])
  if void:
    masks[1:, :, :16] = 255
  return clip(np.stack([cut(cells, t) for t in range(frames)]), masks)


def test_similar_patches_carry_the_masks_of_the_sprites(report):
  m = report.metrics
  assert m["j_and_f"] == pytest.approx((m["j"] + m["f"]) / 2)
  assert m["j_and_f"] > max(m["first_mask/j_and_f"], m["random_init/j_and_f"]) + 20, m


def test_the_protocol_tells_what_the_numbers_depend_on(report):
  assert f"mean over {report.images} objects" in report.protocol
  for word in ("J and F", "0.008", "but the last", "objects of 2 clips", "held-out data", "short side 96", "multiple of 8",
               "patches of 8x8", "T=0.1", "5 nearest", "last 7 frames", "within 3 cells", "kept for ever"):  # fmt: skip
    assert word in report.protocol, (word, report.protocol)


@pytest.mark.parametrize("void", [False, True])
def test_a_clip_that_moves_by_whole_patches_is_segmented_without_error(void):
  found = EXACT(Extract([moving(void=void)]))
  assert found.metrics == {"j": 100, "f": 100, "j_and_f": 100}


def test_a_static_clip_keeps_its_mask_for_ever():
  first = moving(frames=1)
  still = clip(first.frames.repeat(12, 0), first.masks.repeat(12, 0))
  found = dataclasses.replace(EXACT, baselines=True)(Extract([still]))
  assert found.metrics["j_and_f"] == found.metrics["first_mask/j_and_f"] == 100


def test_a_backbone_without_a_stride_covers_the_frame():
  found = EXACT(Extract([moving()], patch=None))
  assert found.metrics["j_and_f"] == 100


def test_a_frame_that_patches_do_not_divide_is_padded_and_its_mask_cut_back():
  whole = moving()
  cut = clip(whole.frames[:, :-3, :-5], whole.masks[:, :-3, :-5])
  found = dataclasses.replace(EXACT, size=(189, 43))(Extract([cut]))
  assert found.metrics["j"] > 99 and found.metrics["f"] == 100


def test_frames_of_another_size_than_the_network_sees_give_masks_of_their_own():
  large = moving()
  large = clip(large.frames.repeat(2, 1).repeat(2, 2), large.masks.repeat(2, 1).repeat(2, 2))
  found = dataclasses.replace(EXACT, size=48)(Extract([large]))
  assert found.metrics["j_and_f"] == 100


@pytest.fixture
def seen(monkeypatch):
  """What the propagation is given, without its work: the first labels stay."""
  given = []

  def keep(features, *, first_labels, **options):
    given.append((sorted(options.items()), [np.asarray(f).tobytes() for f in features]))
    return itertools.repeat(jnp.asarray(first_labels))

  monkeypatch.setattr(label_propagation, "propagate_clip", keep)
  return given


@pytest.mark.parametrize(
  "change",
  [dict(size=64), dict(multiple=64), dict(input_gain=(1.0, 5.0, 0.1)), dict(topk=1), dict(window=1), dict(temperature=1.0),
   dict(last_frames=0), dict(judge_last=True), dict(tolerance=0.05), dict(max_clips=1)],
  ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_each_field_changes_what_is_computed_and_the_protocol(change, seen):
  plain, other = (dataclasses.replace(SMALL, baselines=False, **c)(Extract(SPRITES)) for c in ({}, change))
  half = len(seen) // 2
  assert plain.metrics != other.metrics or seen[:half] != seen[half:]
  assert plain.protocol != other.protocol


def test_the_number_of_frames_at_a_time_changes_nothing_and_every_batch_is_of_one_shape(seen):
  extracts = Extract(SPRITES), Extract(SPRITES)
  plain, other = (dataclasses.replace(SMALL, baselines=False, batch_size=b)(e) for b, e in zip((8, 3), extracts, strict=True))
  assert plain.metrics == other.metrics and seen[:2] == seen[2:]
  assert [e.shapes for e in extracts] == [{(8, 96, 96, 3)}, {(3, 96, 96, 3)}]


def test_no_mask_is_read_that_is_not_judged(seen):
  read = []

  class Spy(ArrayClip):
    def mask(self, index):
      read.append(index)
      return super().mask(index)

  SMALL(Extract([Spy(**vars(SPRITES[0]))]))
  assert set(read) == {0, 1, 2, 3}


@pytest.mark.parametrize(
  ("frame", "expected"), [((480, 854), (480, 832)), ((854, 480), (832, 480)), ((480, 480), (480, 448)), ((1080, 1920), (480, 832))]
)
def test_frames_of_davis_get_the_size_of_the_released_code(frame, expected):
  assert VideoSegmentation(size=480, multiple=64).input_shape(frame) == expected


def test_a_config_builds_it_and_names_the_folder_it_reads():
  fields = {"name": "video_segmentation", "data": "some/DAVIS", "size": (96, 64)}
  found = build_named("evals", fields, Evaluator, path="config.evals.video_segmentation")
  assert found == VideoSegmentation(data="some/DAVIS", size=(96, 64))
  extract = Extract([])
  report = found(extract)
  assert report.metrics == {} and "no clips" in report.protocol
  assert extract.asked == [("some/DAVIS", "config.evals.video_segmentation.data")]


def test_a_clip_that_cannot_be_judged_is_named(seen):
  frames, masks = np.zeros((4, 16, 16, 3), np.uint8), np.zeros((4, 16, 16), np.uint8)
  with pytest.raises(UserError, match="clip 'planted' has no object in its first mask"):
    VideoSegmentation()(Extract([clip(frames, masks)]))
  masks[:, :8] = 1
  with pytest.raises(UserError, match="clip 'planted' has 2 frames"):
    VideoSegmentation()(Extract([clip(frames[:2], masks[:2])]))
  other = [masks[0], masks[1, :7], masks[2], masks[3]]
  with pytest.raises(UserError, match=r"mask 1 of clip 'planted' has shape \(7, 16\), the first has \(16, 16\)"):
    VideoSegmentation(size=16)(Extract([clip(frames, other)]))
  with pytest.raises(UserError, match=r"input_gain=\(1.0,\): expected 3 numbers"):
    VideoSegmentation(size=16, input_gain=(1.0,))(Extract([clip(frames, masks)]))


@pytest.mark.parametrize(
  ("fields", "message"),
  [({"topk": 0}, "topk=0"), ({"temperature": 0.0}, "temperature=0"), ({"size": 32, "multiple": 64}, "size=32"), ({"batch_size": 0}, "batch_size=0")],
)
def test_impossible_fields_are_refused(fields, message):
  with pytest.raises(UserError, match=f"config.evals.video_segmentation.{message}"):
    VideoSegmentation(**fields)
