"""Parameters, FLOPs and activations of every variant, from shapes alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.core.config import build_named
from big_ssl.models import regnet, resmlp, xcit
from big_ssl.models.layers import Backbone, with_fields

_VITS = {"Ti": 16, "S": 16, "B": 16, "L": 16, "H": 14, "g": 14, "G": 14, "e": 14}
VARIANTS: tuple[dict[str, Any], ...] = (
  *({"name": "vit", "variant": v, "patch": p} for v, p in _VITS.items()),
  {"name": "flexivit", "variant": "B", "image_size": 224, "kernel_patch": 32, "patch": 16},
  {"name": "navit", "variant": "B"},
  {"name": "vit22b"},
  *({"name": "xcit", "variant": v, "patch": p} for v in xcit.SIZES for p in (16, 8)),
  *({"name": "resmlp", "variant": v} for v in resmlp.SIZES),
  *({"name": "resnet", "depth": d} for d in (18, 34, 50, 101, 152)),
  *({"name": "resnet", "depth": 50, "width": w} for w in (2, 4)),
  {"name": "wide_resnet", "depth": 28, "width": 2},
  {"name": "revnet"},
  *({"name": "regnet", "variant": v} for v in (*regnet.LINES, *regnet.STAGES)),
  {"name": "alexnet"},
  {"name": "vgg"},
)


def cost(fields: dict[str, Any], *, size: int) -> dict[str, float]:
  """Of one image [size, size, 3]: "parameters"; "flops" of the forward pass, two per multiplication and addition, as XLA
  counts them before it optimizes; "activations", bytes that its gradient keeps besides the parameters. The count is
  of float32, with layers neither scanned nor recomputed."""
  model = with_fields(build_named("models", fields, Backbone, path="model"), scan=False, remat="none", dtype="float32")
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

  def forward(network: Backbone) -> Callable:
    rngs = {"drop_path": jax.random.key(0), "dropout": jax.random.key(1)}
    return lambda p, r, x: network.apply({"params": p} | r, x, train=True, rngs=rngs, mutable=["batch_stats"])[0]["pooled"]

  backward = jax.eval_shape(lambda p, r, x: jax.vjp(lambda q: forward(model)(q, r, x), p)[1], params, rest, images)
  flops = jax.jit(forward(with_fields(model, reversible=False))).lower(params, rest, images).cost_analysis()["flops"]
  size_of = lambda tree: sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
  return {
    "parameters": sum(int(np.prod(a.shape)) for a in jax.tree.leaves(params)),
    "flops": flops,
    "activations": max(size_of(backward) - size_of(params), 0),
  }


def title(fields: dict[str, Any]) -> str:
  """ "resnet depth=50 width=2"."""
  return " ".join([fields["name"], *(f"{k}={v}" for k, v in fields.items() if k != "name")])


def row(fields: dict[str, Any], *, size: int) -> str:
  """A line of docs/models.md."""
  found = cost(fields, size=size)
  numbers = (f"{found['parameters'] / 1e6:,.2f}", f"{found['flops'] / 1e9:,.2f}", f"{found['activations'] / 2**20:,.1f}")
  return f"| {title(fields)} | {' | '.join(numbers)} |"


def bench(args: argparse.Namespace) -> dict[str, Any]:
  """Prints the table, and returns nothing more."""
  print(f"| config.model, one image of {args.size} px | M parameters | GFLOPs forward | MiB kept for the gradient |\n|---|---|---|---|")
  for fields in VARIANTS:
    print(row(fields, size=args.size), flush=True)
  return {}
