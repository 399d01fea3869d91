"""From the bytes of a picture to pixels on a canvas, with Pillow; whatever cannot be read says why."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np


class BadImage(ValueError):
  """A picture that cannot be read; the message is the reason, for the list in the summary."""


@dataclasses.dataclass(frozen=True)
class Placed:
  """pixels [canvas, canvas, C] with the image at the top left, zeros around; height and width of the image on it."""

  pixels: np.ndarray
  height: int
  width: int


def decode(data: bytes, *, channels: int = 3, canvas: int = 0) -> np.ndarray:
  """Pixels [h, w, channels] uint8 of any format that Pillow reads.

  Exif rotation is applied; palettes and CMYK become RGB; an alpha channel is dropped (what is under it shows); of an
  animation the first frame is taken; 16-bit values are scaled to 8. With `canvas`, a larger JPEG is shrunk while it is
  decoded, to no less than the canvas.

  Raises:
    BadImage: empty, truncated or not a picture.
  """
  from PIL import Image, ImageOps

  if not data:
    raise BadImage("empty file")
  try:
    with Image.open(io.BytesIO(data)) as image:
      if canvas and image.format in ("JPEG", "MPO") and max(image.size) > canvas:
        scale = canvas / max(image.size)
        image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
      deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
      image.load()
      return _to_channels(ImageOps.exif_transpose(image), channels, deep=deep)
  except BadImage:
    raise
  except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more for damaged files
    raise BadImage(_reason(error)) from None


def decode_mask(data: bytes) -> np.ndarray:
  """Class numbers [h, w] int32 of a picture whose gray values, or palette indices, are the classes.

  Raises:
    BadImage: not a picture, or one in color, whose classes nothing tells.
  """
  from PIL import Image

  try:
    with Image.open(io.BytesIO(data)) as image:
      if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise BadImage(f"a mask of mode {image.mode}; expected gray values or palette indices that are class numbers")
      return np.asarray(image).astype(np.int32)
  except BadImage:
    raise
  except Exception as error:  # as in `decode`
    raise BadImage(_reason(error)) from None


def _reason(error: Exception) -> str:
  text = str(error).splitlines()[0] if str(error) else type(error).__name__
  return "not a picture" if "cannot identify" in text else text[:120]


def is_plain_jpeg(data: bytes) -> bool:
  """Whether any JPEG decoder gives the same pixels: 8 bits, gray or three channels, and no Exif that might rotate it.

  Reads the segments before the frame header (ITU-T T.81, B.1.1): FF, marker, length, content.
  """
  if data[:3] != b"\xff\xd8\xff":
    return False
  i = 2
  while i + 9 < len(data) and data[i] == 0xFF:
    marker, size = data[i + 1], int.from_bytes(data[i + 2 : i + 4], "big")
    if marker == 0xFF:  # fill byte
      i += 1
      continue
    if marker == 0xE1 and data[i + 4 : i + 8] == b"Exif":
      return False
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      return data[i + 4] == 8 and data[i + 9] in (1, 3)
    i += 2 + size
  return False


def from_object(item: Any, *, channels: int = 3) -> np.ndarray:
  """Pixels [h, w, channels] uint8 of a Pillow image, or of a uint8 or uint16 array [h, w] or [h, w, c].

  Raises:
    BadImage: neither.
  """
  if hasattr(item, "getexif"):
    from PIL import ImageOps

    return _to_channels(ImageOps.exif_transpose(item), channels, deep=item.mode.startswith("I;16"))
  try:
    pixels = np.asarray(item)
  except ValueError as error:
    raise BadImage(str(error)[:120]) from None
  pixels = pixels[..., None] if pixels.ndim == 2 else pixels
  if pixels.ndim != 3 or pixels.dtype not in (np.uint8, np.uint16) or 0 in pixels.shape:
    raise BadImage(f"{pixels.shape} {pixels.dtype} is not an image; expected uint8 or uint16 of shape [h, w, c]")
  return fit_channels(_to_8_bits(pixels, 65535.0) if pixels.dtype == np.uint16 else pixels, channels)


def _to_channels(image: Any, channels: int, *, deep: bool) -> np.ndarray:
  """A Pillow image as [h, w, channels] uint8; `deep` says that it holds 16-bit values."""
  if image.mode.startswith("I") or image.mode == "F":
    values = np.asarray(image, np.float64)
    # Mode "I" is 32 bits wide and "F" is float, whatever the file held: only the values tell 16 bits from 8.
    high = 65535.0 if deep or (image.mode == "I" and values.max(initial=0) > 255) else 255.0
    return fit_channels(_to_8_bits(values, high)[..., None], channels)
  pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
  return fit_channels(pixels if pixels.ndim == 3 else pixels[..., None], channels)


def _to_8_bits(values: np.ndarray, high: float) -> np.ndarray:
  return np.clip(values / high * 255 + 0.5, 0, 255).astype(np.uint8)


def fit_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
  """[h, w, c] to [h, w, channels]: gray is repeated, color averaged, surplus channels dropped; else `BadImage`."""
  have = pixels.shape[-1]
  if have == channels:
    return pixels
  if channels == 1:
    return pixels[..., :3].mean(-1, keepdims=True).round().astype(pixels.dtype)
  if have == 1:
    return np.repeat(pixels, channels, axis=-1)
  if have > channels:
    return pixels[..., :channels]
  raise BadImage(f"{have} channels where {channels} are needed")


def place(pixels: np.ndarray, *, canvas: int) -> Placed:
  """Puts an image at the top left of a canvas; a larger one is shrunk to fit, aspect kept, at least 1 px a side."""
  height, width, channels = pixels.shape
  if max(height, width) > canvas:
    scale = canvas / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = _shrink(pixels, height, width)
  out = np.zeros((canvas, canvas, channels), pixels.dtype)
  out[:height, :width] = pixels
  return Placed(out, height, width)


def _shrink(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
  from PIL import Image

  if pixels.dtype == np.uint8 and pixels.shape[-1] == 3:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
  planes = [
    np.asarray(Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    for plane in np.moveaxis(pixels, -1, 0)
  ]
  return np.clip(np.stack(planes, -1) + 0.5, 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
