"""The notebooks run from top to bottom, on small data."""

import json

import engine
import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from big_ssl.weights.containers import write_safetensors

NOTEBOOKS = sorted((engine.ROOT / "launch" / "colab").glob("*.ipynb"))
TINY = " ".join(f"--config.{k}={json.dumps(v).replace(' ', '')}" for k, v in (engine.SMALL | engine.TINY["vit"] | {"total": "4steps"}).items())


def small(name: str, tmp_path, golden) -> dict:
  """What the cell "parameters" is given."""
  photos = tmp_path / "photos"
  photos.mkdir()
  rng = np.random.default_rng(0)
  for i in range(24):
    Image.fromarray(rng.integers(0, 256, (40 + i, 56, 3), np.uint8)).save(photos / f"{i:02}.png")
  workdir = {"WORKDIR": str(tmp_path / "run")}
  if name == "evaluate":
    quick = '--config.evals.linear={"l2":[1e4]} --config.evals.lowshot={"splits":1}'
    return workdir | {"FLAGS": f"{TINY} --config.data.train_examples=400 {quick}"}
  if name == "own_images":
    return workdir | {"IMAGES": str(photos), "STEPS": 4, "FLAGS": TINY.replace("--config.total=4steps ", "")}
  file = tmp_path / "dino.safetensors"
  write_safetensors(file, {k[6:]: v for k, v in golden("dino_vit_tiny").items() if k.startswith("state/")}, metadata={})
  head = "--config.method.num_prototypes=8 --config.method.hidden_dim=16 --config.batch_size=8"
  return workdir | {"FILE": str(file), "IMAGES": str(photos), "SIZE": 32, "MODEL": ["--model.heads=3"], "FLAGS": head}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_from_top_to_bottom(file, tmp_path, golden):
  notebook = nbformat.read(file, as_version=4)
  nbformat.validate(notebook)
  assert not any(cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"
  parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
  known = {line.split(" = ")[0] for line in parameters.source.splitlines()}
  given = small(file.stem, tmp_path, golden)
  assert set(given) <= known
  parameters.source += "".join(f"\n{key} = {value!r}" for key, value in given.items())
  client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(engine.ROOT)}})
  done = client.execute()
  pictures = [out for cell in done.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
  assert len(pictures) >= 2
