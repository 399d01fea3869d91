"""What the method files have alike: checks of their fields and views, pixel normalization, the evaluation view."""

from __future__ import annotations

import dataclasses

from big_ssl.augment.apply import validate
from big_ssl.augment.photometric import Normalize
from big_ssl.core.method import Method, View, as_streams
from big_ssl.core.types import Size, UserError, sides
from big_ssl.models.resmlp import ResMLP
from big_ssl.models.xcit import XCiT

# Fields of methods that switch colors off, where they are 0.
_COLOR_FIELDS = ("color_strength", "hue", "jitter", "gray", "grayscale", "distortion")


def check_least(method: Method, **least: float) -> None:
  """Raises `UserError` for a field below its least value, or with a side below it: check_least(self, num_prototypes=2)."""
  for name, bound in least.items():
    value = getattr(method, name)
    if (min(value) if isinstance(value, tuple) else value) < bound:
      raise UserError(f"config.method.{name}={value}: at least {bound} is needed.")


def check_positive(method: Method, *names: str) -> None:
  """Raises `UserError` for a field that is not above 0."""
  for name in names:
    if getattr(method, name) <= 0:
      raise UserError(f"config.method.{name}={getattr(method, name)}: expected a positive number.")


def check_shares(method: Method, *names: str) -> None:
  """Raises `UserError` for a field outside [0, 1]."""
  for name in names:
    if not 0 <= getattr(method, name) <= 1:
      raise UserError(f"config.method.{name}={getattr(method, name)}: expected a share in [0, 1].")


def check_channels(method: Method) -> None:
  """Raises `UserError` where `mean` and `std` are given, but not one of each for every channel of the images.

  Before the data is open, `image_channels` is 0, and any number goes.
  """
  mean, std, channels = method.mean, method.std, method.image_channels
  if (mean or std) and not len(mean) == len(std) == (channels or len(std)):
    images = f"the images have {channels} channel{'s' * (channels > 1)}, " if channels else ""
    raise UserError(f"config.method.mean={mean}, std={std}: {images}give as many values of both, or () for none.")


def check_patches(method: Method, *names: str) -> None:
  """Raises `UserError` for a side in pixels that patches do not divide, those of a convolutional stem included.

  For methods that count patches; all others have `check_views`.
  """
  for name in names:
    _check_size(method, getattr(method, name), f"config.method.{name}")


def check_views(method: Method) -> None:
  """Raises `UserError` where the images, or crops of these sizes, cannot pass the views of training and of evaluation.

  Called when the data is known. Convolutional stems take any size, packed crops have sizes of their own, and views named
  "teacher..." are for another backbone, whose patches are the method's to check.
  """
  pads = isinstance(method.model, XCiT) or getattr(method.model, "stem_channels", ())
  streams = as_streams(method.inputs()).values()
  for view in (*(view for inputs in streams for view in inputs.views), method.eval_view()):
    names = [f.name for f in dataclasses.fields(method) if f.type == "Size" and getattr(method, f.name) == view.size]
    where = f"config.method.{' and '.join(names)}" if names else f"view '{view.name}': size"
    if min(view.shape) < 1:
      raise UserError(f"{where}={view.size}: expected at least 1 pixel.")
    if not (pads or view.packing or view.name.startswith("teacher")):
      _check_size(method, view.size, where)
    try:
      validate((view,), method.image_channels)
    except UserError as error:
      raise UserError(f"{error}{_without_colors(method)}") from None


def _check_size(method: Method, size: Size, where: str) -> None:
  """A linear patch embedding would cut the rest off, and say nothing."""
  model = method.model
  patch = model.size().patch if isinstance(model, ResMLP) else getattr(model, "patch", None)
  if patch and any(side % patch for side in sides(size)):
    raise UserError(f"{where}={size}: must be a multiple of config.model.patch={patch}.")


def _without_colors(method: Method) -> str:
  """What to set, so that images of any number of channels pass."""
  values = {name: getattr(method, name, 0) for name in _COLOR_FIELDS}
  values = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items() if not isinstance(value, str)}
  fields = [f"config.method.{name}={','.join('0' * len(value))}" for name, value in values.items() if any(value)]
  fields += ["config.method.rand_augment=None"] if getattr(method, "rand_augment", None) else []
  return f" Set {' and '.join(fields)} to leave colors as they are." if fields else ""


def normalize(method: Method) -> tuple[Normalize, ...]:
  """Normalization by `mean` and `std`; nothing where they are (), which leaves pixels in [0, 1]."""
  return (Normalize(mean=method.mean, std=method.std),) if method.mean else ()


def center_view(method: Method, *, size: Size, interpolation: str = "bilinear") -> View:
  """The usual evaluation view: the shorter side to size / `eval_fraction`, the center cut, normalized; 0 squashes all of it."""
  return View(
    name="image",
    size=size,
    crop="center" if method.eval_fraction else "none",
    flip=0.0,
    interpolation=interpolation,
    center_fraction=method.eval_fraction or 1.0,
    augment=normalize(method),
  )
