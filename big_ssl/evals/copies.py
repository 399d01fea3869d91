"""Altered copies of pictures, as an editor or a web site would make them; the strengths are an own choice."""

from __future__ import annotations

import io

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.evals import descriptors

KINDS = {
  "crop": "a drawn half of the area, resampled",
  "jpeg": "quality 10",
  "blur": "Gaussian of 2 % of the shorter side",
  "contrast": "contrast halved, brightness a tenth up or down",
  "strong": "crop, contrast and jpeg",
}


def copy(image: np.ndarray, *, kind: str, seed: int) -> np.ndarray:
  """The copy `kind` of an image, uint8 [h, w, C] (of uint8 or uint16), the same for the same seed.

  Raises:
    UserError: no such kind.
  """
  if kind not in KINDS:
    raise UserError(f"copy '{kind}': expected one of {', '.join(KINDS)}.{nearest(kind, KINDS)}")
  for part in ("crop", "contrast", "jpeg") if kind == "strong" else (kind,):
    image = descriptors.resize(image, change=_CHANGES[part](np.random.default_rng([seed, list(KINDS).index(part)])))
  return image


def _crop(rng: np.random.Generator):
  """A box of sqrt(1/2) of both sides, enlarged to the size of the picture."""
  place = rng.random(2)

  def change(x):
    width, height = (max(1, round(side * 0.5**0.5)) for side in x.size)
    left, top = (int(p * (side - part + 1)) for p, side, part in zip(place, x.size, (width, height), strict=True))
    return x.resize(x.size, 2, box=(left, top, left + width, top + height))  # 2: bilinear

  return change


def _jpeg(rng: np.random.Generator):
  del rng

  def change(x):
    from PIL import Image

    data = io.BytesIO()
    x.save(data, "JPEG", quality=10)
    return Image.open(data)

  return change


def _blur(rng: np.random.Generator):
  del rng

  def change(x):
    from PIL import ImageFilter

    return x.filter(ImageFilter.GaussianBlur(0.02 * min(x.size)))

  return change


def _contrast(rng: np.random.Generator):
  shift = 25.5 * rng.choice([-1, 1])
  return lambda x: x.point(lambda v: 0.5 * (v - 127.5) + 127.5 + shift)


_CHANGES = {"crop": _crop, "jpeg": _jpeg, "blur": _blur, "contrast": _contrast}
