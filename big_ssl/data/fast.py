"""Reading and decoding with tf.data: plain JPEGs in C++ threads, everything else by the Pillow path, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from big_ssl.data.decode import BadImage, is_plain_jpeg


def tensorflow() -> Any:
  """The module, with the GPUs hidden from it: it would take all of their memory. Raises `ImportError`."""
  import tensorflow as tf

  try:
    tf.config.set_visible_devices([], "GPU")
  except RuntimeError:  # the program has used tensorflow before, on devices of its own choice
    pass
  return tf


def decoded(
  planned: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]],
  *,
  read: Callable[[int], bytes],
  slow: Callable[[np.ndarray], tuple],
  cut: Callable[..., list[np.ndarray]] | None,
  views: list[tuple[int, int, int]],
  rows: int,
  canvas: int,
  channels: int,
  threads: int,
) -> Any:
  """A tf.data.Dataset of (pixels ..., height [b], width [b], used index [b]).

  Other formats, Exif and CMYK take the slow path at once. A damaged JPEG raises in the fast one, is dropped by
  `ignore_errors` inside its own one-element data set, and the slow path takes its place there: positions never shift.

  Args:
    planned: yields (positions [rows], indices [rows]) per batch.
    read: index -> encoded bytes.
    slow: index -> (canvas, height, width, used index).
    cut: (canvas, height, width, position) -> pixels of each view, or None to return the canvas.
    views: (count, height, width) of each view, for `cut`.
    rows: b, rows of this process.
    canvas: side in pixels.
    channels: of the canvas.
    threads: that decode.
  """
  tf = tensorflow()

  def plain(index: np.ndarray) -> bytes:
    """The bytes of a plain JPEG, b"" for everything else: raising for each PNG of a folder would fill the log."""
    try:
      data = read(int(index))
    except BadImage:
      return b""
    return data if channels in (1, 3) and is_plain_jpeg(data) else b""

  def first(position, index):
    data = tf.ensure_shape(tf.numpy_function(plain, [index], tf.string), [])
    image, height, width, used = tf.cond(
      tf.strings.length(data) > 0, lambda: fast(data, index), lambda: fallback(index)
    )
    return image, height, width, used, position

  def fast(data, index):
    longest = tf.reduce_max(tf.io.extract_jpeg_shape(data)[:2])
    power = tf.reduce_sum(tf.cast(longest // canvas >= [2, 4, 8], tf.int32))  # the DCT scales by 1, 1/2, 1/4 or 1/8
    decode = lambda ratio: tf.io.decode_jpeg(
      data, channels=channels, ratio=ratio, dct_method="INTEGER_ACCURATE"
    )
    image = tf.switch_case(power, [lambda r=2**p: decode(r) for p in range(4)])
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    longest = tf.maximum(height, width)

    def shrink():
      scale = canvas / longest
      size = [tf.maximum(1, tf.cast(tf.round(tf.cast(s, tf.float64) * scale), tf.int32)) for s in (height, width)]
      resized = tf.image.resize(image, size, method="bilinear", antialias=True)
      return tf.cast(tf.clip_by_value(resized + 0.5, 0, 255), tf.uint8)

    image = tf.cond(longest > canvas, shrink, lambda: image)
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    padded = tf.pad(image, [[0, canvas - height], [0, canvas - width], [0, 0]])
    padded = tf.ensure_shape(padded, [canvas, canvas, channels])
    return padded, tf.cast(height, tf.int64), tf.cast(width, tf.int64), index

  def fallback(index):
    image, height, width, used = tf.numpy_function(slow, [index], [tf.uint8, tf.int64, tf.int64, tf.int64])
    image = tf.ensure_shape(image, [canvas, canvas, channels])
    return image, tf.ensure_shape(height, []), tf.ensure_shape(width, []), tf.ensure_shape(used, [])

  def element(position, index):
    one = tf.data.Dataset.from_tensors((position, index))
    again = one.map(lambda position, index: (*fallback(index), position))
    return one.map(first).ignore_errors().concatenate(again).take(1)

  def cut_views(image, height, width, used, position):
    pixels = tf.numpy_function(cut, [image, height, width, position], [tf.uint8] * len(views))
    shaped = [tf.ensure_shape(p, [*shape, channels]) for p, shape in zip(pixels, views, strict=True)]
    return *shaped, height, width, used

  signature = (tf.TensorSpec([rows], tf.int64), tf.TensorSpec([rows], tf.int64))
  dataset = tf.data.Dataset.from_generator(planned, output_signature=signature).unbatch()
  dataset = dataset.interleave(
    element, cycle_length=2 * threads, block_length=1, num_parallel_calls=threads, deterministic=True
  )
  if cut is not None:
    dataset = dataset.map(cut_views, num_parallel_calls=threads, deterministic=True)
  else:
    dataset = dataset.map(lambda image, height, width, used, position: (image, height, width, used))
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  return dataset.batch(rows, drop_remainder=True).prefetch(2).with_options(options)
