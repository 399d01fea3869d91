"""What the method files have alike: checks of their fields, pixel normalization, the evaluation view."""

from __future__ import annotations

from big_ssl.augment.photometric import Normalize
from big_ssl.core.method import Method, View
from big_ssl.core.types import Size, UserError, sides


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
  """Raises `UserError` where `mean` and `std` are given, but not one of each for every channel of the images."""
  mean, std, channels = method.mean, method.std, method.image_channels
  if (mean or std) and not len(mean) == len(std) == channels:
    raise UserError(f"config.method.mean={mean}, std={std}: the images have {channels} channels, give as many values.")


def check_patches(method: Method, *names: str) -> None:
  """Raises `UserError` for a side in pixels that a ViT's patches do not divide; other backbones take any."""
  patch = getattr(method.model, "patch", None)
  for name in names:
    size = getattr(method, name)
    if isinstance(patch, int) and any(side % patch for side in sides(size)):
      raise UserError(f"config.method.{name}={size}: must be a multiple of config.model.patch={patch}.")


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
