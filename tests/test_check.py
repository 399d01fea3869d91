"""--mode=check plans for devices that are not there."""

import os
import subprocess
import sys

import engine


def check(*flags):
  small = [f"--config.{k}={v}" for k, v in (engine.SMALL | engine.TINY["vit"]).items()]
  command = [sys.executable, "-m", "big_ssl.main", "--config=configs/supervised.py", *small, *flags]
  environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  return subprocess.run(command, cwd=engine.ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_bytes_per_device_and_collectives_are_printed_for_simulated_devices():
  mesh = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.mesh.fsdp_min_size=64")
  done = check("--mode=check", "--devices=16", *mesh)
  assert done.returncode == 0, done.stderr
  assert "MiB per device" in done.stdout and "mesh data:2 fsdp:4 tensor:2" in done.stdout
  assert "collectives of a step" in done.stdout and "all-gather" in done.stdout and "all-reduce" in done.stdout


def test_devices_are_simulated_for_a_check_only():
  done = check("--devices=16")
  assert done.returncode == 2 and "--devices=16: simulated devices are for --mode=check" in done.stderr
