"""The mesh, where every array lives on it, and the start of several processes."""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core.config import MeshConfig
from big_ssl.core.types import PyTree, UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the leading dimension of every batch array


def start_processes(coordinator: str, *, num_processes: int, process_id: int, timeout_s: int = 120) -> None:
  """Connects this process to the others ("auto" lets the cluster say how).

  Raises:
    UserError: not all processes arrived in time; names this process and what the coordinator saw missing.
  """
  try:
    if coordinator == "auto":
      jax.distributed.initialize(initialization_timeout=timeout_s)
    else:
      jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=timeout_s)
  except (RuntimeError, ValueError) as error:
    text = str(error)
    missing = sorted(set(re.findall(r"task[:/](\d+)", text)))
    who = f" Missing or unreachable: process {', '.join(missing)}." if missing else ""
    raise UserError(
      f"--coordinator={coordinator}: process {process_id} of {num_processes} on {socket.gethostname()} could not meet the others"
      f" within {timeout_s} s.{who} ({text.splitlines()[0][:200]})"
    ) from None


def check_topology(fingerprint: str) -> None:
  """Compares host name, device kind, local device count and `fingerprint` (config and version) over all processes.

  Raises:
    UserError: names every process that differs from process 0.
  """
  if jax.process_count() == 1:
    return
  kind = jax.local_devices()[0].device_kind
  mine = [socket.gethostname(), kind, str(jax.local_device_count()), hashlib.sha256(fingerprint.encode()).hexdigest()[:12]]
  row = np.zeros((256,), np.uint8)
  encoded = "|".join(mine).encode()[:256]
  row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  rows = [bytes(r).rstrip(b"\0").decode().split("|") for r in np.asarray(multihost_utils.process_allgather(row))]
  labels = ("device kind", "local devices", "config and version")
  wrong = [
    f"process {i} ({other[0]}): {label} {value} instead of {reference}"
    for i, other in enumerate(rows)
    for label, value, reference in zip(labels, other[1:], rows[0][1:], strict=True)
    if value != reference
  ]
  if wrong:
    raise UserError("the processes do not match process 0: " + "; ".join(wrong))


def make_mesh(config: MeshConfig, *, batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The ("data", "fsdp", "tensor") mesh over all devices (or those given); axes are Auto, so that losses stay global.

  Raises:
    UserError: the axes do not multiply to the device count, or the batch does not divide over data * fsdp.
  """
  count = jax.device_count() if devices is None else len(devices)
  shape = [config.data, config.fsdp, config.tensor]
  unknown = [i for i, s in enumerate(shape) if s == -1]
  known = int(np.prod([s for s in shape if s != -1]))
  if len(unknown) == 1 and known > 0 and count % known == 0:
    shape[unknown[0]] = count // known
  text = f"config.mesh=data:{config.data} fsdp:{config.fsdp} tensor:{config.tensor}"
  if min(shape) < 1 or int(np.prod(shape)) != count:
    raise UserError(f"{text}: the axes must multiply to the {count} devices there are; one of them may be -1.")
  if batch_size % (shape[0] * shape[1]):
    raise UserError(f"config.batch_size={batch_size}: must be divisible by the {shape[0] * shape[1]} devices of the data and fsdp axes.")
  return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def state_shardings(mesh: Mesh, abstract_state: PyTree, config: MeshConfig, *, row_sharded: tuple[str, ...] = ()) -> PyTree:
  """One NamedSharding per leaf: the tensor rules first, then the largest divisible dimension over fsdp, else replicated.

  Teacher and moments have the shapes of the parameters, and so get the same shardings. The entries of `extra` named in
  `row_sharded` are split by their first axis over data and fsdp where it divides.

  Raises:
    UserError: a tensor rule names a dimension that the axis does not divide.
  """

  def place(path, leaf) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec: list = [None] * leaf.ndim
    entry = name.split("/")
    if entry[0] == "extra" and entry[1] in row_sharded:
      divides = leaf.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
      return NamedSharding(mesh, BATCH if divides else P())
    for pattern, dim in config.tensor_rules:
      if mesh.shape["tensor"] > 1 and leaf.ndim and re.search(pattern, name):
        if not -leaf.ndim <= dim < leaf.ndim or leaf.shape[dim] % mesh.shape["tensor"]:
          raise UserError(f"config.mesh.tensor_rules {pattern!r}: '{name}' {leaf.shape} cannot be split on dimension {dim}.")
        spec[dim % leaf.ndim] = "tensor"
        break
    if mesh.shape["fsdp"] > 1 and leaf.size >= config.fsdp_min_size:
      free = [d for d in range(leaf.ndim) if spec[d] is None and leaf.shape[d] % mesh.shape["fsdp"] == 0]
      if free:
        spec[max(free, key=lambda d: leaf.shape[d])] = "fsdp"
    return NamedSharding(mesh, P(*spec))

  return jax.tree_util.tree_map_with_path(place, abstract_state)


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """[start, stop): the rows of the global batch that this process loads."""
  index_map = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
  slices = [s[0].indices(batch_size) for s in index_map.values()]
  return min(s[0] for s in slices), max(s[1] for s in slices)


def make_global(mesh: Mesh, batch: PyTree) -> PyTree:
  """Host-local numpy rows to global arrays, split over the data and fsdp axes."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def replicate(mesh: Mesh, tree: PyTree) -> PyTree:
  """The same array on every device; each process must hold the same values."""
  sharding = NamedSharding(mesh, P())
  return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i, x=np.asarray(x): x[i]), tree)


def bytes_per_device(abstract_state: PyTree, shardings: PyTree) -> int:
  """Bytes of the state on one device."""
  sizes = jax.tree.map(lambda a, s: int(np.prod(s.shard_shape(a.shape))) * a.dtype.itemsize, abstract_state, shardings)
  return sum(jax.tree.leaves(sizes))
