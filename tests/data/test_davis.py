"""The folders of DAVIS 2017 as clips, and what is said where something is missing."""

import numpy as np
import pytest
from PIL import Image

from big_ssl.core.types import UserError
from big_ssl.data.clips import render_clip
from big_ssl.data.davis import open_clips

PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0]


@pytest.fixture
def root(tmp_path):
  """Two sequences, of which the list names the second and then the first."""
  for name, index in (("bear", 0), ("camel", 1)):
    clip = render_clip(index, frames=3, size=24)
    for kind in ("JPEGImages", "Annotations"):
      (tmp_path / kind / "480p" / name).mkdir(parents=True)
    for t in range(3):
      Image.fromarray(clip.frames[t]).save(tmp_path / f"JPEGImages/480p/{name}/{t:05d}.jpg", quality=100)
      mask = Image.frombytes("P", (24, 24), clip.masks[t].tobytes())
      mask.putpalette(PALETTE)
      mask.save(tmp_path / f"Annotations/480p/{name}/{t:05d}.png")
  (tmp_path / "ImageSets/2017").mkdir(parents=True)
  (tmp_path / "ImageSets/2017/val.txt").write_text("camel\nbear\n")
  return tmp_path


def test_clips_are_read_in_the_order_of_the_list_with_palette_indices_as_objects(root):
  clips = open_clips(str(root))
  assert [c.name for c in clips] == ["camel", "bear"]
  for clip, index in zip(clips, (1, 0), strict=True):
    expected = render_clip(index, frames=3, size=24)
    assert len(clip) == 3
    for t in range(3):
      np.testing.assert_array_equal(clip.mask(t), expected.masks[t])
      assert np.abs(clip.frame(t).astype(int) - expected.frames[t]).mean() < 8


def test_frames_have_the_channels_of_the_run(root):
  assert open_clips(str(root), channels=1)[0].frame(0).shape == (24, 24, 1)


def test_another_folder_is_refused_with_the_layout_and_the_nearest_name(root):
  with pytest.raises(UserError, match=r"config.evals.x.data=.*there is no JPEGImages/480p, no .*expected the folders of DAVIS 2017"):
    open_clips(str(root / "ImageSets"), field="config.evals.x.data")
  with pytest.raises(UserError, match="Did you mean"):
    open_clips(str(root.parent / (root.name + "x")))
  (root / "ImageSets/2017/val.txt").write_text("\n")
  with pytest.raises(UserError, match="val.txt is empty"):
    open_clips(str(root))


def test_a_sequence_without_frames_and_a_frame_without_mask_are_named(root):
  (root / "Annotations/480p/camel/00001.png").unlink()
  with pytest.raises(UserError, match="1 frames of 'camel' have no mask, such as Annotations/480p/camel/00001.png"):
    open_clips(str(root))
  (root / "ImageSets/2017/val.txt").write_text("bear\ndog\n")
  with pytest.raises(UserError, match="sequence 'dog' of .*val.txt has 0 frames"):
    open_clips(str(root))


def test_a_mask_in_color_and_a_damaged_frame_are_named_by_their_files(root):
  clip = open_clips(str(root))[0]
  Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(root / "Annotations/480p/camel/00002.png")
  with pytest.raises(UserError, match="camel/00002.png: a mask of mode RGB; expected gray values or palette indices"):
    clip.mask(2)
  (root / "JPEGImages/480p/camel/00001.jpg").write_bytes(b"not a picture")
  with pytest.raises(UserError, match="camel/00001.jpg: "):
    clip.frame(1)
