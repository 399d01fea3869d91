"""Files of weights without the libraries that wrote them: every value, nothing executed, nothing read too early."""

import collections
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.weights.containers import describe, read_file, write_npz, write_safetensors

FILES = {
  "torch_zip": ("file.pth", "", 19),
  "torch_legacy": ("file.pth.tar", "", 19),
  "safetensors": ("file.safetensors", "student/", 10),
  "npz_bf16": ("file.npz", "npz/", 2),
}


@pytest.fixture
def write(golden, tmp_path):
  def to(kind):
    file = tmp_path / FILES[kind][0]
    file.write_bytes(golden("checkpoint_torch_files")[f"{kind}_bytes"].tobytes())
    return file

  return to


@pytest.mark.parametrize("kind", FILES)
def test_every_tensor_has_the_value_that_its_library_wrote(golden, write, kind):
  z, (_, prefix, count) = golden("checkpoint_torch_files"), FILES[kind]
  tensors, found = read_file(write(kind)).tensors, 0
  for key, wanted in z.items():
    name = key.removeprefix("expected/").removeprefix(prefix)
    if key.startswith(f"expected/{prefix}") and name in tensors:
      value = tensors[name]
      assert tensors.shape(name) == value.shape == wanted.shape and tensors.dtype(name) == value.dtype, name
      np.testing.assert_array_equal(value.astype(wanted.dtype), wanted, err_msg=name)
      found += 1
  assert found == count


@pytest.mark.parametrize("kind", ["torch_zip", "torch_legacy"])
def test_numbers_and_options_beside_the_tensors_are_kept_apart(write, kind):
  file = read_file(write(kind))
  assert file.others["epoch"] == 3 and file.others["args"].arch == "vit_small"
  assert describe(file.others["none"]) == "None"
  assert file.tensors["student/module.backbone.bf16"].dtype == ml_dtypes.bfloat16


class Call:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize(
  "call,name",
  [
    (Call(os.system, "exit 1"), r"(posix|nt)\.system"),
    (Call(eval, "1"), "builtins.eval"),
    (Call(getattr, "a", "upper"), "builtins.getattr"),
    (Call(np.load, "x.npy"), r"numpy\.load"),
  ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_call_a_function_is_refused_by_name(tmp_path, call, name, protocol):
  file = tmp_path / "bad.pth"
  file.write_bytes(pickle.dumps({"w": np.ones(2), "x": call}, protocol))
  with pytest.raises(UserError, match=f"refused, its pickle would call '{name}'"):
    read_file(file)


def test_objects_of_unknown_classes_are_named_and_never_built(tmp_path, monkeypatch):
  module = type(os)("apex_like")
  scaler = type("Scaler", (), {"__module__": "apex_like", "__qualname__": "Scaler", "__setstate__": lambda self, state: exit(1)})
  module.Scaler = scaler
  monkeypatch.setitem(__import__("sys").modules, "apex_like", module)
  value = scaler()
  value.scale = 3.0
  file = tmp_path / "mixed.pkl"
  file.write_bytes(pickle.dumps(collections.OrderedDict(w=np.ones(2), amp=value), 2))
  found = read_file(file)
  assert list(found.tensors) == ["w"] and describe(found.others["amp"]) == "object of apex_like.Scaler"


def test_a_cut_file_and_a_view_beyond_its_storage_are_clear_errors(write):
  for kind in ("torch_zip", "torch_legacy", "safetensors"):
    file = write(kind)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
      read_file(file)


def test_a_file_of_another_kind_is_refused(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    read_file(tmp_path / "none.pth")
  (tmp_path / "weights.h5").write_bytes(b"x")
  with pytest.raises(UserError, match="expected a file that ends in"):
    read_file(tmp_path / "weights.h5")
  (tmp_path / "old.tar").write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 300)
  with pytest.raises(UserError, match=r"tar container.*torch\.save"):
    read_file(tmp_path / "old.tar")
  np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
  with pytest.raises(UserError, match="not an .npz of plain arrays"):
    read_file(tmp_path / "objects.npz")


def test_what_is_written_reads_back_bit_for_bit(tmp_path):
  tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "n": np.int64(4), "h": np.ones(3, ml_dtypes.bfloat16)}
  write_safetensors(tmp_path / "x.safetensors", tensors, metadata={"note": "n"})
  found = read_file(tmp_path / "x.safetensors")
  assert found.metadata == {"format": "pt", "note": "n"}
  assert all(np.array_equal(found.tensors[k], v) and found.tensors[k].dtype == v.dtype for k, v in tensors.items())
  write_npz(tmp_path / "x.npz", {"a/b": tensors["a"]})
  np.testing.assert_array_equal(read_file(tmp_path / "x.npz").tensors["a/b"], tensors["a"])


def test_a_flax_file_is_a_tree_of_names(tmp_path):
  from flax.serialization import msgpack_serialize

  (tmp_path / "state.msgpack").write_bytes(msgpack_serialize({"params": {"norm": {"scale": np.ones(2)}}, "global_step": 3}))
  found = read_file(tmp_path / "state.msgpack")
  assert list(found.tensors) == ["params/norm/scale"] and found.others == {"global_step": 3}
