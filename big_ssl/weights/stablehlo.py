"""The features of a backbone as one StableHLO program with its weights inside, for runtimes without Python."""

from __future__ import annotations

import pathlib

import jax
import jax.export
import jax.numpy as jnp

from big_ssl.weights.describe import Fields
from big_ssl.weights.keymap import Weights
from big_ssl.weights.transfer import backbone

PLATFORMS = ("cpu", "cuda", "tpu")


def features_program(weights: Weights, fields: Fields) -> jax.export.Exported:
  """images [b, H, W, C] float32, normalized as the card says -> "pooled" [b, D] float32; any b, the model's image size.

  Lowered for CPU, CUDA and TPU at once; `jax.export.deserialize` reads it, and `mlir_module()` is its text.
  """
  model = backbone(fields)
  size = getattr(model, "image_size", 224)
  height, width = (size, size) if isinstance(size, int) else size
  variables = {"params": weights.params["backbone"], "batch_stats": weights.batch_stats.get("backbone", {})}
  shape = jax.export.symbolic_shape(f"b, {height}, {width}, {model.channels}")

  def pooled(images: jax.Array) -> jax.Array:
    return model.apply(variables, images, train=False)["pooled"].astype(jnp.float32)

  return jax.export.export(jax.jit(pooled), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, jnp.float32))


def write_program(path: pathlib.Path, weights: Weights, fields: Fields) -> None:
  """Writes the serialized program."""
  path.write_bytes(features_program(weights, fields).serialize())
