"""`python -m big_ssl.report --workdir=DIR`: report.html of a run, written anew from its work directory."""

from __future__ import annotations

import argparse
import pathlib
import sys

from big_ssl.core.command import exit_code


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="big_ssl.report", description=__doc__, allow_abbrev=False)
  parser.add_argument("--workdir", required=True, type=pathlib.Path, help="of a run")
  parser.add_argument("--out", type=pathlib.Path, default=None, help="the file to write; default WORKDIR/report.html")
  args = parser.parse_args(argv)
  from big_ssl.report.write import write_page

  return exit_code(lambda: print(write_page(args.workdir, to=args.out)))


if __name__ == "__main__":
  sys.exit(main())
