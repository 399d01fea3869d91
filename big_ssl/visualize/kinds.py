"""The kinds of pictures by name, and all those of a report."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence

from big_ssl.core.types import UserError
from big_ssl.visualize import attention, embedding, neighbors, pca, prototypes, views
from big_ssl.visualize.drawing import Picture
from big_ssl.visualize.subject import Options, Subject

Draw = Callable[[Subject, Options], list[Picture]]

KINDS: dict[str, Draw] = {
  "attention": attention.draw,
  "pca": pca.draw,
  "neighbors": neighbors.draw,
  "prototypes": prototypes.draw,
  "embedding": embedding.draw,
  "views": views.draw,
}


def draw_for_report(
  subject: Subject,
  directory: pathlib.Path,
  *,
  names: Sequence[str],
  count: int,
  write: bool = True,
  warn: Callable[[str], None] = print,
) -> None:
  """Writes directory/<name>.png of the kinds `names`; what a backbone does not have is left out, its older picture too.

  Every process calls it, and one writes. A failure of one kind, also to write it, is told in a line, and the others are
  drawn: no process may leave the rest alone with the next picture.
  """
  for name in names:
    pictures: list[Picture] = []
    with _told(name, warn):
      # Of the embedding only the part that takes no time.
      pictures = (embedding.draw_pca if name == "embedding" else KINDS[name])(subject, Options(count=count))
    with _told(name, warn):
      if write:
        (directory / f"{name}.png").unlink(missing_ok=True)
        for picture in pictures:
          picture.save(directory)


@contextlib.contextmanager
def _told(name: str, warn: Callable[[str], None]) -> Iterator[None]:
  try:
    yield
  except UserError:
    pass  # not every backbone has attention, nor every data set enough images
  except Exception as error:  # a picture is never worth a run
    warn(f"picture '{name}' not drawn: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}")
