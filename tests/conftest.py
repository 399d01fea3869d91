"""Eight simulated devices, a compilation cache, and the goldens."""

import importlib.metadata
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
# Unoptimized code computes the same but for rounding, and compiles in half the time.
CHEAP = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a jaxlib that no longer knew these would refuse to start
  CHEAP += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {CHEAP}"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
  """Compiled functions of a file are dropped after it: hundreds of small networks would keep gigabytes."""
  yield
  import jax

  jax.clear_caches()


@pytest.fixture(scope="session")
def golden():
  """golden("msn_loss") -> the arrays of tests/goldens/msn_loss.npz by key."""

  def load(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "goldens" / f"{name}.npz", allow_pickle=False) as z:
      return {k: z[k] for k in z.files}

  return load


@pytest.fixture(scope="session")
def mesh8():
  """The engine's mesh of eight devices, all of them on the data axis."""
  import jax

  return jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
