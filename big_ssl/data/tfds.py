"""TFDS data sets by name: small images of one size go into memory, others are read by record offset."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from big_ssl.core.types import UserError, nearest
from big_ssl.data import listing
from big_ssl.data.fast import tensorflow
from big_ssl.data.source import Arrays, DataSource, Records

IN_MEMORY_BYTES = 4 << 30


def open_pair(name: str, *, split: str, eval_split: str, data_dir: str) -> list[DataSource]:
  """[train, eval] of the prepared data set `name`; [train] where there is no evaluation split.

  Raises:
    UserError: not installed, unknown, not prepared, no such split, no images.
  """
  try:
    tensorflow()
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(f"--data=tfds:{name}: tensorflow-datasets is not installed ({error}).") from None
  root = pathlib.Path(data_dir).expanduser() if data_dir else None
  if root is not None and not root.is_dir():
    raise UserError(f"--data_dir={data_dir}: no such folder.")
  prepared = sorted(p.name for p in root.iterdir() if p.is_dir()) if root else []
  found = f"Prepared in {root or 'the default folder'}: {', '.join(prepared) or 'none'}."
  try:
    builder = tfds.builder(name, data_dir=str(root) if root else None, try_gcs=False)
  except Exception as error:  # tfds has many kinds of "not found"
    if type(error).__name__ not in ("DatasetNotFoundError", "ValueError", "AssertionError", "NotFoundError"):
      raise
    raise UserError(f"--data=tfds:{name}: unknown data set.{nearest(name, prepared)} {found}") from None
  if not pathlib.Path(str(builder.data_dir)).is_dir():
    how = f"prepare it with `tfds build {name}` or give --data_dir."
    raise UserError(f"--data=tfds:{name}: not prepared in {builder.data_dir}; {how} {found}")
  splits = sorted(builder.info.splits)
  held = eval_split or next((s for s in ("test", "validation") if s in splits and s != split), "")
  for flag, wanted in (("split", split), ("eval_split", held)):
    if wanted and wanted not in splits:
      near = f"{nearest(wanted, splits)} There are: {', '.join(splits)}."
      raise UserError(f"config.data.{flag}={wanted!r}: tfds:{name} has no such split.{near}")
  return [_open(builder, s) for s in (split, held) if s]


def _open(builder: Any, split: str) -> DataSource:
  info, features = builder.info, builder.info.features
  title = f"tfds:{info.full_name} {split}"
  if "image" not in features:
    raise UserError(f"--data={title}: no feature 'image'; it has {', '.join(features)}.")
  shape = tuple(features["image"].shape)
  names = tuple(getattr(features["label"], "names", None) or ()) if "label" in features else ()
  if None not in shape and int(np.prod(shape)) * info.splits[split].num_examples <= IN_MEMORY_BYTES:
    import tensorflow_datasets as tfds

    columns = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1, shuffle_files=False))
    return Arrays(columns["image"], columns.get("label"), name=title, class_names=names)
  files = [str(f) for f in info.splits[split].filepaths]
  if "tfrecord" not in pathlib.Path(files[0]).name:
    raise UserError(f"--data={title}: prepared in another format than TFRecord.")
  found = dataclasses.replace(listing.tfrecords(files), class_names=names)
  return Records(found, name=title, channels=shape[-1] or 3)
