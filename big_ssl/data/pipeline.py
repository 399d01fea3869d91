"""Batches as a pure function of the step: planned in numpy, read and decoded by tf.data, or by plain threads."""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from big_ssl.core.method import ClassBalanced, Inputs, Sequential, Shuffle
from big_ssl.core.resampling import axis_weights
from big_ssl.core.types import UserError
from big_ssl.data import packing, plan
from big_ssl.data.balanced import BalancedPlan, labeled_rows
from big_ssl.data.decode import BadImage, place
from big_ssl.data.source import DataSource


class Pipeline:
  """One stream of batches over a source; `batch(step)` and `iterate` give the same.

  A raw batch holds, for the b rows of this process, "index" int32 [b], the requested keys ("mask" is that of the canvas,
  255 around the image, or of the resident image), and of every view v one of

    crop="device": v + "/box" float32 [b, count, 4] (y0, x0, height, width in pixels), v + "/flip" bool [b, count];
      with "canvas" uint8 [b, S, S, C] and "size" int32 [b, 2], unless `resident` holds the images of the source, which
      then live on the device;
    crop="host": v + "/pixels" uint8 [b, count, h, w, C], already cut; box and flip where `return_box` asks for them.

  Sequential streams have "valid" bool [b]: False past the end, and for an unreadable image that another one replaces.

  Attributes:
    resident: uint8 or uint16 [N, H, W, C], or None.
  """

  def __init__(
    self,
    source: DataSource,
    inputs: Inputs,
    *,
    stream: str = "",
    batch_size: int,
    seed: int,
    rows: tuple[int, int],
    canvas: int,
    crop: Literal["device", "host"] = "device",
    threads: int = 0,
    prefetch: int = 4,
  ):
    self._source, self._inputs = source, inputs
    self._order: plan.Order | None = None
    self._batch_size, self._rows, self._canvas, self._crop = batch_size, rows, canvas, crop
    self._seed = seed if not stream else int(plan.uniforms(seed, stream, np.zeros(1, np.uint64), 1)[0, 0] * 2**31)
    self._threads, self._prefetch = threads or os.cpu_count() or 1, prefetch
    self.resident = source.images if crop == "device" else None
    self._extras = {"label": source.labels} | source.extras
    for key in inputs.keys:
      if self._extras.get(key) is None and not (key == "mask" and source.has_masks):
        have = [k for k, v in self._extras.items() if v is not None]
        raise UserError(
          f"config.data.source: {source.describe()['name']} has no '{key}', which the method needs;"
          f" it has {', '.join(have) or 'images only'}."
        )
    if "mask" in inputs.keys and self.resident is not None:
      self._check_mask(self._extras["mask"], "its masks hold")
    self._balanced = self._balance(inputs.sampler) if isinstance(inputs.sampler, ClassBalanced) else None

  @property
  def shuffles(self) -> bool:
    return isinstance(self._inputs.sampler, Shuffle)

  @property
  def labeled(self) -> np.ndarray | None:
    """The images whose labels a class-balanced stream may use, ascending; None for other streams."""
    return None if self._balanced is None else self._balanced.rows

  # Planning

  def _balance(self, sampler: ClassBalanced) -> BalancedPlan:
    source = self._source
    rows = labeled_rows(sampler, source.labels, name=source.name, class_names=source.class_names)
    return BalancedPlan(sampler, source.labels, rows=rows, seed=self._seed, class_names=source.class_names)

  def _positions(self, step: int) -> np.ndarray:
    return np.int64(step) * self._batch_size + np.arange(*self._rows, dtype=np.int64)

  def _indices(self, positions: np.ndarray) -> np.ndarray:
    if self._balanced is not None:
      return self._balanced.indices(positions)
    return plan.indices(self._inputs.sampler, positions, size=len(self._source), seed=self._seed, order=self._order)

  def _finish(
    self, positions: np.ndarray, wanted: np.ndarray, used: np.ndarray, sizes: np.ndarray, pixels: dict[str, np.ndarray]
  ) -> dict[str, np.ndarray]:
    batch: dict[str, np.ndarray] = {"index": used.astype(np.int32)}
    for key in self._inputs.keys:
      placed = key == "mask" and self.resident is None
      batch[key] = self._masks(used, sizes) if placed else np.asarray(self._extras[key])[used]
    if isinstance(self._inputs.sampler, Sequential):
      batch["valid"] = (positions < len(self._source)) & (wanted == used)
    for view in self._inputs.views:
      if f"{view.name}/pixels" not in pixels or view.return_box:
        boxes = plan.boxes(view, sizes, seed=self._seed, positions=positions)
        batch[f"{view.name}/box"], batch[f"{view.name}/flip"] = boxes.box, boxes.flip
        if view.packing is not None:
          shards = packing.plan(view.packing, boxes.box[:, 0, 2:], seed=self._seed, name=view.name, positions=positions)
          batch |= {f"{view.name}/plan/{key}": value for key, value in packing.as_batch(shards).items()}
    if self.resident is None and self._crop == "device" or any(v.return_box for v in self._inputs.views):
      batch["size"] = sizes.astype(np.int32)
    return batch | pixels

  def _masks(self, used: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """uint8 [b, S, S]: masks where the images are on the canvas, shrunk to the nearest pixel as these are, 255 around them."""
    out = np.full((len(used), self._canvas, self._canvas), 255, np.uint8)
    for row, index, (height, width) in zip(out, used.tolist(), sizes.tolist(), strict=True):
      try:
        mask = self._source.mask(index)
      except BadImage as error:  # its pixels count for nothing
        self._source.report(index, f"mask: {error}")
        continue
      self._check_mask(mask, f"the mask of {self._source.name(index)} holds")
      rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(mask.shape, (height, width), strict=True))
      row[:height, :width] = mask[rows[:, None], columns]
    return out

  def _check_mask(self, mask: np.ndarray, what: str) -> None:
    allowed = {*(self._inputs.mask_labels or range(255)), 255}
    strange = set(np.unique(mask).tolist()) - allowed
    if strange:
      expected = f"{len(allowed)} labels, {', '.join(map(str, sorted(allowed)))[:60]}"
      name = self._source.describe()["name"]
      raise UserError(f"{name}: {what} the label {max(strange)}; expected one of {expected} (config.method.classes, ignore).")

  # Pixels

  def _load(self, index: int) -> tuple[np.ndarray, int, int, int]:
    """Canvas, height, width and the index really read: a bad image is listed, and another one takes its place.

    In a class-balanced stream that is a labeled one of its class. Raises a UserError where none of those tried can be read.
    """
    reason = ""
    if self._balanced is None:
      candidates = (index + plan.replacements(len(self._source))) % len(self._source)
    else:
      candidates = self._balanced.substitutes(index)
    for i in candidates.tolist():
      try:
        placed = place(self._source.pixels(i, canvas=self._canvas), canvas=self._canvas)
        return placed.pixels, placed.height, placed.width, i
      except BadImage as error:
        self._source.report(i, str(error))
        reason = reason or str(error)
    where = f"{self._source.describe()['name']}: no readable image in place of {self._source.name(index)}"
    raise UserError(f"{where}: none of {len(candidates)} can be read, the first because: {reason}.")

  def _cut(self, canvas: np.ndarray, height: int, width: int, position: int) -> list[np.ndarray]:
    """crop="host": the views of one image, [count, h, w, C] each, by the same matrices as on the device."""
    sizes = np.array([[height, width]])
    image = np.moveaxis(canvas[:height, :width], -1, 0).astype(np.float32)  # [C, H, W]
    out = []
    for view in self._inputs.views:
      boxes = plan.boxes(view, sizes, seed=self._seed, positions=np.array([position]))
      box, flip = boxes.box[0], boxes.flip[0]
      limit = (height, width) if view.crop in ("center", "scaled") else (None, None)
      kwargs: dict[str, Any] = {"interpolation": view.interpolation, "antialias": view.antialias, "xp": np}
      rows = axis_weights(box[:, 0], box[:, 2], size=view.shape[0], canvas=height, limit=limit[0], **kwargs)
      columns = axis_weights(
        box[:, 1], box[:, 3], size=view.shape[1], canvas=width, limit=limit[1], flip=flip, **kwargs
      )
      cut = np.stack([_resample(image, r, c) for r, c in zip(rows, columns, strict=True)])
      out.append(np.clip(cut + 0.5, 0, np.iinfo(canvas.dtype).max).astype(canvas.dtype))
    return out

  def _element(self, position: int, index: int) -> tuple[list[np.ndarray], int, int, int]:
    canvas, height, width, used = self._load(index)
    pixels = self._cut(canvas, height, width, position) if self._crop == "host" else [canvas]
    return pixels, height, width, used

  @property
  def _pixel_keys(self) -> list[str]:
    return [f"{v.name}/pixels" for v in self._inputs.views] if self._crop == "host" else ["canvas"]

  def _resident_batch(self, step: int) -> dict[str, np.ndarray]:
    positions = self._positions(step)
    indices = self._indices(positions)
    sizes = np.broadcast_to(np.array(self.resident.shape[1:3]), (len(indices), 2))
    return self._finish(positions, indices, indices, sizes, {})

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This process's rows of the batch of `step`."""
    return next(self._batches(step, step + 1))[1]

  def _collect(self, positions: np.ndarray, indices: np.ndarray, elements: list) -> dict[str, np.ndarray]:
    sizes = np.array([(h, w) for _, h, w, _ in elements])
    used = np.array([u for *_, u in elements])
    pixels = {key: np.stack([e[0][i] for e in elements]) for i, key in enumerate(self._pixel_keys)}
    return self._finish(positions, indices, used, sizes, pixels)

  def spec(self) -> dict[str, np.ndarray]:
    """Zeros in the shapes of the rows of the GLOBAL batch, without reading an image; for tracing."""
    b, views = self._batch_size, self._inputs.views
    out: dict[str, np.ndarray] = {"index": np.zeros(b, np.int32)}
    for key in self._inputs.keys:
      if key == "mask" and self.resident is None:
        out[key] = np.zeros((b, self._canvas, self._canvas), np.uint8)
        continue
      values = np.asarray(self._extras[key])
      out[key] = np.zeros((b, *values.shape[1:]), values.dtype)
    if isinstance(self._inputs.sampler, Sequential):
      out["valid"] = np.zeros(b, bool)
    dtype = np.uint8 if self._source.images is None else self._source.images.dtype
    for v in views:
      if self._crop == "host":
        out[f"{v.name}/pixels"] = np.zeros((b, v.count, *v.shape, self._source.channels), dtype)
      if self._crop != "host" or v.return_box:
        out[f"{v.name}/box"], out[f"{v.name}/flip"] = np.ones((b, v.count, 4), np.float32), np.zeros((b, v.count), bool)
      if v.packing is not None:
        positions = np.arange(b)
        shards = packing.plan(v.packing, np.ones((b, 2), np.int64), seed=0, name=v.name, positions=positions)
        out |= {f"{v.name}/plan/{key}": np.zeros_like(value) for key, value in packing.as_batch(shards).items()}
    if self.resident is None and self._crop == "device":
      out["canvas"] = np.zeros((b, self._canvas, self._canvas, self._source.channels), dtype)
    if self.resident is None and self._crop == "device" or any(v.return_box for v in views):
      out["size"] = np.ones((b, 2), np.int32)
    return out

  def iterate(self, start: int, stop: int, *, order: plan.Order | None = None) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(step, batch) for start <= step < stop, read ahead; `order` overrides the sampler (see `plan.indices`)."""
    pipeline = copy.copy(self)
    pipeline._order = order
    yield from _ahead(pipeline._batches(start, stop), self._prefetch)

  def _batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    if self.resident is not None:
      return ((step, self._resident_batch(step)) for step in range(start, stop))
    return self._tensorflow(start, stop) if self._source.encoded and _has_tensorflow() else self._threaded(start, stop)

  def _threaded(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    with ThreadPoolExecutor(self._threads) as pool:
      for step in range(start, stop):
        positions = self._positions(step)
        indices = self._indices(positions)
        yield (
          step,
          self._collect(positions, indices, list(pool.map(self._element, positions.tolist(), indices.tolist()))),
        )

  def _tensorflow(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    from big_ssl.data.fast import decoded

    rows = self._rows[1] - self._rows[0]
    plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def planned() -> Iterator[tuple[np.ndarray, np.ndarray]]:
      for step in range(start, stop):
        positions = self._positions(step)
        plans[step] = (positions, self._indices(positions))
        yield plans[step]

    failed: list[UserError] = []

    def slow(index: np.ndarray) -> tuple[np.ndarray, np.int64, np.int64, np.int64]:
      try:
        canvas, height, width, used = self._load(int(index))
      except UserError as error:  # raised below: tensorflow would write its own trace to the terminal
        failed.append(error)
        return np.zeros((self._canvas, self._canvas, self._source.channels), np.uint8), np.int64(1), np.int64(1), np.int64(index)
      return canvas, np.int64(height), np.int64(width), np.int64(used)

    def cut(canvas: np.ndarray, height: np.ndarray, width: np.ndarray, position: np.ndarray) -> list[np.ndarray]:
      return self._cut(canvas, int(height), int(width), int(position))

    dataset = decoded(
      planned,
      read=lambda i: self._source.read(int(i)),
      slow=slow,
      cut=cut if self._crop == "host" else None,
      views=[(v.count, *v.shape) for v in self._inputs.views],
      rows=rows,
      canvas=self._canvas,
      channels=self._source.channels,
      threads=self._threads,
    )
    iterator = dataset.as_numpy_iterator()
    try:
      for step in range(start, stop):
        *pixels, height, width, used = next(iterator)
        if failed:
          raise failed[0]
        positions, indices = plans.pop(step)
        sizes = np.stack([height, width], axis=1)
        yield step, self._finish(positions, indices, used, sizes, dict(zip(self._pixel_keys, pixels, strict=True)))
    finally:
      del iterator  # before the functions that it calls


def _resample(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
  """rows [h, H] @ image [C, H, W] @ columns [w, W].T as [h, w, C], without the pixels that no weight touches."""
  y, x = (np.flatnonzero(weights.any(axis=0)) for weights in (rows, columns))
  y, x = slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)
  cut = np.matmul(np.matmul(rows[:, y], image[:, y, x]), columns[:, x].T)
  return np.moveaxis(cut, 0, -1)


def _has_tensorflow() -> bool:
  try:
    import tensorflow  # noqa: F401
  except ImportError:
    return False
  return True


def _ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
  """Draws `items` in a thread, up to `depth` ahead; an exception surfaces where the item would have."""
  ready: queue.Queue = queue.Queue(max(depth, 1))
  stop = threading.Event()

  def put(kind: str, value: Any) -> None:
    while not stop.is_set():
      try:
        return ready.put((kind, value), timeout=0.1)
      except queue.Full:
        continue

  def draw() -> None:
    try:
      for item in items:
        put("item", item)
        if stop.is_set():
          return
      put("end", None)
    except BaseException as error:  # handed to the consumer, which raises it
      put("error", error)

  thread = threading.Thread(target=draw, daemon=True)
  thread.start()
  try:
    while True:
      kind, value = ready.get()
      if kind == "error":
        raise value
      if kind == "end":
        return
      yield value
  finally:
    stop.set()
    thread.join(timeout=10)  # a thread inside tensorflow when the interpreter goes down would abort it
