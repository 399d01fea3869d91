"""Maps of features of whole data sets, image by image: resized, cut into windows, and run in full batches of one shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from big_ssl.core.resampling import axis_weights
from big_ssl.core.types import Size, UserError
from big_ssl.evals.base import Images
from big_ssl.ops import segmentation as ops


@dataclasses.dataclass
class Part:
  """The windows of an image at one scale, mirrored or not, and their maps as they come.

  Attributes:
    index: of the image.
    mask: [h, w] classes of its pixels, at the size of the mask.
    plan: how the windows cover the image.
    flipped: whether they are those of the mirrored image.
  """

  index: int
  mask: np.ndarray
  plan: ops.Windows
  flipped: bool
  rows: list[np.ndarray] = dataclasses.field(default_factory=list)

  @property
  def maps(self) -> np.ndarray:
    """[windows, h, w, D]"""
    return np.stack(self.rows)


@dataclasses.dataclass(frozen=True)
class Reader:
  """The backbone on the images of a split.

  Attributes:
    apply: a map [N, h, w, D] of images [N, H, W, C] in [0, 1].
    pixels: height and width of what a place of the map sees; `apply` pads images at the bottom and right to whole ones.
    batch_size: windows at a time.
    size, window, stride: of images and windows, as in `evals.segmentation`.
  """

  apply: Callable[[np.ndarray], np.ndarray]
  pixels: tuple[int, int]
  batch_size: int
  size: Size
  window: int
  stride: int

  def padded(self, shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width that the map of a window of `shape` covers."""
    return tuple(-(-side // step) * step for side, step in zip(shape, self.pixels, strict=True))

  def parts(
    self,
    images: Images,
    rows: np.ndarray,
    classes: Callable[[Images, int], np.ndarray],
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    unreadable: list[str],
  ) -> Iterator[Part]:
    """Each image at each scale, and mirrored where asked, in the order in which batches of one shape become full.

    Every batch is a full one, so that there is one compilation per shape; what fills the last one is cut off.

    Args:
      rows: indices of the images.
      classes: (images, index) -> mask.
      unreadable: gets the names of the images that are left out, with the reasons.

    Raises:
      UserError: a mask of another aspect than its image.
    """
    waiting: dict[tuple, list[tuple[Part, np.ndarray]]] = {}
    for index in map(int, rows):
      try:
        image, mask = images.pixels(index), classes(images, index)
      except UserError:
        raise
      except ValueError as error:  # an image or mask that cannot be read
        unreadable.append(f"{images.name(index)}: {error}")
        continue
      height, width = image.shape[:2]
      if abs(height * mask.shape[1] - width * mask.shape[0]) > 0.05 * height * mask.shape[1]:
        sizes = " and ".join(f"{h}x{w}" for h, w in ((height, width), mask.shape))
        raise UserError(f"{images.name(index)}: image and mask are {sizes}; expected sides in the same proportion.")
      image = image.astype(np.float32) / np.iinfo(image.dtype).max
      for scale in scales:
        for part, windows in self._cut(index, image, mask, scale, flip):
          shape = windows.shape[1:]
          waiting.setdefault(shape, []).extend((part, window) for window in windows)
          while len(waiting[shape]) >= self.batch_size:
            now, waiting[shape] = waiting[shape][: self.batch_size], waiting[shape][self.batch_size :]
            yield from self._read(now)
    for queue in waiting.values():
      if queue:
        yield from self._read(queue)

  def _cut(
    self, index: int, image: np.ndarray, mask: np.ndarray, scale: float, flip: bool
  ) -> Iterator[tuple[Part, np.ndarray]]:
    shape = self._shape(image.shape[:2], scale)
    plan = ops.plan_windows(shape, window=self.window, stride=self.stride)
    resized = resize(resize(image, shape=shape), shape=plan.shape)
    for flipped in (False, True) if flip else (False,):
      windows = ops.cut_windows(resized[:, ::-1] if flipped else resized, plan=plan)
      yield Part(index, mask, plan, flipped), windows

  def _shape(self, own: tuple[int, int], scale: float) -> tuple[int, int]:
    if isinstance(self.size, tuple):
      wanted = self.size
    else:
      factor = self.size / min(own) if self.size else 1.0
      wanted = tuple(side * factor for side in own)
    return tuple(max(1, round(side * scale)) for side in wanted)

  def _read(self, queue: list[tuple[Part, np.ndarray]]) -> Iterator[Part]:
    """The parts that are complete now."""
    maps = np.asarray(self.apply(filled(np.stack([window for _, window in queue]), self.batch_size)))
    for (part, _), one in zip(queue, maps, strict=False):
      part.rows.append(one)
      if len(part.rows) == len(part.plan.anchors):
        yield part


def resize(image: np.ndarray, *, shape: tuple[int, int]) -> np.ndarray:
  """[H, W, C] at another height and width, bilinear, antialiased where it shrinks."""
  if image.shape[:2] == shape:
    return image
  options = {"interpolation": "bilinear", "xp": np}
  rows, columns = (
    axis_weights(0.0, old, size=new, canvas=old, **options) for old, new in zip(image.shape[:2], shape, strict=True)
  )
  return np.einsum("yh,hwc,xw->yxc", rows, image, columns, optimize=True).astype(np.float32)


def filled(rows: np.ndarray, count: int) -> np.ndarray:
  """[n, ...] with zeros up to `count` rows."""
  if len(rows) == count:
    return rows
  return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])
