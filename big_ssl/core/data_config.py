"""Where images come from and how they reach the device, as a user says it."""

from __future__ import annotations

import dataclasses
from typing import Literal

from big_ssl.core.bounds import check_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where images come from and how they reach the device.

  Attributes:
    source: "sprites", a folder, a tar or glob of tars, a .npz, a TFRecord glob, or "tfds:name".
    dir: root of prepared TFDS data sets; "" is TFDS's own default.
    split, eval_split: names of the splits, where the source has them; "" lets the source choose.
    canvas: side in pixels of the uint8 canvas an image is decoded into; larger images are shrunk to fit, aspect kept;
      0 chooses from the views (2.3 times the largest, rounded up to 32).
    crop: "device" cuts the views inside the jitted step, "host" cuts them on the CPU; "auto" is "device" on an
      accelerator, and "host" on CPU, where the device's work is the host's.
    threads, prefetch: decoding threads (0: one per core) and batches in flight.
    train_examples, eval_examples, image_size: size of the `sprites` world; eval_examples also caps other sources (0: all).
    labels_per_class, labels_share: train, and evaluate what is fitted on training images, on so many labeled images of each
      class, or on this share of each (at least one), alone; 0 is all. An epoch is one of these.
    labels_seed: of their draw; the run's seed has no part in it.
    labels_file: instead, a list of the images as for `core.method.ClassBalanced`.
  """

  source: str = "sprites"
  dir: str = ""
  split: str = ""
  eval_split: str = ""
  canvas: int = 0
  crop: Literal["auto", "device", "host"] = "auto"
  threads: int = 0
  prefetch: int = 4
  train_examples: int = 8192
  eval_examples: int = 0
  image_size: int = 48
  labels_per_class: int = 0
  labels_share: float = 0.0
  labels_seed: int = 0
  labels_file: str = ""

  def __post_init__(self):
    check_least("config.data", values=self, canvas=0, threads=0, prefetch=1, train_examples=1, eval_examples=0, image_size=1)
