"""Accuracy against the number of tokens, at native aspect: k-NN at several budgets (NaViT, arXiv 2307.06304, section 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from big_ssl.core.packing import target_grid
from big_ssl.core.types import Array, UserError
from big_ssl.evals.base import Evaluator, Extract, Features, Images, Report, Weights
from big_ssl.evals.descriptors import loaded
from big_ssl.evals.knn import Knn
from big_ssl.evals.windows import filled, resize

PATH = "config.evals.token_budgets"
MOST_WAITING = 2**30  # bytes of images that wait for others of their grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenBudgets(Evaluator):
  """k-NN accuracy in percent with at most so many tokens per image, "top1/64", and with more than five classes "top5/64".

  An image, uncropped, is resized to the largest grid of patches of its aspect that a budget allows (NaFlex's rule,
  `core.packing.target_grid`), enlarged where it is smaller. Training images are seen at the budget of the held-out ones.
  Any backbone of patches that takes rectangles can be evaluated; images of one grid run together, unmasked, which for a
  NaViT is the same as one image per padded sequence. There is one compilation per grid.

  Attributes:
    output: which output of the BACKBONE is read, [N, ...]; heads and what a method makes of it are not seen.
    budgets: tokens; those of the public code.
    k, temperature: see `evals.knn.Knn`.
    max_bank, max_queries: use only so many training and held-out images, drawn once and for all; 0 is all.
    batch_size: images at a time.
    baselines: also report the same protocol on the random initialization.
  """

  budgets: tuple[int, ...] = (64, 128, 196, 256, 576)
  k: int = 20
  temperature: float = 0.07
  max_bank: int = 20000
  max_queries: int = 0
  batch_size: int = 32
  baselines: bool = False

  def __post_init__(self):
    if not self.budgets or min(self.budgets) < 1 or len(set(self.budgets)) < len(self.budgets):
      raise UserError(f"{PATH}.budgets={self.budgets}: expected numbers of tokens, at least 1, each once.")
    for name, least in (("k", 1), ("max_bank", 0), ("max_queries", 0), ("batch_size", 1)):
      if getattr(self, name) < least:
        raise UserError(f"{PATH}.{name}={getattr(self, name)}: expected at least {least}.")
    if self.temperature <= 0:
      raise UserError(f"{PATH}.temperature={self.temperature}: expected a positive number.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    if extract.stride == (1, 1):
      raise UserError(f"{PATH}: needs a backbone of patches (config.model.patch), such as navit or vit; this one has no tokens to count.")
    rows = {split: _labeled(extract.images(split), most=m) for split, m in (("train", self.max_bank), ("eval", self.max_queries))}
    if not all(map(len, rows.values())):
      return Report({}, "token budgets not computed: the data has no labels")
    metrics, protocol, queries = {}, "", 0
    kinds: tuple[tuple[str, Weights], ...] = (("", "current"), ("random_init/", "random"))
    for prefix, weights in kinds if self.baselines else kinds[:1]:
      seen = {split: self._see(extract, split, rows[split], weights) for split in rows}
      if len(seen["train"].rows) < self.k:
        raise UserError(f"{PATH}.k={self.k}: more neighbors than the {len(seen['train'].rows)} images of the bank.")
      for i, budget in enumerate(self.budgets):
        found = self._neighbors({split: one.features(i) for split, one in seen.items()}, mesh)
        metrics |= {f"{prefix}{name.partition('_')[0]}/{budget}": value for name, value in found.items()}
      queries, protocol = len(seen["eval"].rows), protocol or self._protocol(seen, extract.stride)
    return Report(metrics, protocol, images=queries)

  def _neighbors(self, features: dict[str, Features], mesh: Any) -> dict[str, float]:
    evaluator = Knn(k=self.k, temperature=self.temperature, output=self.output)
    return evaluator(lambda split, **kwargs: features[split], mesh=mesh).metrics

  # Features

  def outputs(self, trunk: Any, images: Array) -> Array:
    """[N, D] of normalized images [N, H, W, C]."""
    out = trunk(images)
    if getattr(out.get(self.output), "ndim", 0) < 2:
      have = [name for name, value in out.items() if getattr(value, "ndim", 0) > 1]
      raise UserError(f"{PATH}.output={self.output!r}: the backbone has no such output; it has {', '.join(have)}.")
    return out[self.output].reshape(len(images), -1)

  def _see(self, extract: Extract, split: str, rows: np.ndarray, weights: Weights) -> _Seen:
    """Features of some images at every budget; images that cannot be read are left out."""
    images, waiting, kept = extract.images(split), {}, []
    found: list[dict[int, np.ndarray]] = [{} for _ in self.budgets]
    shapes: list[list[tuple[int, int]]] = [[] for _ in self.budgets]

    def flush(group: list[tuple[int, int, np.ndarray]]) -> None:
      batch = filled(np.stack([image for *_, image in group]), self.batch_size)
      for (i, row, _), one in zip(group, extract.apply(self.outputs, batch, weights=weights), strict=False):
        found[i][row] = np.asarray(one, np.float32)

    sized = loaded(lambda i: _resized(images.pixels(int(rows[i])), stride=extract.stride, budgets=self.budgets), len(rows))
    for row, each in zip(rows.tolist(), sized, strict=True):
      if each is None:
        continue
      kept.append(row)
      for i, image in enumerate(each):
        shapes[i].append(image.shape[:2])
        waiting.setdefault(image.shape, []).append((i, row, image))
        if len(waiting[image.shape]) == self.batch_size:
          flush(waiting.pop(image.shape))
      while sum(len(group) * group[0][-1].nbytes for group in waiting.values()) > MOST_WAITING:
        flush(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
    for group in waiting.values():
      flush(group)
    if not kept:
      raise UserError(f"{PATH}: none of {len(rows)} {split} images can be read.")
    return _Seen(images, np.array(kept), len(rows), found, shapes)

  # Words

  def _protocol(self, seen: dict[str, _Seen], stride: tuple[int, int]) -> str:
    bank, queries = seen["train"], seen["eval"]
    area = stride[0] * stride[1]
    used = ", ".join(
      f"{np.mean([h * w for h, w in shapes]) / area:.1f} tokens of {budget} in {len(set(shapes))} grids"
      for budget, shapes in zip(self.budgets, queries.shapes, strict=True)
    )
    unreadable = sum(one.wanted - len(one.rows) for one in seen.values())
    return (
      f"token budgets: whole images resized (antialiased bilinear, enlarged where smaller) to the largest grid of"
      f" {stride[0]}x{stride[1]} px patches of their aspect, training images too; held-out images have {used};"
      f" weighted k-NN, cosine, k={self.k}, T={self.temperature:g}, output '{self.output}' of the backbone, l2-normalized,"
      f" bank {len(bank.rows)} of {len(bank.images)} training images, {len(queries.rows)} of {len(queries.images)} held-out queries"
      f"{f', {unreadable} images cannot be read' if unreadable else ''}, {queries.name}"
    )


@dataclasses.dataclass(frozen=True)
class _Seen:
  """Images of a split at every budget: the rows that can be read out of `wanted`, vectors by row, heights and widths in pixels."""

  images: Images
  rows: np.ndarray
  wanted: int
  found: list[dict[int, np.ndarray]]
  shapes: list[list[tuple[int, int]]]

  @property
  def name(self) -> str:
    return self.images.describe()["name"]

  def features(self, budget: int) -> Features:
    """At the budget of this number."""
    vectors = np.stack([self.found[budget][row] for row in self.rows.tolist()])
    return Features(vectors, np.asarray(self.images.labels)[self.rows].astype(np.int32), self.rows, source=self.name)


def _labeled(images: Images, *, most: int) -> np.ndarray:
  """Ascending rows of at most `most` images with a label, drawn: folders are sorted by class. 0 is all."""
  rows = np.flatnonzero(np.asarray(images.labels) >= 0) if images.labels is not None else np.zeros(0, np.int64)
  return rows if not most or len(rows) <= most else np.sort(np.random.default_rng(0).permutation(rows)[:most])


def _resized(image: np.ndarray, *, stride: tuple[int, int], budgets: tuple[int, ...]) -> list[np.ndarray]:
  """The image at each budget, float32 in [0, 1]."""
  sizes = np.broadcast_to(image.shape[:2], (len(budgets), 2))
  grids = target_grid(sizes, patch=stride, max_tokens=np.array(budgets))
  image = image.astype(np.float32) / np.iinfo(image.dtype).max
  return [resize(image, shape=(int(h) * stride[0], int(w) * stride[1])) for h, w in grids]
