"""The training step of a small ViT beside the same step in PyTorch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from big_ssl.benchmark.timing import rate


def bench(args: argparse.Namespace) -> dict:
  """Forward, backward and AdamW of a small ViT on the same batch, here and in PyTorch."""
  import jax
  import jax.numpy as jnp
  import optax

  from big_ssl.models.vit import ViT

  width, depth, heads, patch, side, batch = 192, 6, 3, 8, 64, args.batch_size
  model = ViT(variant="custom", width=width, depth=depth, heads=heads, mlp_dim=4 * width, patch=patch, image_size=side)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(batch, side, side, 3)), jnp.float32)
  params = model.init(jax.random.key(0), images, train=True)["params"]
  tx = optax.adamw(1e-4)
  opt_state = tx.init(params)

  @jax.jit
  def step(params, opt_state):
    grads = jax.grad(lambda p: jnp.mean(model.apply({"params": p}, images, train=True)["pooled"] ** 2))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  state = {"v": (params, opt_state)}

  def ours() -> int:
    state["v"] = jax.block_until_ready(step(*state["v"]))
    return batch

  result = {"big_ssl img/s": rate(ours, seconds=args.seconds), "device": jax.devices()[0].device_kind}
  theirs = _torch_step(width, depth, heads, patch, side, batch)
  if theirs is not None:
    result["torch img/s"] = rate(theirs, seconds=args.seconds)
    result["ratio to torch"] = result["big_ssl img/s"] / result["torch img/s"]
  return result


def _torch_step(width: int, depth: int, heads: int, patch: int, side: int, batch: int) -> Callable[[], int] | None:
  try:
    import torch
  except ImportError:
    return None
  device = "cuda" if torch.cuda.is_available() else "cpu"
  layer = torch.nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)

  class Small(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.patch = torch.nn.Conv2d(3, width, patch, patch)
      self.cls = torch.nn.Parameter(torch.zeros(1, 1, width))
      self.position = torch.nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
      self.blocks = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
      self.norm = torch.nn.LayerNorm(width)

    def forward(self, x):
      x = self.patch(x).flatten(2).transpose(1, 2)
      x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
      return self.norm(self.blocks(x))[:, 0]

  model = Small().to(device).train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
  images = torch.randn(batch, 3, side, side, device=device)

  def step() -> int:
    optimizer.zero_grad(set_to_none=True)
    (model(images) ** 2).mean().backward()
    optimizer.step()
    if device == "cuda":
      torch.cuda.synchronize()
    return batch

  return step
