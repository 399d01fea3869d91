"""Reading and decoding with tf.data: plain JPEGs in C++ threads, everything else by the Pillow path, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


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

  An element that the fast path cannot decode (damaged, another format, Exif, CMYK) raises, is dropped by `ignore_errors`
  inside its own one-element data set, and the slow path takes its place there: positions never shift.

  Args:
    planned: yields (positions [rows], indices [rows]) per batch.
    read: index -> encoded bytes.
    slow: index -> (canvas, height, width, used index).
    cut: (canvas, height, width, position) -> pixels of each view, or None to return the canvas.
    views: (count, height, width) of each view, for `cut`.
  """
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")

  def fast(position, index):
    data = tf.numpy_function(lambda i: _bytes_or_raise(read, i), [index], tf.string)
    tf.debugging.assert_equal(tf.strings.substr(data, 0, 3), tf.constant(b"\xff\xd8\xff"))
    tf.debugging.Assert(tf.logical_not(tf.strings.regex_full_match(tf.strings.substr(data, 0, 256), r"\C*Exif\C*")), [index])
    shape = tf.io.extract_jpeg_shape(data)
    tf.debugging.assert_less(shape[2], 4)  # CMYK
    ratio = tf.maximum(tf.maximum(shape[0], shape[1]) // canvas, 1)
    power = tf.minimum(tf.cast(tf.math.log(tf.cast(ratio, tf.float32) + 0.01) / tf.math.log(2.0), tf.int32), 3)
    image = tf.switch_case(power, [lambda r=2**p: tf.io.decode_jpeg(data, channels=channels, ratio=r) for p in range(4)])
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
    return padded, tf.cast(height, tf.int64), tf.cast(width, tf.int64), index, position

  def fallback(position, index):
    image, height, width, used = tf.numpy_function(slow, [index], [tf.uint8, tf.int64, tf.int64, tf.int64])
    image = tf.ensure_shape(image, [canvas, canvas, channels])
    return image, tf.ensure_shape(height, []), tf.ensure_shape(width, []), tf.ensure_shape(used, []), position

  def element(position, index):
    one = tf.data.Dataset.from_tensors((position, index))
    return one.map(fast).ignore_errors().concatenate(one.map(fallback)).take(1)

  def cut_views(image, height, width, used, position):
    pixels = tf.numpy_function(cut, [image, height, width, position], [tf.uint8] * len(views))
    shaped = [tf.ensure_shape(p, [*shape, channels]) for p, shape in zip(pixels, views, strict=True)]
    return *shaped, height, width, used

  signature = (tf.TensorSpec([rows], tf.int64), tf.TensorSpec([rows], tf.int64))
  dataset = tf.data.Dataset.from_generator(planned, output_signature=signature).unbatch()
  dataset = dataset.interleave(element, cycle_length=2 * threads, block_length=1, num_parallel_calls=threads, deterministic=True)
  if cut is not None:
    dataset = dataset.map(cut_views, num_parallel_calls=threads, deterministic=True)
  else:
    dataset = dataset.map(lambda image, height, width, used, position: (image, height, width, used))
  options = tf.data.Options()
  options.threading.private_threadpool_size = threads
  return dataset.batch(rows, drop_remainder=True).prefetch(2).with_options(options)


def _bytes_or_raise(read: Callable[[int], bytes], index: np.ndarray) -> bytes:
  data = read(int(index))
  if not data:
    raise ValueError("empty file")
  return data
