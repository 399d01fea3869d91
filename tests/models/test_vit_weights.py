"""The key map of the official ViTs: bit for bit, complete, and clear about what it does not know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.encoder import Encoder
from big_ssl.models.heads import ProjectionHead
from big_ssl.models.vit import ViT
from big_ssl.weights.vit import export_vit, import_vit


def state_of(z):
  return {k.removeprefix("state/"): v for k, v in z.items() if k.startswith("state/")}


@pytest.mark.parametrize("name,heads", [("msn_vit_tiny", 4), ("vit_dino_forward", 3), ("vit_dinov2_official_reg", 2)])
def test_weights_round_trip_bit_for_bit(golden, name, heads):
  state = {k: v for k, v in state_of(golden(name)).items() if "num_batches" not in k and k != "mask_token"}
  again = export_vit(import_vit(state, heads=heads))
  assert again.keys() == state.keys()
  assert all(np.array_equal(again[k], state[k]) for k in state)


@pytest.mark.parametrize("name", ["blocks.0.attn.q_norm.weight", "fc.fc1.scale.weight", "head.mlp.0.weight"])
def test_an_unknown_tensor_is_named(golden, name):
  with pytest.raises(UserError, match=f"'{name}'"):
    import_vit(state_of(golden("dino_vit_tiny")) | {name: np.zeros(3)}, heads=3)


@pytest.mark.parametrize("file", ["dino/dino_deitsmall16_pretrain.pth", "msn/vits16_800ep.pth.tar:target_encoder"])
def test_every_tensor_of_the_released_files_has_its_place_and_shape(golden, file):
  z = golden("checkpoint_key_tables")
  shapes = [tuple(int(n) for n in row if n >= 0) for row in z[f"{file}/shapes_pad_minus1"]]
  # zeros without memory: only shapes matter
  state = {str(k): np.broadcast_to(np.float32(0), s) for k, s in zip(z[f"{file}/keys"], shapes, strict=True)}
  weights = import_vit(state, heads=6)
  head = ProjectionHead(hidden=(2048, 2048), output=256) if file.startswith("msn") else None
  encoder = Encoder(ViT(variant="S"), head)
  wanted = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False))
  shape = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  assert shape(weights.params) == shape(wanted["params"])
  assert shape(weights.batch_stats) == shape(wanted.get("batch_stats", {}))
