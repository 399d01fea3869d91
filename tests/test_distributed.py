"""Two processes of two devices equal one process of four."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import engine
import numpy as np

CODE = textwrap.dedent(
  """
  import sys, json
  sys.path.insert(0, "tests")
  import jax
  from big_ssl.core import sharding
  index, count, port, workdir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
  if count > 1:
    sharding.start_processes(f"localhost:{port}", num_processes=count, process_id=index, timeout_s=60)
    sharding.check_topology(sys.argv[5] if len(sys.argv) > 5 else "same")
  import engine, pathlib
  import numpy as np
  from jax.experimental import multihost_utils
  from big_ssl import setup, start, train
  from big_ssl.core.logger import Logger
  from big_ssl.evaluate import keeping_extractor
  images = {"data.train_examples": 120, "data.eval_examples": 37, "report.pictures": (),
            "evals.lowshot": {"images_per_class": 1, "splits": 2}}
  run = setup.make_run(engine.small("msn", **images))
  logger = Logger(pathlib.Path(workdir), total_steps=run.total_steps, examples_per_epoch=run.examples, batch_size=16,
                  write=index == 0, terminal=False)
  code = train.train(run, pathlib.Path(workdir), logger)
  logger.close()
  state, said = start.saved_state(run, pathlib.Path(workdir), logger), []
  for _ in range(2):
    extract = keeping_extractor(run, pathlib.Path(workdir), notice=said.append)
    extract.state = state
    features = extract("eval").features
    if count > 1:
      multihost_utils.sync_global_devices("written")
  assert len(said) == 1 and "read from" in said[0], said
  if index == 0:
    np.save(pathlib.Path(workdir) / "eval.npy", features)
  sys.exit(code)
  """
)


def launch(count, workdir, *, port, fingerprints=None):
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={4 // count}"  # the last one counts
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  args = lambda i: [sys.executable, "-c", CODE, str(i), str(count), str(port), str(workdir), *(fingerprints[i : i + 1] if fingerprints else [])]
  processes = [
    subprocess.Popen(args(i), cwd=engine.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i in range(count)
  ]
  outputs = [p.communicate(timeout=300)[0] for p in processes]
  return [p.returncode for p in processes], outputs


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def evaluations(workdir) -> dict[str, float]:
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {k: v for row in rows for k, v in row.items() if k.startswith(("eval/knn/", "eval/linear/", "eval/lowshot/"))}


def test_two_processes_equal_one_including_save_and_restore(tmp_path):
  from test_cli import losses

  codes, outputs = launch(1, tmp_path / "one", port=0)
  assert codes == [0], outputs[0]
  codes, outputs = launch(2, tmp_path / "two", port=free_port())
  assert codes == [0, 0], "\n".join(outputs)
  one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
  assert one.keys() == two.keys() and len(one) == 6
  assert all(abs(one[s] - two[s]) <= 1e-5 * abs(one[s]) for s in one), (one, two)
  assert (tmp_path / "two" / "checkpoints" / "6").is_dir()
  found = [np.load(tmp_path / name / "eval.npy") for name in ("one", "two")]  # 37 images in batches of 16
  assert found[0].shape == (37, 24)
  np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-4)
  scores = [evaluations(tmp_path / name) for name in ("one", "two")]
  assert {k.split("/")[1] for k in scores[0]} == {"knn", "linear", "lowshot"} and scores[0] == scores[1]


def test_a_process_with_another_config_is_named(tmp_path):
  codes, outputs = launch(2, tmp_path, port=free_port(), fingerprints=["a", "b"])
  assert codes != [0, 0]
  assert any("process 1" in o and "config and version" in o for o in outputs), outputs
