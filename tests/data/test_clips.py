"""Clips of the embedded world: pure, with exact masks and boxes, of objects that move."""

import numpy as np
import pytest

from big_ssl.data import sprites
from big_ssl.data.clips import SpriteClips, render_clip
from big_ssl.data.opening import open_splits


@pytest.fixture(scope="module")
def some():
  return [render_clip(i, frames=6, size=48) for i in range(24)]


def test_a_clip_is_a_function_of_seed_split_and_index_alone(some):
  again = render_clip(5, frames=6, size=48)
  for name in ("frames", "masks", "labels", "boxes"):
    np.testing.assert_array_equal(getattr(again, name), getattr(some[5], name))
  for other in (render_clip(5, seed=1, frames=6, size=48), render_clip(5, split="eval", frames=6, size=48), some[6]):
    assert np.abs(other.frames.astype(int) - again.frames).mean() > 5


def test_a_longer_or_larger_clip_shows_the_same_path(some):
  for clip, index in ((some[3], 3), (some[4], 4)):
    longer, larger = render_clip(index, frames=11, size=48), render_clip(index, frames=6, size=96)
    np.testing.assert_array_equal(longer.masks[::2], clip.masks)
    np.testing.assert_array_equal(longer.frames[0], clip.frames[0])
    np.testing.assert_array_equal(larger.labels, clip.labels)
    assert np.abs(larger.boxes - clip.boxes).max() < 0.05


def test_one_or_two_objects_are_seen_in_the_first_frame_and_move(some):
  counts = [len(c.labels) for c in some]
  assert set(counts) == {1, 2}
  for clip, count in zip(some, counts, strict=True):
    assert clip.frames.shape == (6, 48, 48, 3) and clip.frames.dtype == np.uint8 and len(clip) == 6
    assert set(np.unique(clip.masks[0])) == set(range(count + 1)) and clip.boxes.shape == (6, count, 4)
  moved = [np.mean((c.masks[0] > 0) != (c.masks[-1] > 0)) for c in some]
  assert np.median(moved) > 0.05, moved


def test_boxes_hold_what_is_seen_of_an_object(some):
  for clip in some:
    for t, k in np.ndindex(clip.boxes.shape[:2]):
      y, x = np.nonzero(clip.masks[t] == k + 1)
      expected = [y.min(), x.min(), y.max() + 1, x.max() + 1] if len(y) else [0, 0, 0, 0]
      np.testing.assert_array_equal(clip.boxes[t, k] * 48, expected)


def test_an_object_keeps_its_colors_along_its_path_and_differs_from_the_background(some):
  for clip in some[:8]:
    inside = lambda t: clip.frames[t][clip.masks[t] == 1].astype(float)
    background = clip.frames[0][clip.masks[0] == 0].astype(float)
    drift = np.abs(inside(0).mean(0) - inside(2).mean(0)).max()
    assert drift < 30 and inside(0).std(0).max() > background.std(0).max(), (clip.name, drift)


def test_the_sprites_have_clips_of_twice_their_size_which_are_drawn_when_asked_for():
  splits = open_splits("sprites", train_examples=1, eval_examples=1, seed=3, image_size=16)
  found = splits["eval"].clips
  assert len(found) == 32 and isinstance(found, SpriteClips)
  np.testing.assert_array_equal(found[-1].frames, render_clip(31, seed=3, split="eval", size=32).frames)
  assert found[0].frame(2).shape == (32, 32, 3) and found[0].mask(2).shape == (32, 32)
  assert splits["train"].clips[0].name != found[0].name
  with pytest.raises(IndexError):
    found[32]


@pytest.mark.parametrize("frames", [0, 5000])
def test_an_impossible_length_is_refused(frames):
  with pytest.raises(ValueError, match=f"{frames} frames"):
    render_clip(0, frames=frames)


def test_objects_are_drawn_from_the_motifs_of_the_images(some):
  labels = np.concatenate([c.labels for c in some])
  assert labels.min() >= 0 and labels.max() < len(sprites.CLASSES) and len(np.unique(labels)) > 5
