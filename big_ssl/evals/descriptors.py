"""From pictures of any size to one vector each, for evaluations of retrieval: resizing, scales, pooling, whitening."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Extract, Weights, unit
from big_ssl.models.dense import patch_map
from big_ssl.ops import pca, retrieval

Pooling = Literal["pooled", "gem", "rmac", "pooled_gem"]
FREE_STRIDE = 32  # sides of images for a backbone that takes any size are multiples of it, which bounds the compilations
THREADS = 8  # that decode
FLOOR = 1e-5  # of the largest eigenvalue (arXiv 2104.14294, public code)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Describing:
  """Fields of an evaluator that turns pictures into one unit vector each, and the work.

  Attributes:
    output: "pooled" of the backbone; "gem", the generalized mean of the patches; "pooled_gem", both joined (DINO's copy
      detection); "rmac", the normalized sum over the regions of R-MAC.
    power: of GeM.
    levels: of R-MAC.
    stage: which of the backbone's stages GeM and R-MAC pool, such as -2; -1 is its patch tokens, or the last stage.
    batch_size: images at a time.
    whitening: a folder of other images, or "train", the run's own; "" is none. R-MAC whitens its regions.
    whitening_dim: 0 is DINO's, of the uncentered second moment with all dimensions kept; above, so many principal axes.
    whitening_images: the most that are used, evenly spaced; 0 is all.
    baselines: also report the same protocol on the random initialization.
  """

  path: ClassVar[str]  # config path of the evaluator, for errors

  output: Pooling = "pooled"
  power: float = 4.0
  levels: int = 3
  stage: int = -1
  batch_size: int = 16
  whitening: str = ""
  whitening_dim: int = 0
  whitening_images: int = 20000
  baselines: bool = False

  def __post_init__(self):
    if self.power <= 0:
      raise UserError(f"{self.path}.power={self.power}: expected a number above 0.")
    for name, least in (("levels", 1), ("batch_size", 1), ("whitening_dim", 0), ("whitening_images", 0)):
      if getattr(self, name) < least:
        raise UserError(f"{self.path}.{name}={getattr(self, name)}: expected at least {least}.")

  def prefixes(self) -> Iterator[tuple[str, Weights]]:
    """Prefix of the metrics, and the weights."""
    yield "", "current"
    if self.baselines:
      yield "random_init/", "random"

  # On the devices

  def rows(self, trunk: Any, images: Any) -> Any:
    """[B, R, D] float32 of normalized images [B, H, W, C]: R regions for R-MAC, else 1."""
    pooled = lambda: trunk(images)["pooled"].astype(jnp.float32)
    if self.output == "pooled":
      return pooled()[:, None]
    maps = self._maps(trunk, images)
    if self.output == "rmac":
      return retrieval.rmac_region_descriptors(maps, levels=self.levels, xp=jnp)
    mean = retrieval.gem(maps.reshape(len(maps), -1, maps.shape[-1]), power=self.power, xp=jnp)
    # The backbone is written twice, and runs once: the compiler merges equal expressions.
    return (mean if self.output == "gem" else jnp.concatenate([pooled(), mean], axis=1))[:, None]

  def _maps(self, trunk: Any, images: Any) -> Any:
    if self.stage == -1:
      return patch_map(trunk, images)
    stages = trunk(images).get("stages", ())
    if not -len(stages) <= self.stage < len(stages):
      raise UserError(f"{self.path}.stage={self.stage}: config.model has {len(stages)} stages.")
    return stages[self.stage].astype(jnp.float32)

  # On the host

  def describe(
    self,
    extract: Extract,
    *,
    load: Callable[[int], np.ndarray],
    count: int,
    multiple: tuple[int, int],
    scales: tuple[float, ...] = (1.0,),
    weights: Weights = "current",
  ) -> list[np.ndarray | None]:
    """Vectors [R, D] of pictures 0 ... count - 1, None for one that cannot be read.

    Pictures whose sizes `fit` rounds to the same at every scale run together. Over the scales vectors are summed; regions
    are taken together.

    Args:
      load: resized uint8 [h, w, C] by number; raises a ValueError that gives the reason for one that cannot be read.
      multiple: of the sides, vertically and horizontally.
      scales: factors of the sides.

    Raises:
      UserError: features that are not finite.
    """
    out, waiting = [None] * count, {}
    join = np.concatenate if self.output == "rmac" else lambda parts: np.sum(parts, axis=0)

    def flush(group: dict[int, np.ndarray]) -> None:
      bits = (len(group) - 1).bit_length()
      size = min(self.batch_size, 1 << (bits + bits % 2))  # 1, 4, 16 ...: each size is compiled for each shape
      found = []
      for factor in scales:
        images = [fit(scaled(image, factor=factor), multiple=multiple) for image in group.values()]
        batch = np.stack(images + [np.zeros_like(images[0])] * (size - len(images)))
        found.append(extract.apply(self.rows, batch, weights=weights)[: len(images)])
        if not np.all(np.isfinite(found[-1])):
          raise UserError(f"{self.path}: features '{self.output}' that are not finite; the weights diverged.")
      for row, number in enumerate(group):
        out[number] = join([rows[row] for rows in found])

    for number, image in enumerate(loaded(load, count)):
      if image is None:
        continue
      sizes = [tuple(_scaled_side(side, factor) for side in image.shape[:2]) for factor in scales]
      key = tuple(rounded(size, multiple=multiple) for size in sizes)
      waiting.setdefault(key, {})[number] = image
      if len(waiting[key]) == self.batch_size:
        flush(waiting.pop(key))
    for group in waiting.values():
      flush(group)
    return out

  def whitener(self, extract: Extract, *, resized: Callable[[np.ndarray], np.ndarray], **options: Any) -> Whitener:
    """What turns vectors into unit descriptors, learned on `whitening`, if any.

    Args:
      resized: of an image as decoded.
      **options: of `describe`.

    Raises:
      UserError: no picture can be read, or `whitening_dim` is more than they give.
    """
    if not self.whitening:
      return Whitener()
    images = extract.images("train") if self.whitening == "train" else extract.folder(self.whitening, field=f"{self.path}.whitening")
    chosen = spread(len(images), most=self.whitening_images)
    load = lambda i: resized(images.pixels(int(chosen[i])))
    rows = [r for r in self.describe(extract, load=load, count=len(chosen), **options) if r is not None]
    if not rows:
      raise UserError(f"{self.path}.whitening={self.whitening}: none of {len(chosen)} images can be read.")
    x, dim = np.concatenate(rows), self.whitening_dim
    most = min(x.shape[1], len(x) - 1)
    if dim > most:
      raise UserError(f"{self.path}.whitening_dim={dim}: {len(x)} vectors of {x.shape[1]} dimensions give at most {most}.")
    found = pca.fit_whitening(x, dim=dim, floor=FLOOR) if dim else retrieval.fit_uncentered_whitening(x, floor=FLOOR)
    kind = f"PCA to {dim} dimensions" if dim else "uncentered second moment, all dimensions"
    name = images.describe()["name"]
    return Whitener(found, f"whitening ({kind}, eigenvalues at least {FLOOR:g} of the largest) from {len(rows)} images of {name}")

  def words(self, scales: tuple[float, ...] = (1.0,)) -> str:
    """The descriptor, for the protocol."""
    kind = {
      "pooled": "'pooled' of the backbone",
      "gem": f"GeM (p={self.power:g}) of the patches",
      "pooled_gem": f"['pooled' of the backbone ; GeM (p={self.power:g}) of the patches]",
      "rmac": f"R-MAC ({self.levels} levels) of the patches",
    }[self.output]
    stage = "" if self.output == "pooled" or self.stage == -1 else f" (stage {self.stage})"
    joined = "their regions together" if self.output == "rmac" else "summed, one l2 at the end"
    many = f" at scales {', '.join(f'{s:.3g}' for s in scales)} ({joined})" if len(scales) > 1 else ""
    return kind + stage + many


@dataclasses.dataclass(frozen=True)
class Whitener:
  """N times [R, D] -> [N, d] float32: whitened and normalized rows, or the rows as they are, summed and normalized.

  Attributes:
    whitening: None leaves it out.
    words: for the protocol.
  """

  whitening: pca.Whitening | None = None
  words: str = "no whitening"

  def __call__(self, rows: Sequence[np.ndarray]) -> np.ndarray:
    if self.whitening is not None:
      parts = np.cumsum([len(r) for r in rows])[:-1]
      rows = np.split(pca.whiten(np.concatenate(rows), whitening=self.whitening), parts)
    return unit(np.stack([r.sum(axis=0) for r in rows]))


def required(rows: Sequence[np.ndarray | None], *, names: Sequence[str], where: str) -> list[np.ndarray]:
  """The rows; raises `UserError` where an image of the data set, named by `where`, cannot be read."""
  missing = [name for name, row in zip(names, rows, strict=True) if row is None]
  if missing:
    raise UserError(f"{where}: {len(missing)} of {len(rows)} images cannot be read, the first is {missing[0]}; all of them count.")
  return list(rows)


def spread(count: int, *, most: int) -> np.ndarray:
  """At most `most` numbers below `count`, evenly spaced; all for most=0."""
  return np.arange(count) if not most or count <= most else np.linspace(0, count - 1, most).astype(int)


def loaded(load: Callable[[int], Any], count: int) -> Iterator[Any]:
  """`load` of 0 ... count - 1 in order, None for what cannot be read.

  Some are read ahead of what is used, and no more, so that memory stays small.
  """

  def one(number: int) -> Any:
    try:
      return load(number)
    except UserError:
      raise
    except ValueError:
      return None

  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for start in range(0, count, 4 * THREADS):
      yield from pool.map(one, range(start, min(start + 4 * THREADS, count)))


# Geometry, on the host


def resize(image: np.ndarray, *, change: Callable[[Any], Any]) -> np.ndarray:
  """`change` of a Pillow image, for uint8 or uint16 [h, w, C] of any number of channels; uint8."""
  from PIL import Image

  if image.dtype == np.uint16:
    image = (image / 257.0 + 0.5).astype(np.uint8)
  parts = [image] if image.shape[-1] == 3 else [plane for plane in np.moveaxis(image, -1, 0)]
  changed = [np.asarray(change(Image.fromarray(np.ascontiguousarray(part)))) for part in parts]
  return changed[0] if image.shape[-1] == 3 else np.stack(changed, axis=-1)


def squash(image: np.ndarray, *, size: tuple[int, int]) -> np.ndarray:
  """Bicubic, to height and width `size`, whatever the aspect."""
  from PIL import Image

  return resize(image, change=lambda x: x.resize(size[::-1], Image.Resampling.BICUBIC))


def shrink(image: np.ndarray, *, longest: int) -> np.ndarray:
  """Lanczos, until no side is above `longest`; a smaller image stays as it is."""
  from PIL import Image

  def thumbnail(x: Any) -> Any:
    x.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return x

  return resize(image, change=thumbnail)


def scaled(image: np.ndarray, *, factor: float) -> np.ndarray:
  """float32 [0, 1] of `factor` times the size, rounded down: bilinear, half-pixel centers, no antialiasing (DINO, public code)."""
  out = image.astype(np.float32) / 255.0
  if factor == 1:
    return out
  for axis in (0, 1):
    side = out.shape[axis]
    place = np.maximum((np.arange(_scaled_side(side, factor)) + 0.5) / factor - 0.5, 0.0)
    low = np.minimum(place.astype(int), side - 1)
    share = (place - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    out = np.take(out, low, axis) * (1 - share) + np.take(out, np.minimum(low + 1, side - 1), axis) * share
  return out


def _scaled_side(side: int, factor: float) -> int:
  return max(1, int(side * factor))


def rounded(size: tuple[int, int], *, multiple: tuple[int, int]) -> tuple[int, int]:
  """Height and width rounded down to multiples, at least one."""
  return tuple(max(side // m, 1) * m for side, m in zip(size, multiple, strict=True))


def fit(image: np.ndarray, *, multiple: tuple[int, int]) -> np.ndarray:
  """Cut at the bottom and right to `rounded`, as a patch embedding without padding does; black up to the first multiple."""
  height, width = rounded(image.shape[:2], multiple=multiple)
  image = image[:height, :width]
  return np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)))
