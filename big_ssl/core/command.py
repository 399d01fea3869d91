"""How every command ends: what its user did wrong is one line on stderr, and so is Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_code(run: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
  """That of `run`, 0 where it gives none; 2 after a `UserError`, 130 after Ctrl-C with the line `interrupted`."""
  from big_ssl.core.types import UserError  # here, as it loads jax, and the flags of a command need none

  try:
    return run() or 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(interrupted, file=sys.stderr)
    return 130
