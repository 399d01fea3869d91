"""From the bytes of a picture to pixels on a canvas, with Pillow; whatever cannot be read says why."""

from __future__ import annotations

import dataclasses
import io

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

  EXIF rotation is applied; palettes and CMYK become RGB; an alpha channel is dropped; of an animation the first frame is
  taken; 16-bit values are scaled to 8. With `canvas`, a larger JPEG is shrunk while it is decoded, to no less than the canvas.

  Raises:
    BadImage: empty, truncated or not a picture.
  """
  from PIL import Image, ImageOps

  if not data:
    raise BadImage("empty file")
  try:
    with Image.open(io.BytesIO(data)) as image:
      if canvas and image.format == "JPEG" and max(image.size) > canvas:
        scale = canvas / max(image.size)
        image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
      image.load()
      return _to_channels(ImageOps.exif_transpose(image), channels)
  except BadImage:
    raise
  except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others for damaged files
    raise BadImage(_reason(error)) from None


def _reason(error: Exception) -> str:
  text = str(error).splitlines()[0] if str(error) else type(error).__name__
  return "not a picture" if "cannot identify" in text else text[:120]


def _to_channels(image, channels: int) -> np.ndarray:
  if image.mode.startswith("I") or image.mode == "F":
    values = np.asarray(image, np.float64)
    high = 65535.0 if image.mode.startswith("I") and values.max(initial=0) > 255 else 255.0
    gray = np.clip(values / high * 255 + 0.5, 0, 255).astype(np.uint8)[..., None]
    return np.repeat(gray, channels, axis=-1)
  pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
  return fit_channels(pixels if pixels.ndim == 3 else pixels[..., None], channels)


def fit_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
  """[h, w, c] to [h, w, channels]: gray is repeated, color averaged, surplus channels dropped."""
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
  """Puts an image at the top left of a canvas; one that is larger is shrunk, aspect kept, to fit (at least 1 px a side)."""
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
  planes = [np.asarray(Image.fromarray(p.astype(np.float32), "F").resize((width, height), Image.Resampling.BILINEAR)) for p in np.moveaxis(pixels, -1, 0)]
  return np.clip(np.stack(planes, -1) + 0.5, 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
