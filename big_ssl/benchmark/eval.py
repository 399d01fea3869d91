"""k-NN of many queries against a large bank of synthetic features, beside a plain matrix product on the same devices."""

from __future__ import annotations

import argparse
import platform
import resource
import time
from typing import Any

import jax
import numpy as np

from big_ssl.benchmark.timing import matmul_flops, seconds_of
from big_ssl.core import sharding
from big_ssl.core.config import MeshConfig
from big_ssl.core.types import UserError
from big_ssl.ops import knn


def bench(args: argparse.Namespace) -> dict[str, Any]:
  """Seconds of the exact search and of the votes, memory, and the share of the products that a plain matmul reaches."""
  for flag in ("queries", "bank", "dim", "k"):
    if getattr(args, flag) < 1:
      raise UserError(f"--{flag}={getattr(args, flag)}: expected at least 1.")
  if args.k > args.bank:
    raise UserError(f"--k={args.k}: more neighbors than the {args.bank} rows of --bank.")
  devices = jax.devices()
  mesh = sharding.make_mesh(MeshConfig(), batch_size=len(devices), devices=devices)
  layout = knn.plan(args.queries, bank=args.bank, dim=args.dim, k=args.k, devices=len(devices))
  result = {"device": devices[0].device_kind, "devices": len(devices), "k-NN": f"{args.queries} x {args.bank} x {args.dim}, k={args.k}"}
  result["planned memory per device MiB"] = layout.bytes_per_device / 2**20

  bank, queries = _unit_rows(args.bank, dim=args.dim, seed=0), _unit_rows(args.queries, dim=args.dim, seed=1)
  warm_up = queries[: layout.query_chunk]
  search = lambda rows: knn.nearest(rows, bank=bank, k=args.k, mesh=mesh)
  result["first chunk with compilation s"] = seconds_of(lambda: search(warm_up))
  before = matmul_flops(len(devices))
  start = time.perf_counter()
  found = search(queries)
  result["k-NN s"] = time.perf_counter() - start
  peak = max(before, matmul_flops(len(devices)))  # of two: other work on the machine only ever lowers it
  labels, wanted = (np.random.default_rng(i).integers(0, 1000, n) for i, n in enumerate((args.bank, args.queries)))
  vote = {"k": args.k, "temperature": 0.07, "num_classes": 1000}
  result["votes of 1000 classes s"] = seconds_of(lambda: knn.accuracies(found, labels=labels, query_labels=wanted, **vote))
  flops = 2.0 * args.queries * args.bank * args.dim
  result["k-NN GFLOP/s"] = flops / result["k-NN s"] / 1e9
  result["matmul GFLOP/s (float32, highest)"] = peak / 1e9
  result["share of the matmul"] = flops / result["k-NN s"] / peak
  return result | _memory()


def _unit_rows(count: int, *, dim: int, seed: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  rows = rng.standard_normal((count, dim), np.float32)
  for start in range(0, count, 65536):  # no second copy of the whole bank
    part = rows[start : start + 65536]
    part /= np.linalg.norm(part, axis=1, keepdims=True)
  return rows


def _memory() -> dict[str, float]:
  """Peaks of this process: of the host, and of a device where its backend counts."""
  unit = 1 if platform.system() == "Darwin" else 1024
  peaks = {"peak memory of the process MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    peaks["peak memory of a device MiB"] = stats["peak_bytes_in_use"] / 2**20
  return peaks
