"""Video object segmentation by label propagation, DINO's protocol on DAVIS 2017 (arXiv 2104.14294, section 4.2.2; released code)."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Clip, Evaluator, Extract, Report, Weights
from big_ssl.models.dense import patch_map
from big_ssl.ops import label_propagation, mask_scores
from big_ssl.ops.label_propagation import nearest_places
from big_ssl.ops.segmentation import bilinear

PATH = "config.evals.video_segmentation"
VOID = 255
CLASSES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSegmentation(Evaluator):
  """The masks of the first frame, carried through a clip by frozen patch features, nothing trained; in percent.

  "j" is the region IoU, "f" the boundary measure, "j_and_f" their mean: over the frames of an object, then over objects.
  The defaults are for the clips of the sprites. The published numbers (DINO ViT-S/16: 61.8) are those of

    dict(data="DAVIS", size=480, multiple=64, input_gain=(0.229 / 0.228, 1, 1), baselines=False)

  with the folders of DAVIS 2017 at 480p, see `data/davis.py`. A square clip then becomes 480 x 448, as in the released code.

  Attributes:
    data: a folder in the layout of DAVIS 2017; "" is the clips of the held-out data.
    output: the normed tokens of the patches.
    layers: of which the features are joined, the last of the backbone.
    size: short side in pixels, or (height, width).
    multiple: of the longer side, which keeps the aspect and is rounded down to it; not used where both sides are given.
    input_gain: factor of each normalized channel, () is 1. The released script divides red by 0.228, not 0.229.
    topk, window, temperature: as in `ops.label_propagation.Rule`.
    last_frames: of the context, besides the first frame.
    judge_last: whether the last frame counts; the DAVIS challenge leaves it out, and the first, which is given.
    tolerance: of the boundary, in diagonals of the frame.
    max_clips: use only so many, the first; 0 is all.
    batch_size: frames at a time.
    baselines: also report the random initialization, and the first mask kept for ever.
  """

  output: Literal["tokens"] = "tokens"
  data: str = ""
  layers: int = 1
  size: int | tuple[int, int] = 96
  multiple: int = 8
  input_gain: tuple[float, ...] = ()
  topk: int = 5
  window: int = 12
  temperature: float = 0.1
  last_frames: int = 7
  judge_last: bool = False
  tolerance: float = 0.008
  max_clips: int = 0
  batch_size: int = 8
  baselines: bool = False

  def __post_init__(self):
    least = dict(layers=1, multiple=1, topk=1, window=0, last_frames=0, max_clips=0, batch_size=1)
    for name, low in least.items():
      if getattr(self, name) < low:
        raise UserError(f"{PATH}.{name}={getattr(self, name)}: expected at least {low}.")
    for name in ("temperature", "tolerance"):
      if getattr(self, name) <= 0:
        raise UserError(f"{PATH}.{name}={getattr(self, name)}: expected a positive number.")
    sides = (self.size,) if isinstance(self.size, int) else self.size
    if min(sides) < (self.multiple if isinstance(self.size, int) else 1):
      raise UserError(f"{PATH}.size={self.size}: expected pixels, as one side at least {PATH}.multiple={self.multiple}.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # the frames are spread over the devices, every process carries the masks
    clips = extract.clips(self.data, field=f"{PATH}.data")
    count = min(len(clips), self.max_clips or len(clips))
    if not count:
      return Report({}, f"video object segmentation not computed: the data has no clips; {PATH}.data names a folder of DAVIS 2017")
    scores: dict[str, list[np.ndarray]] = {}
    for number in range(count):
      clip = clips[number]
      scores.setdefault("", []).append(self._score(clip, self._segment(extract, clip, "current")))
      if self.baselines:
        scores.setdefault("random_init/", []).append(self._score(clip, self._segment(extract, clip, "random")))
        scores.setdefault("first_mask/", []).append(self._score(clip, itertools.repeat(clip.mask(0))))
    metrics = {}
    for prefix, found in scores.items():
      region, contour = 100.0 * np.concatenate(found).mean(axis=0)
      metrics |= {f"{prefix}j": float(region), f"{prefix}f": float(contour), f"{prefix}j_and_f": float(region + contour) / 2}
    objects = sum(map(len, scores[""]))
    return Report(metrics, self._protocol(extract, objects=objects, clips=count), images=objects)

  def _score(self, clip: Clip, masks: Iterator[np.ndarray]) -> np.ndarray:
    """[objects, 2]: J and F, each the mean over the judged frames.

    Args:
      masks: labels [h, w] of frames 2, 3, ...

    Raises:
      UserError: no object in the first frame, no frame to judge, or masks of different sizes.
    """
    first = clip.mask(0)
    objects = mask_scores.object_labels(first, void=VOID)
    stop = len(clip) if self.judge_last else len(clip) - 1
    if not len(objects) or stop < 2:
      what = f"{len(clip)} frames" if len(objects) else "no object in its first mask"
      raise UserError(f"{PATH}.data={self.data or 'of the run'}: clip '{clip.name}' has {what}; there is nothing to judge.")
    found = []
    for frame, mask in zip(range(1, stop), masks):
      truth = clip.mask(frame)
      if truth.shape != first.shape:
        raise UserError(f"{PATH}.data: mask {frame} of clip '{clip.name}' has shape {truth.shape}, the first has {first.shape}.")
      void = truth == VOID
      j = [mask_scores.region_iou(mask == k, truth=truth == k, void=void) for k in objects]
      f = [mask_scores.boundary_f(mask == k, truth=truth == k, void=void, tolerance=self.tolerance) for k in objects]
      found.append(np.stack([j, f], axis=1))
    return np.mean(found, axis=0)

  def _segment(self, extract: Extract, clip: Clip, weights: Weights) -> Iterator[np.ndarray]:
    """Yields the labels [h, w] of frames 2, 3, ..., at the size of the first mask."""
    first = clip.mask(0)
    shape = self.input_shape(clip.frame(0).shape[:2])
    maps = self._maps(extract, clip, shape, weights)
    start = next(maps)
    grid, stride = start.shape[:2], extract.stride
    # A backbone without a stride of its own covers the frame, one with patches the frame padded to whole patches.
    covered = shape if stride == (1, 1) else tuple(n * s for n, s in zip(grid, stride, strict=True))
    cells = [nearest_places(n, step=old / (n * new / c), limit=old) for n, old, new, c in zip(grid, first.shape, shape, covered, strict=True)]
    classes = int(np.max(first, where=first != VOID, initial=0)) + 1
    # More classes, up to a multiple: without a label they never win, and few numbers of objects are compiled.
    labels = label_propagation.one_hot(first[np.ix_(*cells)], classes=classes + -classes % CLASSES)
    back = [nearest_places(old, step=new / old, limit=new) for old, new in zip(first.shape, shape, strict=True)]
    rule = label_propagation.Rule(topk=self.topk, window=self.window, temperature=self.temperature)
    frames = itertools.chain([start], maps)
    for soft in label_propagation.propagate_clip(frames, first_labels=labels, last_frames=self.last_frames, rule=rule):
      yield np.asarray(jnp.argmax(label_propagation.enlarge(soft, size=covered), axis=-1))[np.ix_(*back)]

  def input_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width that a frame of `shape` gets."""
    if not isinstance(self.size, int):
      return tuple(self.size)
    short, rounded = min(shape), lambda side: int(self.size * side / short // self.multiple) * self.multiple
    return (rounded(shape[0]), self.size) if shape[0] > shape[1] else (self.size, rounded(shape[1]))

  def _maps(self, extract: Extract, clip: Clip, shape: tuple[int, int], weights: Weights) -> Iterator[np.ndarray]:
    """Yields the features [h, w, D] of every frame; batches are filled up, so that one compilation serves a clip."""
    for start in range(0, len(clip), self.batch_size):
      frames = [_resized(clip.frame(i), shape) for i in range(start, min(start + self.batch_size, len(clip)))]
      batch = np.stack(frames + [np.zeros_like(frames[0])] * (self.batch_size - len(frames)))
      yield from extract.apply(self.features, batch, weights=weights)[: len(frames)]

  def features(self, trunk: Any, images: Any) -> Any:
    """[B, h, w, D] float32 of normalized frames [B, H, W, C]."""
    if self.input_gain:
      if len(self.input_gain) != images.shape[-1]:
        raise UserError(f"{PATH}.input_gain={self.input_gain}: expected {images.shape[-1]} numbers, one for each channel.")
      images = images * jnp.asarray(self.input_gain, images.dtype)
    return patch_map(trunk, images, layers=self.layers)

  def _protocol(self, extract: Extract, *, objects: int, clips: int) -> str:
    one = f"short side {self.size}, the other one rounded down to a multiple of {self.multiple}"
    size = one if isinstance(self.size, int) else "x".join(map(str, self.size))
    stride = "" if extract.stride == (1, 1) else f" (patches of {'x'.join(map(str, extract.stride))})"
    gain = f", normalized channels times {self.input_gain}" if self.input_gain else ""
    layers = f"the last {self.layers} layers" if self.layers > 1 else "the last layer"
    return (
      f"video object segmentation by label propagation: J and F (tolerance {self.tolerance:g} of the diagonal) over the frames"
      f" after the first{'' if self.judge_last else ' but the last'}, mean over {objects} objects of {clips} clips of"
      f" {pathlib.Path(self.data).name or 'the held-out data'}; frames {size}, bilinear, normalized as in evaluation{gain};"
      f" tokens of {layers}{stride}, cosine, T={self.temperature:g}, the {self.topk} nearest patches of the first and the last"
      f" {self.last_frames} frames" + (f" within {self.window} cells" if self.window else " anywhere") + ", soft masks go on"
      + ("; first_mask is that of the first frame kept for ever" if self.baselines else "")
    )


def _resized(frame: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """float32 [h, w, C] in [0, 1]: bilinear without antialiasing, rounded to gray levels, as OpenCV resizes."""
  deep = np.float32(np.iinfo(frame.dtype).max)
  if frame.shape[:2] == shape:
    return frame / deep
  return np.rint(np.asarray(bilinear(jnp.asarray(frame, jnp.float32), shape=shape))) / deep
