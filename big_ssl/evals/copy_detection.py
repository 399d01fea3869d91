"""Copy detection: Copydays as DINO evaluates it (arXiv 2104.14294, table 4), or synthetic copies of the held-out images."""

from __future__ import annotations

import dataclasses
import functools
import posixpath
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.evals import descriptors
from big_ssl.evals.base import Evaluator, Extract, Images, Report
from big_ssl.evals.copies import KINDS, copy
from big_ssl.evals.descriptors import Describing, Pooling
from big_ssl.ops import retrieval

ORIGINALS = "original"
COPYDAYS = ("strong", "crops", "jpegqual", "jpeg")  # folders of copies; the last three hold a folder for each strength
PREFIX = 4  # characters of a file name that an original and its copies share


@dataclasses.dataclass(frozen=True)
class Task:
  """N originals and Q queries.

  Attributes:
    load: the picture as decoded, by number: the originals, then the queries.
    names: of all pictures, for messages.
    queries: [Q] block of each query.
    answers: [Q] the text that a query shares with the originals it is to find.
    originals: [N] that text of the originals.
    words: for the protocol.
  """

  load: Callable[[int], np.ndarray]
  names: Sequence[str]
  queries: np.ndarray
  answers: np.ndarray
  originals: np.ndarray
  words: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyDetection(Describing, Evaluator):
  """Cosine ranking of originals and distractors for each copy: "BLOCK_map" in percent, such as "strong_map".

  The defaults are DINO's, which adds 20,000 other images for the whitening and 10,000 as distractors. SEER's (arXiv
  2202.08360) are output="rmac", stage=-2, size=224, whitening_dim=1024, top=0.

  Attributes, besides those of `descriptors.Describing`:
    data: a folder as Copydays: original/, strong/, crops/<share>/, jpegqual/<quality>/ (or jpeg/), whose names share
      their first 4 characters with the original. "" makes copies of the run's own held-out images instead (own choice).
    size: side in pixels to which images are squashed, bicubic; 0 is 320 for a folder, else that of the evaluation view.
      It is rounded down to whole patches.
    top: ranks that count; an original found later scores 0. 0 is all.
    distractors: a folder of other images, put to the originals; "" is none.
    distractor_images: the most that are used, evenly spaced; 0 is all.
    copies: what is done to the held-out images, see `copies.KINDS`; a block for each.
    images: the most held-out images that are copied, evenly spaced; 0 is all.
  """

  path: ClassVar[str] = "config.evals.copy_detection"

  output: Pooling = "pooled_gem"
  data: str = ""
  size: int = 0
  top: int = 20
  distractors: str = ""
  distractor_images: int = 10000
  copies: tuple[str, ...] = tuple(KINDS)
  images: int = 256

  def __post_init__(self):
    super().__post_init__()
    for name in ("size", "top", "distractor_images", "images"):
      if getattr(self, name) < 0:
        raise UserError(f"{self.path}.{name}={getattr(self, name)}: expected 0 or more.")
    for kind in self.copies or ("",):
      if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(f"{self.path}.copies={self.copies}: no copy '{kind}'.{nearest(kind, KINDS)} Accepted: {known}.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # every process ranks all of it
    size = self.size or (320 if self.data else extract.size)
    size = descriptors.rounded((size, size) if isinstance(size, int) else size, multiple=extract.stride)
    task = (self._copydays if self.data else self._synthetic)(extract)
    squash = functools.partial(descriptors.squash, size=size)
    metrics, words = {}, []
    for prefix, weights in self.prefixes():
      options = {"multiple": extract.stride, "weights": weights}
      whiten = self.whitener(extract, resized=squash, **options)
      found = self.describe(extract, load=lambda i: squash(task.load(i)), count=len(task.names), **options)
      unit = whiten(descriptors.required(found, names=task.names, where=f"{self.path}.data={self.data}"))
      extra, told = self._distracting(extract, resized=squash, **options)
      database = np.concatenate([unit[: len(task.originals)], *([whiten(extra)] if extra else [])])
      metrics |= {prefix + k: v for k, v in self._scores(unit[len(task.originals) :], database, task).items()}
      words = words or [told, whiten.words]
    queries = dict(zip(*np.unique(task.queries, return_counts=True), strict=True))
    counts = {name: int(queries.get(name.rpartition("/")[2].removesuffix("_map"), len(task.queries))) for name in metrics}
    return Report(metrics, self._protocol(task, size=size, database=len(database), words=words), images=counts)

  def _distracting(self, extract: Extract, *, resized: Callable[[np.ndarray], np.ndarray], **options: Any) -> tuple[list[np.ndarray], str]:
    """Vectors of the distractors, and what the protocol says about them."""
    if not self.distractors:
      return [], "no distractors"
    images = extract.folder(self.distractors, field=f"{self.path}.distractors")
    chosen = descriptors.spread(len(images), most=self.distractor_images)
    load = lambda i: resized(images.pixels(int(chosen[i])))
    found = [r for r in self.describe(extract, load=load, count=len(chosen), **options) if r is not None]
    bad = f" ({len(chosen) - len(found)} cannot be read)" if len(found) < len(chosen) else ""
    return found, f"{len(found)} distractors of {images.describe()['name']}{bad}"

  def _copydays(self, extract: Extract) -> Task:
    where = f"{self.path}.data={self.data}"
    images = extract.folder(self.data, field=f"{self.path}.data")
    blocks = np.array([_block(images.name(i)) for i in range(len(images))])
    key = np.array([posixpath.basename(images.name(i))[:PREFIX] for i in range(len(images))])
    originals, queries = np.flatnonzero(blocks == ORIGINALS), np.flatnonzero((blocks != ORIGINALS) & (blocks != ""))
    for rows, expected in ((originals, f"{ORIGINALS}/"), (queries, " or ".join(f"{name}/" for name in COPYDAYS))):
      if not len(rows):
        raise UserError(f"{where}: no image in {expected}; expected the folders of Copydays.")
    lonely = queries[~np.isin(key[queries], key[originals])]
    if len(lonely):
      raise UserError(
        f"{where}: {len(lonely)} of {len(queries)} copies have no original, the first is {images.name(int(lonely[0]))}; the first"
        f" {PREFIX} characters of the names must be equal."
      )
    order = np.concatenate([originals, queries])
    return Task(
      lambda i: images.pixels(int(order[i])),
      [images.name(int(i)) for i in order],
      blocks[queries],
      key[queries],
      key[originals],
      f"{images.describe()['name']}, {len(queries)} copies, matched by the first {PREFIX} characters of the names",
    )

  def _synthetic(self, extract: Extract) -> Task:
    """Held-out images that can be read; each is found by its own copies."""
    images = extract.images("eval")
    chosen = [int(i) for i in descriptors.spread(len(images), most=self.images) if _readable(images, int(i))]
    if not chosen:
      raise UserError(f"{self.path}: no held-out image can be read.")
    count = len(chosen)

    def load(number: int) -> np.ndarray:
      image = images.pixels(chosen[number % count])
      kind = number // count
      return image if kind == 0 else copy(image, kind=self.copies[kind - 1], seed=chosen[number % count])

    own = np.array([str(i) for i in chosen])
    return Task(
      load,
      [images.name(i) for i in chosen] * (1 + len(self.copies)),
      np.repeat(self.copies, count),
      np.tile(own, len(self.copies)),
      own,
      f"synthetic copies ({'; '.join(f'{k}: {KINDS[k]}' for k in self.copies)}) of {count} images of {images.describe()['name']}",
    )

  def _scores(self, query: np.ndarray, database: np.ndarray, task: Task) -> dict[str, float]:
    """mAP of each block, and of all queries where there are several blocks."""
    relevant = np.zeros((len(query), len(database)), bool)
    relevant[:, : len(task.originals)] = task.answers[:, None] == task.originals
    judged = retrieval.Judged(relevant, np.zeros_like(relevant))
    average = retrieval.score(query @ database.T, judged=judged, top=self.top).average_precision
    blocks = list(dict.fromkeys(task.queries))
    metrics = {f"{block}_map": 100.0 * float(average[task.queries == block].mean()) for block in blocks}
    return metrics | ({"map": 100.0 * float(average.mean())} if not self.data else {})

  def _protocol(self, task: Task, *, size: tuple[int, int], database: int, words: list[str]) -> str:
    top = f"first {self.top} ranks" if self.top else "whole ranking"
    return (
      f"copy detection, {task.words}, against {len(task.originals)} originals and {words[0]} ({database} in all), squashed to"
      f" {size[0]}x{size[1]} (bicubic), {self.words()}, {words[1]}, cosine, trapezoidal mAP over the {top}"
    )


def _block(name: str) -> str:
  """original, strong, crops_50 or jpegqual_75 of a path; "" for another file."""
  parts = name.split("/")[:-1]
  if not parts or parts[0] not in (ORIGINALS, *COPYDAYS):
    return ""
  return "_".join(parts)


def _readable(images: Images, index: int) -> bool:
  try:
    return images.pixels(index) is not None
  except ValueError:
    return False
