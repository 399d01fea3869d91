"""The key maps of torch ViTs: bit for bit, complete, and clear about what they do not know."""

import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.weights import transfer
from big_ssl.weights.families import LAYOUTS, by_name, load
from big_ssl.weights.family import convert


def state_of(z):
  return {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}


@pytest.mark.parametrize(
  "name,layout,heads",
  [("msn_vit_tiny", "msn", 4), ("vit_dino_forward", "dino", 3), ("vit_dinov2_official_reg", "dinov2_registers", 2)],
)
def test_weights_round_trip_bit_for_bit(golden, name, layout, heads):
  state = state_of(golden(name))
  given = {"heads": heads} | ({"image_size": 28} if "registers" in layout else {})
  again = convert(state, layout=by_name(layout, LAYOUTS), given=given, expected=transfer.expected).tensors()
  assert again.keys() == state.keys()
  assert all(np.array_equal(again[k], state[k]) for k in state)


@pytest.mark.parametrize("name", ["blocks.0.attn.q_norm.weight", "fc.fc1.scale.weight", "head.mlp.0.weights"])
def test_an_unknown_tensor_is_named(golden, name):
  with pytest.raises(UserError, match=f"unexpected 1: {name}"):
    load("dino", state_of(golden("dino_vit_tiny")) | {name: np.zeros(3)}, heads=3)
