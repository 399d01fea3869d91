"""What happened in a run, in words."""

from __future__ import annotations

import re
import statistics

from big_ssl.report.collect import BASELINES, Evaluation, Record

_TITLES = {
  **{"knn": "k-NN", "linear": "linear probe", "map": "mAP", "health": "features", "lowshot": "low-shot", "nmi": "NMI", "ari": "ARI"},
  **{"lr": "learning rate", "std": "deviation of the embeddings", "rank": "main directions that embeddings fill", "mfu": "share of the peak FLOP/s"},
  **{"j": "J", "f": "F", "j_and_f": "J and F", "miou": "mIoU", "images_per_sec": "images per second", "data_wait_fraction": "share of the time waiting for data"},
}
# Scores that evaluators give in percent: by how a part of their name starts, by what is in it, or by a whole part.
_PERCENT = (
  *("top1", "top5", "accuracy", "nmi", "ari", "map", "recall", "miou", "mean_iou", "pixel", "mean_accuracy", "mean_dice"),
  *("jaccard", "worst_group", "disparity", "shape_bias"),
)
_PERCENT_INSIDE = ("_map", "precision_at_")
_PERCENT_PARTS = ("lr", "iou", "group", "j", "f", "j_and_f")
_STATES = {
  "training": "still training",
  "finished": "",
  "stopped": "stopped before the end; the same command goes on",
  "failed": "training failed",
  "evaluated": "evaluated, not trained here",
}


def title(name: str) -> str:
  """An evaluator's or a number's name as it is read."""
  if found := re.fullmatch(r"top(\d+)_k(\d+)", name):
    return f"top-{found[1]}, k={found[2]}"
  if found := re.fullmatch(r"top(\d+)/(\d+)", name):
    return f"top-{found[1]} at {found[2]}"
  if name.startswith("lr/"):  # a head of a sweep
    return "learning rate " + name.removeprefix("lr/").replace("_wd/", ", weight decay ")
  return _TITLES.get(name, re.sub(r"_map$", "_mAP", name).replace("_", " "))


def is_percent(score: str) -> bool:
  *before, last = score.split("/")
  if last == "n" and "group" in before:  # the images of the group
    return False
  known = lambda part: part.startswith(_PERCENT) or part in _PERCENT_PARTS or any(inside in part for inside in _PERCENT_INSIDE)
  return any(map(known, (*before, last)))


def value(score: str, number: float | None) -> str:
  if number is None:
    return "not finite"
  return f"{number:.1f} %" if is_percent(score) else f"{number:.4g}"


def method(record: Record) -> str:
  name = str(record.config.get("method", {}).get("name", "")).rpartition(".")[2]
  return record.facts.get("method") or (name.upper() if len(name) <= 4 else name.capitalize()) or "Run"


def data(record: Record) -> str:
  described = record.facts.get("data", {}).get("train", {}).get("name")
  return str(described or record.config.get("data", {}).get("source", "sprites")).removesuffix("/train")


def headline(record: Record) -> str:
  """One sentence: the method, its steps, the data, the best known score and the verdict."""
  total, parts = record.facts.get("total_steps"), []
  steps = f"{record.last_step:,}{f' of {total:,}' if total and total != record.last_step else ''} steps"
  examples = record.facts.get("examples")
  parts.append(f"{method(record)}, {steps} on {data(record)}{f' ({examples:,} images)' if examples else ''}")
  if (best := _headline_score(record)) is not None:
    parts.append(_score(*best))
  status = record.facts.get("status", "")
  ending = ["" if status == "evaluated" and record.lines else _STATES.get(status, "")]
  state = record.verdicts[-1].state if record.verdicts else ""
  ending.append(f"health: {state}" if state not in ("", "healthy") else state)
  return ": ".join(parts) + "".join(f"; {e}" for e in ending if e) + "."


def _headline_score(record: Record) -> tuple[Evaluation, str] | None:
  """The first score in percent, of the evaluations in their order; else the effective rank of the features."""
  for evaluation in sorted(record.latest, key=lambda e: not any(map(is_percent, e.own))):
    for start in ("top1", "map", "miou", "accuracy", "effective_rank"):
      found = [k for k in evaluation.own if k.startswith(start)]
      if found:
        return evaluation, found[0]
  return None


def _score(evaluation: Evaluation, score: str) -> str:
  of = "effective rank of the features" if score == "effective_rank" else title(evaluation.name)
  text = f"{of} {value(score, evaluation.scores[score])}"
  against = [
    f"{value(score, found)} {'at' if prefix == 'random_init/' else 'for'} {words}"
    for prefix, words in BASELINES.items()
    if (found := evaluation.baseline(prefix, score)) is not None
  ]
  return f"{text} against {' and '.join(against)}" if against else text


def findings(record: Record) -> list[str]:
  """Further sentences: health, labels, speed, data problems."""
  found = [_health(record), _loss(record), _labels(record), _speed(record), _problems(record)]
  if record.facts.get("message"):
    found.insert(0, record.facts["message"])
  return [sentence for sentence in found if sentence]


def _health(record: Record) -> str:
  if not record.verdicts:
    return ""
  bad = [v for v in record.verdicts if v.state != "healthy"]
  if not bad:
    return f"Health: healthy in all {len(record.verdicts)} log lines."
  last, now = bad[-1], record.verdicts[-1]
  said = f" {last.message[0].upper()}{last.message[1:]}" if last.message else ""
  if now.state == "healthy":
    since = next(v.step for v in record.verdicts if v.step > last.step)
    before = f"{len(bad)} of {len(record.verdicts)} log lines had a finding, the last at step {last.step:,}"
    return f"Health: healthy since step {since:,}; before, {before}{f':{said}' if said else '.'}"
  return f"Health: {now.state} at the last log line.{said}{f' {now.hint}' if now.hint else ''}"


def _loss(record: Record) -> str:
  values = [v for _, v in record.series("loss") if v is not None]
  return f"The loss went from {values[0]:.4g} to {values[-1]:.4g}." if len(values) > 1 else ""


def _labels(record: Record) -> str:
  labeled = record.facts.get("data", {}).get("labels")
  if labeled is not False:
    return ""
  ranks = [v for _, v in record.series("rank") if v is not None]
  # "Main": of the strongest few alone; the effective rank of an evaluation counts weak ones too, and is often ten times it.
  rank = f" Embeddings of a batch fill {ranks[-1]:.1f} main directions ({ranks[0]:.1f} at first)." if ranks else ""
  copies = any(e.name == "copy_detection" and e.scores for e in record.latest)
  asked = " Copy detection asks how well altered copies of an image find it again." if copies else ""
  return (
    f"The images have no labels, so nothing here is an accuracy.{asked}{rank} Whether the features are of use is seen in the"
    " pictures: nearest neighbors should show the same things, not the same colors."
  )


def _speed(record: Record) -> str:
  rates = [v for _, v in record.series("images_per_sec") if v]
  waits = [v for _, v in record.series("data_wait_fraction") if v is not None]
  if not rates:
    return ""
  wait = f", {statistics.fmean(waits):.0%} of the time waiting for data" if waits else ""
  return f"Speed: {statistics.median(rates):,.0f} images/s{wait}."


def _problems(record: Record) -> str:
  count = record.facts.get("problem_count", 0)
  return f"{count:,} image{'s' if count != 1 else ''} could not be read and {'were' if count != 1 else 'was'} skipped; they are listed below." if count else ""
