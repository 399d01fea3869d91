"""All layouts of weights that can be read and written; the order decides where a file fits several equally well."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from big_ssl.weights.convnet_layouts import CONVNET_LAYOUTS
from big_ssl.weights.family import Imported, Layout, by_name, convert
from big_ssl.weights.keymap import Weights
from big_ssl.weights.navit_layouts import NAVIT_LAYOUTS
from big_ssl.weights.vit_layouts import VIT_LAYOUTS

LAYOUTS: tuple[Layout, ...] = VIT_LAYOUTS + NAVIT_LAYOUTS + CONVNET_LAYOUTS


def load(layout: str, tensors: Mapping[str, np.ndarray], **given: object) -> Imported:
  """Tensors of a known layout as our trees; names and what the layout fixes are checked, sizes are not.

  Args:
    layout: a name of `LAYOUTS`.
    tensors: {name in the file: array}.
    **given: fields of `config.model` that the file does not say, such as heads=2.
  """
  return convert(tensors, layout=by_name(layout, LAYOUTS), given=given)


def dump(layout: str, weights: Weights, **fields: object) -> dict[str, np.ndarray]:
  """Our trees under the names of a layout.

  Args:
    layout: a name of `LAYOUTS`.
    weights: of a model of that layout.
    **fields: of `config.model`, as far as the layout's rules ask for them: heads, depth, image_size and patch of a ViT.
  """
  return by_name(layout, LAYOUTS).keymap(fields, list(weights.flat())).dump(weights)
