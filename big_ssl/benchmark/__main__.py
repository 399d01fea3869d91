"""`python -m big_ssl.benchmark WHAT`: ratios measured side by side in one run, as a table and as JSON.

  input   images per second from JPEG files to the device boundary, and of the whole DINO multi-crop (2 x 224 + 8 x 96),
          beside a Pillow pipeline of the same operations
  step    the training step of a small ViT, beside the same step in PyTorch where torch is installed
  model   images per second and the share of the device's peak of a backbone's forward and backward pass, its compilation
          with and without scanned layers, beside timm's where torch and timm are installed
  packing images per second and padding of images of native aspect packed as in NaViT, beside squares of --size and padded
          single images, with as many tokens in a step
  eval    exact k-NN of 50,000 queries against a bank of 1.28M x 384 (synthetic): time, memory, and its share of the
          speed of a plain matrix product
  costs   parameters, FLOPs and activation bytes of every variant, computed and not measured
"""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import platform
import sys

from big_ssl.core.command import exit_code

_WHAT = ("input", "step", "model", "packing", "eval", "costs")


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="big_ssl.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=_WHAT)
  parser.add_argument("--data", default="", help="input: folder of JPEG files; default: made from the embedded sprites")
  parser.add_argument("--model", default="vit", help="model: a name in big_ssl/models")
  parser.add_argument("--fields", default="{}", help='model, packing: further fields of config.model as JSON, {"variant": "S"}')
  parser.add_argument("--timm", default="", help="model: the name there, such as vit_small_patch16_224")
  parser.add_argument("--size", type=int, default=224, help="model, costs, packing: side of the images")
  parser.add_argument("--tokens", type=int, default=2560, help="packing: tokens of a step")
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--canvas", type=int, default=512)
  parser.add_argument("--queries", type=int, default=50_000, help="eval: queries of the k-NN")
  parser.add_argument("--bank", type=int, default=1_281_167, help="eval: features that are searched")
  parser.add_argument("--dim", type=int, default=384, help="eval: dimensions of a feature")
  parser.add_argument("--k", type=int, default=20, help="eval: neighbors")
  parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
  parser.add_argument("--json", default="", help="also write the numbers here")
  args = parser.parse_args(argv)
  return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
  """Measures, prints the table and writes the JSON."""
  result = importlib.import_module(f"big_ssl.benchmark.{args.what}").bench(args)
  result |= {"machine": platform.processor() or platform.machine()} if result else {}
  for key, value in result.items():
    print(f"{key:<40} {value:.2f}" if isinstance(value, float) else f"{key:<40} {value}")
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
  sys.exit(main())
