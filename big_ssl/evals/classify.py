"""What a classifier that was trained with the backbone says about the held-out images: fine-tuning, supervised training."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from big_ssl.core.types import UserError
from big_ssl.evals.base import Evaluator, Extract, Features, Report, labeled, take
from big_ssl.ops.group_scores import masked_prediction, wilson

PATH = "config.evals.classify"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Evaluator):
  """Accuracy in percent of the logits of a run's own head on the held-out images.

  Reports "top1" with its interval of 95 % ("top1_low", "top1_high"), with more than five classes "top5", and where the
  held-out images have fewer classes than the head also "top1_masked", among these classes alone (ImageNet-A and -R;
  arXiv 2202.08360). Of equal logits the class of the smaller number counts.

  Attributes:
    output: the logits.
    label_map: entry i is the head's class of held-out label i, or -1 to leave its images out; () is the same classes.
  """

  output: str = "logits"
  label_map: tuple[int, ...] = ()

  def __post_init__(self):
    if any(c < -1 for c in self.label_map):
      raise UserError(f"{PATH}.label_map: {min(self.label_map)} is no class; expected classes of the head, or -1.")

  def __call__(self, extract: Extract, *, mesh: Any = None) -> Report:
    del mesh
    try:
      found = labeled(extract("eval", output=self.output), name=self.output)
    except KeyError as error:
      raise UserError(f"{PATH}.output={self.output!r}: {error.args[0]}; only a run with a classifier can be scored so.") from None
    if found is None:
      return Report({}, "classification not computed: the held-out data has no labels")
    held_out = self._mapped(found)
    logits, labels = held_out.features, held_out.labels
    classes = logits.shape[1]
    if labels.max() >= classes:
      raise UserError(f"{PATH}.label_map={self.label_map or '()'}: held-out label {labels.max()}, but the head has classes 0 to {classes - 1}.")
    top1 = wilson(int(np.sum(np.argmax(logits, axis=1) == labels)), count=len(labels))
    metrics = {"top1": top1.percent, "top1_low": top1.low, "top1_high": top1.high}
    if classes > 5:
      metrics["top5"] = 100.0 * float(np.mean(_rank(logits, labels) < 5))
    present = np.unique(labels)
    if len(present) < classes:
      metrics["top1_masked"] = 100.0 * float(np.mean(masked_prediction(logits, present=present) == labels))
    return Report(metrics, self._protocol(found, held_out, classes), images=len(labels))

  def _mapped(self, found: Features) -> Features:
    """The images with labels of the head's classes."""
    if not self.label_map:
      return found
    if found.labels.max() >= len(self.label_map):
      raise UserError(
        f"{PATH}.label_map: {len(self.label_map)} entries, but the held-out images have label {found.labels.max()};"
        " expected an entry for each label, -1 to leave its images out."
      )
    labels = np.array(self.label_map, np.int32)[found.labels]
    if not np.any(labels >= 0):
      raise UserError(f"{PATH}.label_map: every label of the held-out images is -1, none is left.")
    return take(dataclasses.replace(found, labels=labels), labels >= 0)

  def _protocol(self, found: Features, held_out: Features, classes: int) -> str:
    source = f", {found.source}" if found.source else ""
    present = len(np.unique(held_out.labels))
    masked = f"; masked: only the {present} classes of the held-out images" if present < classes else ""
    return (
      f"the run's own classifier of {classes} classes, output '{self.output}' of the evaluation view without augmentation,"
      f" {len(held_out.labels)} of {len(found.labels)} labeled held-out images of {present} classes"
      f"{', mapped' if self.label_map else ''}{masked}; 95 % Wilson interval{source}"
    )


def _rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """[N] how many classes come before the label's: larger logits, and equal ones of smaller number."""
  own = np.take_along_axis(logits, labels[:, None], axis=1)
  before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
  return before.sum(axis=1)
