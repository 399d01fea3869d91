"""Retrieval of landmarks: revisited Oxford and Paris (arXiv 1803.11285), as DINO evaluates them (arXiv 2104.14294, table 3)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.evals import descriptors, landmark_ground_truth
from big_ssl.evals.base import Evaluator, Extract, Images, Report
from big_ssl.evals.descriptors import FREE_STRIDE, Describing
from big_ssl.evals.landmark_ground_truth import GroundTruth
from big_ssl.ops import retrieval

LEVELS = ("easy", "medium", "hard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LandmarkRetrieval(Describing, Evaluator):
  """Cosine ranking of a database for each query: mAP and mean precision at k, for easy, medium and hard, in percent.

  Attributes, besides those of `descriptors.Describing`:
    data: a folder with gnd_<name>.pkl (or .json, with its keys) and jpg/<name>.jpg, such as roxford5k; "" is none.
    size: longest side in pixels to which larger images are shrunk; 0 is DINO's for the data: 512 for Paris, else 224.
    scales: factors of that, whose features are summed; () is DINO's: 1, 1/sqrt(2) and 1/2 for Paris, else 1.
    crop_queries: cuts the query to its box, which keeps the scale of its whole image (arXiv 1711.02512, public code);
      official numbers do, DINO's do not.
    k: of the mean precision.
  """

  path: ClassVar[str] = "config.evals.landmark_retrieval"

  data: str = ""
  size: int = 0
  scales: tuple[float, ...] = ()
  crop_queries: bool = False
  k: tuple[int, ...] = (1, 5, 10)

  def __post_init__(self):
    super().__post_init__()
    if self.size < 0:
      raise UserError(f"{self.path}.size={self.size}: expected pixels, or 0 for what the data is.")
    if any(not 0 < factor <= 1 for factor in self.scales):
      raise UserError(f"{self.path}.scales={self.scales}: expected factors above 0, at most 1.")
    if not self.k or min(self.k) < 1:
      raise UserError(f"{self.path}.k={self.k}: expected at least 1.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh  # every process ranks all of it
    if not self.data:
      return Report({}, f"landmark retrieval not computed: give {self.path}.data")
    images = extract.folder(self.data, field=f"{self.path}.data")
    truth = landmark_ground_truth.read(self.data, field=f"{self.path}.data")
    paris = "paris" in truth.name.lower()
    size = self.size or (512 if paris else 224)
    multiple = extract.stride if extract.stride != (1, 1) else (FREE_STRIDE, FREE_STRIDE)
    options = {"multiple": multiple, "scales": self.scales or ((1.0, 1 / math.sqrt(2), 0.5) if paris else (1.0,))}
    metrics, words = {}, []
    for prefix, weights in self.prefixes():
      whiten = self.whitener(extract, resized=functools.partial(_resized, size=size), weights=weights, **options)
      load = self._loader(images, truth, size=size)
      found = self.describe(extract, load=load, count=len(truth.queries + truth.images), weights=weights, **options)
      rows = descriptors.required(found, names=truth.queries + truth.images, where=f"{self.path}.data={self.data}")
      unit = whiten(rows)
      similarity = unit[: len(truth.queries)] @ unit[len(truth.queries) :].T
      metrics |= {prefix + name: value for name, value in self._scores(similarity, truth).items()}
      words.append(whiten.words)
    cut = f"longest side at most {size} (Lanczos), sides cut to multiples of {multiple[0]}x{multiple[1]}"
    counted, level = _answerable(truth), lambda name: name.rpartition("/")[2].partition("_")[0]
    protocol = self._protocol(truth, geometry=cut, descriptor=f"{self.words(options['scales'])}, {words[0]}")
    return Report(metrics, protocol, images={name: counted[level(name)] for name in metrics})

  def _loader(self, images: Images, truth: GroundTruth, *, size: int) -> Callable[[int], np.ndarray]:
    """The resized queries, then the database, by number."""
    there = {images.name(i): i for i in range(len(images))}
    names = truth.queries + truth.images
    missing = sorted({name for name in names if f"jpg/{name}.jpg" not in there})
    if missing:
      first = f"jpg/{missing[0]}.jpg"
      raise UserError(f"{self.path}.data={self.data}: {len(missing)} images are missing, the first is {first}.{nearest(first, there)}")
    unboxed = [q for q, box in zip(truth.queries, truth.boxes, strict=True) if np.isnan(box).any()]
    if self.crop_queries and unboxed:
      raise UserError(f"{self.path}.crop_queries=True: query {unboxed[0]} has no bbx in the ground truth.")

    def load(number: int) -> np.ndarray:
      cropped = self.crop_queries and number < len(truth.queries)
      box = truth.boxes[number] if cropped else None
      return _resized(images.pixels(there[f"jpg/{names[number]}.jpg"]), size=size, box=box)

    return load

  def _scores(self, similarity: np.ndarray, truth: GroundTruth) -> dict[str, float]:
    """Metrics of the levels that have anything to find."""
    metrics = {}
    for level in LEVELS:
      judged = retrieval.revisited(level, easy=truth.easy, hard=truth.hard, junk=truth.junk)
      found = retrieval.score(similarity, judged=judged, ks=self.k)
      counts = ~np.isnan(found.average_precision)
      if counts.any():
        metrics[f"{level}_map"] = 100.0 * float(found.average_precision[counts].mean())
        for k, value in zip(self.k, found.precision[counts].mean(axis=0), strict=True):
          metrics[f"{level}_precision_at_{k}"] = 100.0 * float(value)
    return metrics

  def _protocol(self, truth: GroundTruth, *, geometry: str, descriptor: str) -> str:
    counted = ", ".join(f"{count} {level}" for level, count in _answerable(truth).items())
    queries = "cropped to their boxes at the scale of their image" if self.crop_queries else "not cropped"
    return (
      f"landmark retrieval on {truth.name}, revisited protocol, {len(truth.queries)} queries ({queries}; with something to find:"
      f" {counted}) against {len(truth.images)} images, {geometry}, {descriptor}, cosine, trapezoidal mAP without junk,"
      f" mean precision at {','.join(map(str, self.k))}"
    )


def _answerable(truth: GroundTruth) -> dict[str, int]:
  """Queries with something to find, by level."""
  sets = {"easy": truth.easy, "medium": truth.easy | truth.hard, "hard": truth.hard}
  return {level: int(found.any(axis=1).sum()) for level, found in sets.items()}


def _resized(pixels: np.ndarray, *, size: int, box: np.ndarray | None = None) -> np.ndarray:
  """The picture, or its box, shrunk by what brings the longest side of the whole to `size`."""
  if box is None:
    return descriptors.shrink(pixels, longest=size)
  left, top, right, bottom = (max(round(float(x)), 0) for x in box)
  cut = pixels[top:bottom, left:right]
  if 0 in cut.shape:
    raise UserError(f"{LandmarkRetrieval.path}.crop_queries=True: bbx {box} lies outside of an image of height and width {pixels.shape[:2]}.")
  return descriptors.shrink(cut, longest=max(1, int(size * max(cut.shape[:2]) / max(pixels.shape[:2]))))
