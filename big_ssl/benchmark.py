"""`python -m big_ssl.benchmark input|step`: ratios measured side by side in one run, as a table and as JSON.

  input   images per second from JPEG files to the device boundary, and of the whole DINO multi-crop (2 x 224 + 8 x 96),
          beside a Pillow pipeline of the same operations
  step    the training step of a small ViT, beside the same step in PyTorch where torch is installed
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np


def rate(run: Callable[[], int], *, seconds: float) -> float:
  """Items per second of `run`, which returns how many it did; one call warms up."""
  run()
  done, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    done += run()
  return done / (time.perf_counter() - start)


def example_folder(directory: pathlib.Path, *, count: int = 64) -> pathlib.Path:
  """JPEG files of 500 x 375 made from the embedded sprites, for machines without photographs."""
  from PIL import Image

  from big_ssl.data import sprites

  world = sprites.render(np.arange(count), seed=0, size=96)
  for i, image in enumerate(world.image):
    noise = np.random.default_rng(i).normal(0, 8, (375, 500, 3))
    large = np.asarray(Image.fromarray(image).resize((500, 375), Image.Resampling.BICUBIC), np.float32)
    Image.fromarray(np.clip(large + noise, 0, 255).astype(np.uint8)).save(directory / f"{i:04d}.jpg", quality=90)
  return directory


def dino_views() -> tuple:
  """The three views of DINO (arXiv 2104.14294): two global crops of 224, eight local ones of 96."""
  from big_ssl.augment.photometric import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    Normalize,
    Solarize,
  )
  from big_ssl.core.method import View

  def view(name, size, count, scale, blur, solarize):
    augment = (
      ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
      Grayscale(p=0.2),
      GaussianBlur(p=blur, sigma=(0.1, 2.0)),
      *((Solarize(p=solarize, threshold=128 / 255),) if solarize else ()),
      Normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD),
    )
    return View(name=name, size=size, count=count, scale=scale, interpolation="bicubic", augment=augment)

  return (
    view("global1", 224, 1, (0.4, 1.0), 1.0, 0.0),
    view("global2", 224, 1, (0.4, 1.0), 0.1, 0.2),
    view("local", 96, 8, (0.05, 0.4), 0.5, 0.0),
  )


def pillow_multicrop(encoded: bytes, rng: np.random.Generator) -> list[np.ndarray]:
  """DINO's ten views of one JPEG with Pillow, the reference of the benchmark."""
  from PIL import Image, ImageEnhance, ImageFilter, ImageOps

  def crop(image, size, scale):
    width, height = image.size
    area = width * height * rng.uniform(*scale)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = min(width, round(np.sqrt(area * ratio))), min(height, round(np.sqrt(area / ratio)))
    x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))

  def jitter(image):
    for i in rng.permutation(4):
      if i < 3:
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
        image = enhance(image).enhance(rng.uniform(*((0.6, 1.4), (0.6, 1.4), (0.8, 1.2))[i]))
      else:
        h, s, v = image.convert("HSV").split()
        shifted = np.asarray(h) + np.uint8(int(rng.uniform(-0.1, 0.1) * 255) % 256)
        image = Image.merge("HSV", (Image.fromarray(shifted), s, v)).convert("RGB")
    return image

  image = Image.open(io.BytesIO(encoded)).convert("RGB")
  mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
  out = []
  for size, scale, blur, solarize in [(224, (0.4, 1), 1.0, 0.0), (224, (0.4, 1), 0.1, 0.2)] + [(96, (0.05, 0.4), 0.5, 0.0)] * 8:
    view = crop(image, size, scale)
    if rng.random() < 0.5:
      view = ImageOps.mirror(view)
    if rng.random() < 0.8:
      view = jitter(view)
    if rng.random() < 0.2:
      view = view.convert("L").convert("RGB")
    if rng.random() < blur:
      view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2)))
    if rng.random() < solarize:
      view = ImageOps.solarize(view, 128)
    out.append((np.asarray(view, np.float32) / 255 - mean) / std)
  return out


def bench_input(args: argparse.Namespace) -> dict:
  """Decoding and multi-crop, images per second and per core."""
  import jax

  from big_ssl.core.method import Inputs
  from big_ssl.core.step import prepare
  from big_ssl.data import source as source_lib
  from big_ssl.data.pipeline import Pipeline

  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(args.data) if args.data else example_folder(pathlib.Path(temporary))
    source = source_lib.open_splits(str(folder), split="", eval_split="")["train"]
    inputs, size = Inputs(views=dino_views()), args.batch_size
    make = lambda crop: Pipeline(source, inputs, batch_size=size, seed=0, rows=(0, size), canvas=args.canvas, crop=crop)
    device = make("device")
    batches = (raw for _, raw in device.iterate(0, 10**9))

    def decode() -> int:
      next(batches)
      return size

    decoded = rate(decode, seconds=args.seconds)
    step = jax.jit(lambda raw, key: prepare(inputs, raw, None, key))
    raw = jax.device_put(next(batches))

    def augment() -> int:
      jax.block_until_ready(step(raw, jax.random.key(0)))
      return size

    augmented = rate(augment, seconds=args.seconds)
    both = iter((raw for _, raw in make("device").iterate(0, 10**9)))

    def whole() -> int:
      jax.block_until_ready(step(jax.device_put(next(both)), jax.random.key(0)))
      return size

    multicrop = rate(whole, seconds=args.seconds)
    rng = np.random.default_rng(0)
    files = [source.read(i) for i in range(min(64, len(source)))]
    state = {"next": 0}

    def pillow() -> int:
      pillow_multicrop(files[state["next"] % len(files)], rng)
      state["next"] += 1
      return 1

    reference = rate(pillow, seconds=args.seconds)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return {
    "decode img/s": decoded,
    "decode img/s per core": decoded / cores,
    "multi-crop on the device img/s": augmented,
    "decode and multi-crop img/s": multicrop,
    "Pillow multi-crop img/s (one core)": reference,
    "ratio per core to Pillow": multicrop / cores / reference,
    "ratio to Pillow on one core": multicrop / reference,
    "cores": cores,
    "device": jax.devices()[0].device_kind,
  }


def bench_step(args: argparse.Namespace) -> dict:
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


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="big_ssl.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("input", "step"))
  parser.add_argument("--data", default="", help="folder of JPEG files; default: made from the embedded sprites")
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--canvas", type=int, default=512)
  parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
  parser.add_argument("--json", default="", help="also write the numbers here")
  args = parser.parse_args(argv)
  result = {"input": bench_input, "step": bench_step}[args.what](args)
  result |= {"machine": platform.processor() or platform.machine()}
  for key, value in result.items():
    print(f"{key:<40} {value:.2f}" if isinstance(value, float) else f"{key:<40} {value}")
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
