"""`python -m big_ssl.visualize KIND --workdir=DIR`: pictures of what a trained backbone sees, as PNG files.

  attention    attention of the class token per head of a block (ViT)
  pca          principal components of patch features as colors, foreground by the first of them
  neighbors    images and those whose features are nearest
  prototypes   images per prototype, or per cluster of k-means where the method has none
  embedding    all images in a plane: PCA; t-SNE and UMAP where scikit-learn and umap-learn are installed
  views        the augmented crops that the method is trained on

The config is read from the work directory. Any key is a flag where something has moved: --config.data.source=PATH
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys

from big_ssl.core.command import exit_code

NAMES = ("attention", "pca", "neighbors", "prototypes", "embedding", "views")
_SPELLINGS = {"neighbours": "neighbors"}


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
  """The flags, and the `--config.a.b=value` overrides as {"a.b": "value"}."""
  overrides = dict(i.removeprefix("--config.").partition("=")[::2] for i in argv if i.startswith("--config."))
  parser = argparse.ArgumentParser(
    prog="big_ssl.visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("kind", type=lambda name: _SPELLINGS.get(name, name), choices=NAMES, metavar="KIND", help=", ".join(NAMES))
  parser.add_argument("--workdir", required=True, help="of a run with a checkpoint")
  parser.add_argument("--images", default="", help="a folder of pictures of any size; default: the evaluation images of the run")
  parser.add_argument("--config", default="", help="a config file instead of the work directory's config.json")
  parser.add_argument("--step", type=int, default=None, help="of the checkpoint; default the newest")
  parser.add_argument("--out", default="", help="folder for the PNG files; default WORKDIR/pictures, or DIR of --images there")
  parser.add_argument("--count", type=int, default=8, help="how many images, or prototypes")
  parser.add_argument("--size", default="", help="side of the images as the backbone sees them, 480 or 480x640; default: their aspect")
  parser.add_argument("--layer", type=int, default=-1, help="attention: block, from 0; -1 is the last")
  parser.add_argument("--clusters", type=int, default=0, help="prototypes: k-means with so many clusters")
  return parser.parse_args([i for i in argv if not i.startswith("--config.")]), overrides


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # as `big_ssl.main`: tensorflow only decodes
  from big_ssl import setup
  from big_ssl.core.checkpoint import quiet_storage
  from big_ssl.core.types import UserError
  from big_ssl.visualize.kinds import KINDS
  from big_ssl.visualize.subject import Options, open_run

  size = re.fullmatch(r"(\d+)(?:x(\d+))?", args.size)
  if args.size and (size is None or min(int(g) for g in size.groups() if g) < 1):
    raise UserError(f"--size={args.size}: expected a side in pixels such as 480, or height x width such as 480x640.")
  if args.count < 1:
    raise UserError(f"--count={args.count}: expected at least 1.")
  sides = tuple(int(g or size[1]) for g in size.groups()) if size else ()
  quiet_storage()
  setup.keep_compiled()
  workdir = pathlib.Path(args.workdir)
  subject = open_run(workdir, spec=args.config, overrides=overrides, step=args.step)
  subject = subject.of_folder(args.images) if args.images else subject
  options = Options(count=args.count, size=sides, layer=args.layer, clusters=args.clusters)
  own = workdir / "pictures" / (pathlib.Path(args.images).expanduser().resolve().name if args.images else "")
  for picture in KINDS[args.kind](subject, options):
    print(f"{picture.save(pathlib.Path(args.out) if args.out else own)}: {picture.caption}")
  return 0


def main(argv: list[str] | None = None) -> int:
  args, overrides = parse(sys.argv[1:] if argv is None else argv)
  return exit_code(lambda: run(args, overrides))


if __name__ == "__main__":
  sys.exit(main())
