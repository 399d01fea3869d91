"""From JPEG files to augmented views: decoding, the multi-crop of DINO, and both, beside Pillow."""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import tempfile

import numpy as np

from big_ssl.benchmark.timing import rate


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


def bench(args: argparse.Namespace) -> dict:
  """Decoding and multi-crop, images per second and per core."""
  import jax

  from big_ssl.core.method import Inputs
  from big_ssl.core.step import prepare
  from big_ssl.data import opening
  from big_ssl.data.pipeline import Pipeline

  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(args.data) if args.data else example_folder(pathlib.Path(temporary))
    source = opening.open_splits(str(folder), split="", eval_split="")["train"]
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
