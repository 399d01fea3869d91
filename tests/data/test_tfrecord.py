"""TFRecords and tf.train.Examples are read from their bytes, without tensorflow."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from big_ssl.core.types import UserError
from big_ssl.data import opening, tfrecord


def varint(value: int) -> bytes:
  value &= (1 << 64) - 1
  out = b""
  while value > 127:
    out, value = out + bytes([value & 127 | 128]), value >> 7
  return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
  return varint(number << 3 | 2) + varint(len(content)) + content


def example(*entries: bytes) -> bytes:
  return field(1, b"".join(field(1, e) for e in entries))


def image_entry(data: bytes, key: str = "image") -> bytes:
  return field(1, key.encode()) + field(2, field(1, field(1, data)))


def label_entry(value: int, key: str = "label", *, packed: bool = True) -> bytes:
  numbers = field(1, varint(value)) if packed else varint(1 << 3) + varint(value)
  return field(1, key.encode()) + field(2, field(3, numbers))


def write(path, messages: list[bytes]) -> str:
  framed = [struct.pack("<Q", len(m)) + bytes(4) + m + bytes(4) for m in messages]
  path.write_bytes(b"".join(framed))
  return str(path)


def png(value: int) -> bytes:
  out = io.BytesIO()
  Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(out, "PNG")
  return out.getvalue()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("label", [0, 127, 128, 300, 999, 2**31 - 1, -1])
def test_labels_of_any_size_are_read(label, packed):
  for keys in (("image", "label"), ("image/encoded", "image/class/label")):
    message = example(label_entry(label, keys[1], packed=packed), image_entry(b"data", keys[0]))
    found = tfrecord.parse(message)
    assert (bytes(found.image), found.label) == (b"data", label)


def test_other_features_are_passed_over():
  other = field(1, b"name") + field(2, field(1, field(1, b"x.jpg")))
  floats = field(1, b"box") + field(2, field(2, field(1, struct.pack("<4f", 0, 0, 1, 1))))
  found = tfrecord.parse(example(other, image_entry(b"data"), floats))
  assert (bytes(found.image), found.label) == (b"data", None)


def test_what_tensorflow_writes_is_read(tmp_path):
  tf = pytest.importorskip("tensorflow")
  feature = {
    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[png(7)])),
    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[300])),
    "name": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"x"])),
  }
  message = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
  with tf.io.TFRecordWriter(str(tmp_path / "a.tfrecord")) as writer:
    writer.write(message)
    writer.write(message)
  found = opening.open_splits(str(tmp_path / "a.tfrecord"))["train"]
  assert len(found) == 2 and found.labels.tolist() == [300, 300] and (found.pixels(1) == 7).all()


def test_records_are_found_over_several_files_in_order(tmp_path):
  for i in range(3):
    write(
      tmp_path / f"a.tfrecord-{i:05d}-of-00003",
      [example(image_entry(png(10 * i + j)), label_entry(j)) for j in range(2)],
    )
  (tmp_path / "a.tfrecord-00003-of-00003").write_bytes(b"")
  found = opening.open_splits(str(tmp_path / "a.tfrecord-*"))["train"]
  assert [int(p[0, 0, 0]) for p in found.fetch(range(6))] == [0, 1, 10, 11, 20, 21]
  assert found.labels.tolist() == [0, 1] * 3 and found.name(3) == "a.tfrecord-00001-of-00003:1"


def test_a_damaged_file_or_record_is_an_error_that_says_where(tmp_path):
  whole = write(tmp_path / "a.tfrecord", [example(image_entry(png(1)))] * 2)
  data = (tmp_path / "a.tfrecord").read_bytes()
  (tmp_path / "cut.tfrecord").write_bytes(data[:-3])
  (tmp_path / "text.tfrecord").write_bytes(b"this is not a record file")
  write(tmp_path / "other.tfrecord", [example(label_entry(1))])
  write(tmp_path / "junk.tfrecord", [b"\xff\xff\xff"])
  assert len(opening.open_splits(whole)["train"]) == 2
  cases = {"cut": f"byte {len(data) // 2}", "text": "byte 0", "other": "found label", "junk": "not a tf.train.Example"}
  for name, message in cases.items():
    with pytest.raises(UserError, match=rf"{name}\.tfrecord.*{message}"):
      opening.open_splits(str(tmp_path / f"{name}.tfrecord"))
