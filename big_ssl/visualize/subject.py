"""What is looked at: a run at a checkpoint, and the images of one split or of a folder."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from big_ssl import setup
from big_ssl.core import config as config_lib
from big_ssl.core.logger import Logger
from big_ssl.core.types import PyTree, UserError, sides
from big_ssl.data.decode import BadImage
from big_ssl.data.opening import open_folder
from big_ssl.data.source import DataSource
from big_ssl.evals.base import Features, check_finite, unit
from big_ssl.evaluate import Extractor
from big_ssl.models import dense
from big_ssl.start import saved_state
from big_ssl.visualize.drawing import resized

# The maps are drawn at twice the side of the evaluation view, as DINO's script does (480 for 224).
ENLARGED = 2


@dataclasses.dataclass(frozen=True)
class Chosen:
  """An image by its row in the source, and its decoded pixels [h, w, C]."""

  row: int
  pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user may ask of every kind of picture.

  Attributes:
    count: images (rows or columns of the picture; classes of images for prototypes).
    size: height and width that the backbone sees; () keeps the aspect at `ENLARGED` times the evaluation view.
    layer: block whose attention is drawn, from 0, or from the end.
    clusters: of k-means, for a method without prototypes; 0 chooses.
  """

  count: int = 8
  size: tuple[int, ...] = ()
  layer: int = -1
  clusters: int = 0


class Subject:
  """The images of `run.sources["eval"]` under the weights of `extract.state`."""

  def __init__(self, run: setup.Run, extract: Extractor):
    self.run, self.extract = run, extract

  def of_folder(self, folder: str) -> Subject:
    """The same backbone on the images of a folder, of any size, at any depth; labels are not looked for.

    Raises:
      UserError: no such folder, or no image in it.
    """
    source = open_folder(folder, channels=self.run.sources["train"].channels, field="--images")
    run = dataclasses.replace(self.run, sources=self.run.sources | {"eval": source})
    extract = Extractor(run)
    extract.state = self.extract.state
    return Subject(run, extract)

  @property
  def images(self) -> DataSource:
    return self.run.sources["eval"]

  @functools.cached_property
  def features(self) -> Features:
    """Pooled features of all images that can be read, with rows of unit length."""
    found = self.extract("eval")
    check_finite(found, name="pooled")
    return dataclasses.replace(found, features=unit(found.features))

  def class_name(self, label: int) -> str:
    names = self.images.class_names
    return "" if label < 0 else names[label] if label < len(names) else f"class {label}"

  def title(self, row: int) -> str:
    """The class of an image, or its name in the source."""
    labels = self.images.labels
    return self.class_name(int(labels[row])) if labels is not None else self.images.name(row)

  def pixels(self, row: int) -> np.ndarray | None:
    """None for an image that cannot be read."""
    try:
      return self.images.pixels(row)
    except BadImage:
      return None

  def choose(self, count: int) -> list[Chosen]:
    """Images from all over the source, which is often sorted by class; the next one where one cannot be read.

    Raises:
      UserError: none of them can be read.
    """
    total, taken = len(self.images), {}
    for wanted in np.linspace(0, total - 1, min(count, total)).astype(int):
      tries = [(int(wanted) + i) % total for i in range(min(16, total))]
      found = next(((row, p) for row in tries if row not in taken and (p := self.pixels(row)) is not None), None)
      taken |= {} if found is None else {found[0]: found[1]}
    if not taken:
      raise UserError(f"{self.images.describe()['name']}: none of the images tried can be read.")
    return [Chosen(row, pixels) for row, pixels in taken.items()]

  def maps(self, function: Callable[..., PyTree], images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`function(trunk, images)` row by row, of images [h, w, C] in [0, 1] that may differ in size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
      groups.setdefault(image.shape, []).append(i)
    out: list[Any] = [None] * len(images)
    for rows in groups.values():
      for i, value in zip(rows, self.extract.apply(function, np.stack([images[r] for r in rows])), strict=True):
        out[i] = value
    return out

  def seen(self, pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The image as the backbone gets it, float32 in [0, 1], in whole patches."""
    module = self.run.method.model
    steps = dense.stride(module)
    if size:
      wanted = size
    else:
      shorter = ENLARGED * min(sides(self.run.method.eval_view().size))
      wanted = [side * shorter / min(pixels.shape[:2]) for side in pixels.shape[:2]]
      # A panorama is squeezed: 4 to 1 at most.
      wanted = [min(side, 4 * shorter) for side in wanted]
    height, width = (max(step, round(side / step) * step) for side, step in zip(wanted, steps, strict=True))
    return resized(pixels, height=height, width=width)


def open_run(
  workdir: pathlib.Path,
  *,
  spec: str = "",
  overrides: dict[str, str] | None = None,
  step: int | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Subject:
  """The newest (or one) checkpoint of a work directory, and its evaluation images.

  Args:
    workdir: of the run, whose config.json is read.
    spec: a config file to be read instead.
    overrides: of the config, such as {"data.source": "photos"} where the data has moved.
    step: of the checkpoint.
    devices: to run on; all where None.

  Raises:
    UserError: a work directory without config, or without checkpoint and no `config.init_from`.
  """
  if not spec and not workdir.is_dir():
    raise UserError(f"--workdir={workdir}: no such folder.")
  config, _ = config_lib.load(spec, overrides) if spec else config_lib.read(workdir, overrides)
  if not (workdir / "checkpoints").is_dir() and config.init_from is None:
    raise UserError(f"--workdir={workdir}: no checkpoint in it; expected the work directory of a run.")
  # A picture needs none of the devices that training needed, and no evaluation.
  run = setup.make_run(dataclasses.replace(config, mesh=config_lib.MeshConfig(), evals={}), devices=devices)
  logger = Logger(workdir, total_steps=run.total_steps, examples_per_epoch=run.examples, batch_size=config.batch_size, terminal=False)
  state = saved_state(run, workdir, logger, step=step)
  extract = Extractor(run)
  extract.state = state
  return Subject(run, extract)

