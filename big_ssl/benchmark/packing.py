"""Images per second and padding of packed sequences beside squares of one size and padded single images, at one token budget."""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_ssl.augment.patches import Sequences, of_images, pack_native
from big_ssl.benchmark.model import gradient
from big_ssl.benchmark.timing import rate
from big_ssl.core.config import build_named
from big_ssl.core.packing import Packing
from big_ssl.core.types import UserError
from big_ssl.data import packing as plans
from big_ssl.models.layers import Backbone
from big_ssl.models.navit import NaViT

_FULL = 0.95  # share of the sequences that the images of a step are expected to fill before any side is lowered
_SIDES = (64, 256)  # of the images, in pixels
_DROP = {"drop_law": "beta", "drop_rate": (0.0, 0.5), "drop_beta": (2.0, 4.0)}


def bench(args: argparse.Namespace) -> dict[str, Any]:
  """The gradient of one network with as many tokens in every step, four ways (arXiv 2307.06304, sections 2.1, 2.2 and 3.4).

  Squares of `--size`; images of aspect 1:2 to 2:1 and of sides from 64 to 256 px, small ones more often, each padded to the
  longest there may be; the same images packed; packed after Beta(2, 4) on (0, 0.5) of their tokens is dropped.

  Raises:
    UserError: `--fields` of another network than a NaViT, or `--size` or `--tokens` that do not fit.
  """
  fields = {"name": "navit", "variant": "Ti", "patch": 16} | json.loads(args.fields)
  model = build_named("models", fields, Backbone, path="--fields")
  if not isinstance(model, NaViT):
    raise UserError(f"--fields={args.fields}: expected a navit, found {fields['name']}.")
  longest = (_SIDES[1] // model.patch) ** 2
  if args.tokens < 2 * longest:
    raise UserError(f"--tokens={args.tokens}: expected at least {2 * longest}, two of the largest images.")
  ways = {
    "squares": _squares(args.size, model, tokens=args.tokens),
    "padded": _native(model, sequences=args.tokens // longest, tokens=longest, max_images=1),
    "packed": _native(model, sequences=args.tokens // (2 * longest), tokens=2 * longest, max_images=32),
    "packed, tokens dropped": _native(model, sequences=args.tokens // (2 * longest), tokens=2 * longest, max_images=32, **_DROP),
  }
  result: dict[str, Any] = {"model": json.dumps(fields), "device": jax.devices()[0].device_kind, "tokens of a step": args.tokens}
  for name, (images, sequences) in ways.items():
    result |= {f"{name}: {key}": value for key, value in _measure(model, images, sequences, seconds=args.seconds).items()}
  return result | {f"{name}: img/s to squares": result[f"{name}: img/s"] / result["squares: img/s"] for name in list(ways)[1:]}


def _measure(model: NaViT, images: int, sequences: Sequences, *, seconds: float) -> dict[str, float]:
  variables = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(sequences)
  compiled = jax.jit(gradient(model)).lower(variables, sequences).compile()

  def step() -> int:
    jax.block_until_ready(compiled(variables, sequences))
    return images

  tokens = float(jnp.sum(sequences.segment >= 0))
  return {"img/s": rate(step, seconds=seconds), "tokens of an image": tokens / images, "padding": 1 - tokens / sequences.segment.size}


def _squares(size: int, model: NaViT, *, tokens: int) -> tuple[int, Sequences]:
  """As many as `tokens` have room for, each a sequence."""
  count = tokens // max(size // model.patch, 1) ** 2
  if not count:
    raise UserError(f"--size={size}: expected squares of at most --tokens={tokens} patches.")
  return count, of_images(_pixels(count, size, size, model.channels), model.patch)


def _native(model: NaViT, *, max_images: int, **fields: Any) -> tuple[int, Sequences]:
  """One shard of images of drawn aspect and side, with as many images as its sequences take."""
  packing = lambda images: Packing(patch=model.patch, side=_SIDES, shard_size=images, max_images=max_images, **fields)
  count = fields["sequences"]
  if max_images > 1:
    count = int(_FULL * count * fields["tokens"] / _mean_tokens(packing(count)))
  chosen = packing(count)
  plan = plans.as_batch(plans.plan(chosen, _sizes(count), seed=0, positions=np.arange(count)))
  side = chosen.grid_limit * model.patch
  return count, pack_native(_pixels(count, side, side, model.channels), jax.tree.map(jnp.asarray, plan), patch=model.patch)


def _mean_tokens(packing: Packing) -> float:
  """Of an image after dropping, over many draws."""
  positions = np.arange(4096)
  side = plans.sides(packing, seed=1, positions=positions)
  most = np.full(len(positions), packing.tokens)
  grid = plans.native_grid(_sizes(len(positions)), side, patch=packing.patch, max_tokens=most, max_grid=packing.grid_limit)
  return float(np.mean(plans.kept_count(grid, plans.drop_rates(packing, sides=side, seed=1, positions=positions))))


def _sizes(count: int) -> np.ndarray:
  """[n, 2] height and width, aspects from 1:2 to 2:1."""
  stretch = np.exp(np.random.default_rng(0).uniform(-0.5, 0.5, count) * np.log(2))
  return 512 * np.stack([stretch, 1 / stretch], axis=1)


def _pixels(*shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
