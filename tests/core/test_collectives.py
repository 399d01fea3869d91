"""What a program sends between devices, counted from its text."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_ssl.core import collectives


def found(program):
  return {t.kind: (t.count, t.bytes) for t in collectives.traffic(program)}


def test_a_collective_in_a_loop_counts_as_often_as_it_runs(mesh8):
  x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh8, P("data")))

  def total(x):
    step = lambda carry, _: (carry + jnp.sum(jnp.sin(x * carry), axis=0), None)
    return jax.lax.scan(step, jnp.ones(4), length=5)[0]

  with jax.set_mesh(mesh8):
    program = jax.jit(total).lower(x).compile().as_text()
  assert found(program) == {"all-reduce": (5, 5 * 4 * 4)}


def test_a_gather_has_the_bytes_of_its_result(mesh8):
  x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh8, P("data")))
  program = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh8, P())).lower(x).compile().as_text()
  assert found(program) == {"all-gather": (1, 16 * 4 * 4)}
  assert "all-gather" in collectives.summary(program) and "1 times" in collectives.summary(program)


def test_asynchronous_starts_count_once():
  program = """HloModule m
ENTRY %main (p: f32[2,4]) -> f32[16,4] {
  %p = f32[2,4]{1,0} parameter(0)
  %s = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %d = f32[16,4]{1,0} all-gather-done(%s)
}
"""
  assert found(program) == {"all-gather": (1, 256)}


def test_a_program_of_one_device_sends_nothing():
  program = jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile().as_text()
  assert collectives.summary(program) == "a step sends nothing between devices"
