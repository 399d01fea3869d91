"""Decoding: every kind of picture gives upright 8-bit pixels, and what is none says why."""

import io

import numpy as np
import pytest
from PIL import Image

from big_ssl.data import decode


def encoded(image: Image.Image, form: str, **kwargs) -> bytes:
  out = io.BytesIO()
  image.save(out, form, **kwargs)
  return out.getvalue()


def gradient(height: int = 24, width: int = 36) -> np.ndarray:
  """A smooth picture, bright at the right, red at the bottom."""
  y, x = np.mgrid[:height, :width]
  return np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
  picture = Image.fromarray(gradient()).convert(mode)
  data = encoded(picture, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 100} if mode == "CMYK" else {}))
  pixels = decode.decode(data)
  assert pixels.shape == (24, 36, 3) and pixels.dtype == np.uint8
  error = np.abs(pixels.astype(int) - np.asarray(picture.convert("RGB"), int)).max()
  assert error <= (12 if mode == "CMYK" else 0), error


def test_an_alpha_channel_is_dropped_and_what_is_under_it_shows():
  pixels = np.dstack([gradient(), np.zeros((24, 36), np.uint8)])
  np.testing.assert_array_equal(decode.decode(encoded(Image.fromarray(pixels), "PNG")), gradient())


@pytest.mark.parametrize("highest", [65535, 200])
def test_16_bits_are_scaled_to_8_however_dark_the_image_is(highest):
  values = np.linspace(0, highest, 64).astype(np.uint16).reshape(8, 8)
  pixels = decode.decode(encoded(Image.fromarray(values), "PNG"))
  np.testing.assert_allclose(pixels[..., 0], values / 257.0, atol=0.51)


def test_the_first_frame_of_an_animation_is_taken():
  frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (40, 200)]
  pixels = decode.decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
  assert pixels.shape == (8, 8, 3) and abs(int(pixels.mean()) - 40) <= 3, pixels.mean()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  upright = gradient()
  undo = {
    1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
    5: upright.swapaxes(0, 1), 6: np.rot90(upright), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
  }  # fmt: skip
  pixels = decode.decode(encoded(Image.fromarray(np.ascontiguousarray(undo[orientation])), "PNG", exif=exif))
  np.testing.assert_array_equal(pixels, upright)


def test_damaged_data_says_why():
  jpeg = encoded(Image.fromarray(gradient(200, 200)), "JPEG")
  cases = {b"": "empty", b"a text named .jpg": "not a picture", jpeg[: len(jpeg) // 2]: "truncated", jpeg[:20]: "."}
  for data, reason in cases.items():
    with pytest.raises(decode.BadImage, match=reason):
      decode.decode(data)


def test_plain_jpegs_are_told_from_all_others():
  color, exif = Image.fromarray(gradient()), Image.Exif()
  exif[0x0112] = 6
  plain = [encoded(color, "JPEG"), encoded(color.convert("L"), "JPEG"), encoded(color, "JPEG", progressive=True)]
  plain += [encoded(color, "JPEG", icc_profile=bytes(70_000))]
  other = [
    encoded(color.convert("CMYK"), "JPEG"),
    encoded(color, "JPEG", exif=exif),
    encoded(color, "PNG"),
    b"",
    b"\xff\xd8\xff",
  ]
  other += [plain[0][:20], encoded(color, "JPEG", icc_profile=bytes(70_000), exif=exif)]
  assert [decode.is_plain_jpeg(d) for d in plain] == [True] * len(plain)
  assert [decode.is_plain_jpeg(d) for d in other] == [False] * len(other)


def test_a_large_jpeg_is_shrunk_while_decoding_but_never_below_the_canvas():
  data = encoded(Image.fromarray(gradient(600, 900)), "JPEG")
  shapes = {canvas: decode.decode(data, canvas=canvas).shape for canvas in (100, 200, 225, 400, 450, 900, 2000)}
  assert shapes == {
    100: (75, 113, 3), 200: (150, 225, 3), 225: (150, 225, 3), 400: (300, 450, 3), 450: (300, 450, 3),
    900: (600, 900, 3), 2000: (600, 900, 3),
  }  # fmt: skip


@pytest.mark.parametrize(
  "shape, placed", [((1, 1), (1, 1)), ((20, 30), (20, 30)), ((64, 128), (32, 64)), ((20_000, 30), (64, 1))]
)
@pytest.mark.parametrize("channels, dtype", [(3, np.uint8), (1, np.uint8), (4, np.uint16)])
def test_an_image_lies_at_the_top_left_and_is_shrunk_to_fit(shape, placed, channels, dtype):
  image = np.full((*shape, channels), 77, dtype)
  out = decode.place(image, canvas=64)
  assert (out.height, out.width) == placed and out.pixels.shape == (64, 64, channels) and out.pixels.dtype == dtype
  assert (out.pixels[: placed[0], : placed[1]] == 77).all()
  out.pixels[: placed[0], : placed[1]] = 0
  assert not out.pixels.any()


def test_channels_are_repeated_averaged_or_dropped():
  gray, color = np.full((2, 2, 1), 9, np.uint8), gradient(2, 2)
  assert (decode.fit_channels(gray, 3) == 9).all()
  np.testing.assert_array_equal(decode.fit_channels(color, 1)[..., 0], color.mean(-1).round())
  assert decode.fit_channels(np.dstack([color, gray]), 3).shape == (2, 2, 3)
  with pytest.raises(decode.BadImage, match="3 channels where 4"):
    decode.fit_channels(color, 4)


def test_pillow_images_and_arrays_are_taken_and_other_objects_refused():
  color = gradient()
  palette = Image.fromarray(color).quantize(16)
  np.testing.assert_array_equal(decode.from_object(palette), np.asarray(palette.convert("RGB")))
  np.testing.assert_array_equal(decode.from_object(color), color)
  assert (decode.from_object(np.full((2, 2), 65535, np.uint16)) == 255).all()
  for bad in (np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8), "text", None, [[1, 2], [3]]):
    with pytest.raises(decode.BadImage):
      decode.from_object(bad)
