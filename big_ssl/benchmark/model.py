"""Forward and backward pass of one backbone: speed, share of the device's peak, compilation; beside timm's where it is installed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.benchmark.timing import matmul_flops, rate
from big_ssl.core.config import build_named
from big_ssl.core.flops import count
from big_ssl.core.logger import peak_flops
from big_ssl.models.layers import Backbone, with_fields


def bench(args: argparse.Namespace) -> dict[str, Any]:
  """Images per second of the gradient of a sum over "pooled" with respect to the parameters, images [B, S, S, 3]."""
  fields = {"name": args.model} | json.loads(args.fields)
  model = build_named("models", fields, Backbone, path="--fields")
  images = jnp.asarray(np.random.default_rng(0).normal(size=(args.batch_size, args.size, args.size, 3)), jnp.float32)
  variables = jax.jit(lambda x: model.init({"params": jax.random.key(0)}, x, train=False))(images[:2])
  result = {"model": json.dumps(fields), "parameters": sum(x.size for x in jax.tree.leaves(variables["params"]))}
  compiled = None
  for label, network in _scanned_or_not(model).items():
    start = time.perf_counter()
    compiled = jax.jit(gradient(network)).lower(variables, images).compile()
    result[f"compilation{label} s"] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is not None:
      result[f"temporary memory{label} MiB"] = memory.temp_size_in_bytes / 2**20

  def ours() -> int:
    jax.block_until_ready(compiled(variables, images))
    return args.batch_size

  result |= {"device": jax.devices()[0].device_kind, "big_ssl img/s": rate(ours, seconds=args.seconds)}
  theirs = _timm_gradient(args) if args.timm else None
  if theirs is not None:
    result["timm img/s"] = rate(theirs, seconds=args.seconds)
    result["ratio to timm"] = result["big_ssl img/s"] / result["timm img/s"]
  once = with_fields(model, remat="none", reversible=False)
  flops = count(jax.make_jaxpr(gradient(once))(variables, images).jaxpr) / args.batch_size
  return result | _utilization(result, flops, dtype=getattr(model, "dtype", "float32"))


def _utilization(result: dict[str, Any], flops: float, *, dtype: str) -> dict[str, float]:
  """Model FLOPs utilization of both, from `flops` per image: of the device's published peak, or of a product measured here."""
  peak, of = peak_flops(jax.devices()[0].device_kind), "MFU"
  if peak is None:
    peak, of = matmul_flops(dtype=dtype, precision=jax.lax.Precision.DEFAULT), "share of a matmul"
  return {f"{name} {of}": flops * result[f"{name} img/s"] / peak for name in ("big_ssl", "timm") if f"{name} img/s" in result}


def _scanned_or_not(model: Backbone) -> dict[str, Backbone]:
  """The model as asked comes last: it is the one that is measured."""
  if not hasattr(model, "scan"):
    return {"": model}
  label = lambda scan: " with scanned layers" if scan else ""
  return {label(scan): model.clone(scan=scan) for scan in (not model.scan, model.scan)}


def gradient(model: Backbone) -> Callable:
  """f(variables, images): the gradient, with respect to the parameters, of the mean square of "pooled" in training mode."""

  def loss(params: Any, rest: Any, images: jax.Array) -> jax.Array:
    rngs = {"drop_path": jax.random.key(0), "dropout": jax.random.key(1)}
    out, _ = model.apply({"params": params} | rest, images, train=True, rngs=rngs, mutable=["batch_stats"])
    return jnp.mean(out["pooled"].astype(jnp.float32) ** 2)

  def of(variables: Any, images: jax.Array) -> Any:
    rest = {k: v for k, v in variables.items() if k != "params"}
    return jax.grad(loss)(variables["params"], rest, images)

  return of


def _timm_gradient(args: argparse.Namespace) -> Callable[[], int] | None:
  try:
    import timm
    import torch
  except ImportError:
    return None
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = timm.create_model(args.timm, num_classes=0).to(device).train()
  images = torch.randn(args.batch_size, 3, args.size, args.size, device=device)

  def step() -> int:
    model.zero_grad(set_to_none=True)
    (model(images) ** 2).mean().backward()
    if device == "cuda":
      torch.cuda.synchronize()
    return args.batch_size

  return step
