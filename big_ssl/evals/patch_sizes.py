"""One checkpoint at many patch sizes: how flexible a ViT is (FlexiViT, arXiv 2212.08013, section 3.1 and Figure 3)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from big_ssl.core.method import Trunk
from big_ssl.core.types import Array, UserError
from big_ssl.evals.base import Evaluator, Extract, Report
from big_ssl.evals.knn import Knn


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchSizes(Evaluator):
  """k-NN accuracy in percent of the backbone's "pooled" at each patch size, "top1/8"; any ViT, trained so or not.

  The patch embedding is PI-resized from the stored kernel and the positions are resampled by the model's own rule; the
  images are those of the evaluation view at every size.

  Attributes:
    sizes: of the patches in pixels; each divides the evaluation view.
    k, temperature, max_bank, baselines: see `evals.knn.Knn`; raw pixels are the same at every size and come once.
  """

  sizes: tuple[int, ...] = (8, 16, 32)
  k: int = 20
  temperature: float = 0.07
  max_bank: int = 0
  baselines: bool = False

  def __post_init__(self):
    if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
      raise UserError(f"config.evals.patch_sizes.sizes={self.sizes}: expected sizes in pixels, each once.")
    self._probe(self.sizes[0])  # refuses the other fields

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    for size in self.sizes:
      if any(side % size for side in extract.size):
        height, width = extract.size
        raise UserError(f"config.evals.patch_sizes.sizes={self.sizes}: {size} does not divide the evaluation view of {height}x{width}.")
    metrics, protocol = {}, ""
    for size in self.sizes:
      report = self._probe(size)(extract, mesh=mesh)
      if not report.metrics:
        return Report({}, report.protocol)
      named = {name.partition("_k")[0]: score for name, score in report.metrics.items()}
      metrics |= {name if name.startswith("raw_pixels/") else f"{name}/{size}": score for name, score in named.items()}
      said = f"'pooled' of the backbone at patches of {', '.join(map(str, self.sizes))}"
      protocol = protocol or report.protocol.replace(f"'{PooledAt(size)}'", said)
    return Report(metrics, protocol)

  def _probe(self, size: int) -> Knn:
    settings = {"k": self.k, "temperature": self.temperature, "max_bank": self.max_bank, "baselines": self.baselines}
    return _Probe(**settings, output=PooledAt(size))


class _Probe(Knn):
  path: ClassVar[str] = "config.evals.patch_sizes"


@dataclasses.dataclass(frozen=True)
class PooledAt:
  """The backbone's pooled output at another patch size: an output for `Extract`."""

  patch: int

  def __str__(self) -> str:
    return f"pooled at patches of {self.patch}"

  def __call__(self, trunk: Trunk, images: Array) -> Array:
    at_patch = getattr(trunk.module, "at_patch", None)
    if at_patch is None:
      raise UserError(f"config.evals.patch_sizes: {type(trunk.module).__name__} has one patch size; expected a ViT.")
    return dataclasses.replace(trunk, module=at_patch(self.patch))(images)["pooled"]
