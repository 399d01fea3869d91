"""Semantic segmentation: classes of masks, confusion counts and their scores, sliding windows.

In all of this -1 is the class of a pixel that does not count; `to_classes` makes it of a data set's own "ignore" label.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core.types import Array, UserError


def to_classes(labels: Array, *, ignore: int, drop_first: bool = False) -> Array:
  """Labels of any shape as classes 0, 1, ..., -1 where they do not count; numpy or jax arrays.

  Args:
    ignore: the label, as it is in the mask, of pixels that do not count; a negative one is in no mask.
    drop_first: label 0 does not count either, and 1, 2, ... are the classes 0, 1, ... (ADE20K).
  """
  xp = np if isinstance(labels, np.ndarray) else jnp
  labels = labels.astype(xp.int32)
  counted = labels != ignore
  if drop_first:
    counted, labels = counted & (labels > 0), labels - 1
  return xp.where(counted, labels, -1)


def confusion(predicted: np.ndarray, *, labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Pixels of each class by the class predicted for them, [num_classes, num_classes] int64; add those of all images.

  Args:
    predicted: integers in 0 ... num_classes-1, any shape.
    labels: the same shape, -1 where the pixel counts for nothing, neither as missed nor as predicted.

  Raises:
    UserError: a label or a prediction that is no class.
  """
  counted = labels >= 0
  truth, found = labels[counted].astype(np.int64), predicted[counted].astype(np.int64)
  for name, values in (("label", truth), ("prediction", found)):
    if values.size and not 0 <= values.min() <= values.max() < num_classes:
      raise UserError(
        f"segmentation: a {name} {values.max()} where there are {num_classes} classes, 0 to {num_classes - 1}."
      )
  return np.bincount(truth * num_classes + found, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True)
class Scores:
  """Shares in [0, 1]; NaN for a class that there is not, and for a mean of none.

  Attributes:
    iou: [K] intersection over union; there is none for a class that is neither labeled nor predicted.
    dice: [K] twice the intersection over the sum of what is labeled and what is predicted; as `iou` there may be none.
    accuracy: [K] share of a class's pixels that are found.
    mean_iou, mean_dice, mean_accuracy: over the classes that have one.
    pixel_accuracy: share of all pixels.
  """

  iou: np.ndarray
  dice: np.ndarray
  accuracy: np.ndarray
  mean_iou: float
  mean_dice: float
  mean_accuracy: float
  pixel_accuracy: float


def scores(counts: np.ndarray) -> Scores:
  """Scores of a confusion matrix [label, prediction] of ALL images (mmsegmentation's mean_iou and dinov3's public code)."""
  counts = counts.astype(np.int64)
  hits, labeled, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
  iou, accuracy = _ratio(hits, labeled + predicted - hits), _ratio(hits, labeled)
  dice = _ratio(2 * hits, labeled + predicted)
  mean = lambda x: float(np.mean(x[~np.isnan(x)])) if not np.isnan(x).all() else float("nan")
  pixels = float(_ratio(hits.sum(), labeled.sum()))
  return Scores(iou, dice, accuracy, mean(iou), mean(dice), mean(accuracy), pixels)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.where(b > 0, a / np.maximum(b, 1), np.nan)


def resize_mask(mask: np.ndarray, *, shape: tuple[int, int]) -> np.ndarray:
  """[h, w] by nearest neighbors at `shape`: pixel i reads floor((i + 1/2) old / new).

  PIL adds up float steps, and where these fall just short it reads the pixel before.
  """
  rows, columns = (((2 * np.arange(new) + 1) * old) // (2 * new) for old, new in zip(mask.shape, shape, strict=True))
  return mask[rows[:, None], columns]


def bilinear(x: Array, *, shape: tuple[int, int]) -> Array:
  """[..., h, w, C] float32 at another height and width: half-pixel centers, no antialiasing, as torch resizes logits."""
  shape = (*x.shape[:-3], *shape, x.shape[-1])
  return jax.image.resize(x.astype(jnp.float32), shape, "linear", antialias=False, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Windows:
  """How an image is covered by windows of one size.

  Attributes:
    shape: height and width that the image is to be resized to first; larger than its own where a window would not fit.
    window: height and width of the windows.
    anchors: top and left of each, row by row.
  """

  shape: tuple[int, int]
  window: tuple[int, int]
  anchors: tuple[tuple[int, int], ...]


def plan_windows(shape: tuple[int, int], *, window: int, stride: int) -> Windows:
  """Windows at 0, stride, 2 stride, ..., and one at the end (Segmenter, arXiv 2105.05633, public code; dinov3 has the same).

  Args:
    shape: of the image. With a side below `window`, the shorter one becomes `window`, aspect kept.
    window: side in pixels; 0 is the whole image.
    stride: at least 1.
  """
  if not window:
    return Windows(shape, shape, ((0, 0),))
  if min(shape) < window:
    short = min(shape)
    # The aspect first, as there: 15 / 11 * 22 falls short of 30 and is cut to 29, 15 * 22 / 11 would not.
    shape = tuple(window if side == short else int(side / short * window) for side in shape)
  starts = [[*range(0, side - window, stride), side - window] for side in shape]
  return Windows(shape, (window, window), tuple((y, x) for y in starts[0] for x in starts[1]))


def cut_windows(image: np.ndarray, *, plan: Windows) -> np.ndarray:
  """[H, W, ...] of `plan.shape` -> [windows, h, w, ...]."""
  height, width = plan.window
  return np.stack([image[y : y + height, x : x + width] for y, x in plan.anchors])


def merge_windows(logits: Array, *, plan: Windows) -> Array:
  """Logits [windows, h, w, C] to those of the image, [H, W, C]: the mean of the windows over each pixel."""
  height, width = plan.window
  total, count = jnp.zeros((*plan.shape, logits.shape[-1]), jnp.float32), np.zeros((*plan.shape, 1), np.float32)
  for one, (y, x) in zip(logits, plan.anchors, strict=True):
    total = total.at[y : y + height, x : x + width].add(one)
    count[y : y + height, x : x + width] += 1
  return total / count


def probabilities(logits: Array, *, plan: Windows, shape: tuple[int, int], flipped: bool = False) -> Array:
  """Logits of the windows to class probabilities [H, W, C] at `shape`; their mean over scales and flips is the prediction.

  Segmenter's order (public code): mean of the logits, bilinear to `shape`, mirrored back, softmax.

  Args:
    logits: [windows, h, w, C].
    flipped: the windows are those of the mirrored image.
  """
  merged = bilinear(merge_windows(logits, plan=plan), shape=shape)
  return jax.nn.softmax(merged[:, ::-1] if flipped else merged)
