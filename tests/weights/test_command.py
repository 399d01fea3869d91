"""`python -m big_ssl.weights`: files in, files out, the way into training, and one clear message for each mistake."""

import json
import pickle

import engine
import jax
import jax.export
import numpy as np
import pytest

from big_ssl import setup, start
from big_ssl.core.checkpoint import Checkpointer
from big_ssl.core.config import InitFrom
from big_ssl.core.types import TrainState, UserError
from big_ssl.weights import export, hugging_face, transfer
from big_ssl.weights.__main__ import main
from big_ssl.weights.containers import read_file, write_npz, write_safetensors
from big_ssl.weights.families import dump
from big_ssl.weights.family import convert
from big_ssl.weights.keymap import Weights


def run(*argv, code=0):
  assert main([str(a) for a in argv]) == code


@pytest.fixture
def vit_file(golden, tmp_path):
  state = {k.removeprefix("state/"): v for k, v in golden("dino_vit_tiny").items() if k.startswith("state/")}
  write_safetensors(tmp_path / "dino.safetensors", state, metadata={})
  return tmp_path / "dino.safetensors"


def same(a, b):
  a, b = (transfer.read_directory(path).weights for path in (a, b))
  trees = [(a.flat(), b.flat()), (a.kept, b.kept)]
  return all(x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x) for x, y in trees)


HEADS = "--model.heads=3"


@pytest.mark.parametrize("form", ["official", "timm", "hf", "bigvision", "safetensors"])
def test_import_export_import_is_the_identity(vit_file, tmp_path, form):
  run("import", vit_file, f"--to={tmp_path / 'one'}", "--layout=dino", HEADS, "--license=Apache-2.0")
  to = {"hf": tmp_path / "hf", "bigvision": tmp_path / "x.npz"}.get(form, tmp_path / "x.safetensors")
  run("export", tmp_path / "one", f"--format={form}", f"--to={to}")
  file = to / "model.safetensors" if form == "hf" else to
  run("import", file, f"--to={tmp_path / 'two'}")
  one, two = (json.loads((tmp_path / d / "model.json").read_text()) for d in ("one", "two"))
  assert one["license"] == two["license"] == "Apache-2.0" and two["from"]["source_sha256"] == one["source_sha256"]
  assert two["position_rule"] == one["position_rule"] == "dino" and two["mean"] == one["mean"]
  if form == "bigvision":  # the slot of CLS is part of CLS there
    folded = transfer.read_directory(tmp_path / "two").weights.params["backbone"]
    whole = transfer.read_directory(tmp_path / "one").weights.params["backbone"]
    np.testing.assert_array_equal(folded["cls_token"], whole["cls_token"] + whole["pos_embed"][:, :1])
    assert two["model"]["class_position"] is False
  else:
    assert same(tmp_path / "one", tmp_path / "two")
    assert two["model"] == one["model"]
  if form == "official":
    original, again = read_file(vit_file).tensors, read_file(to).tensors
    assert set(original) == set(again) and all(np.array_equal(original[k], again[k]) for k in original)


def test_a_stablehlo_program_gives_the_features_of_the_model_for_any_batch(vit_file, tmp_path):
  run("import", vit_file, f"--to={tmp_path / 'one'}", "--layout=dino", HEADS)
  run("export", tmp_path / "one", "--format=stablehlo", f"--to={tmp_path / 'x.stablehlo'}")
  program = jax.export.deserialize(bytearray((tmp_path / "x.stablehlo").read_bytes()))
  saved = transfer.read_directory(tmp_path / "one")
  model = transfer.backbone(saved.card["model"])
  images = jax.random.normal(jax.random.key(0), (3, model.image_size, model.image_size, 3))
  wanted = model.apply({"params": saved.weights.params["backbone"]}, images, train=False)["pooled"]
  np.testing.assert_allclose(program.call(images), wanted, atol=1e-5)
  assert program.call(images[:1]).shape == (1, wanted.shape[1])
  assert set(program.platforms) == {"cpu", "cuda", "tpu"}


BESIDE = {"model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": 1e-5, "image_size": [16, 32], "hidden_act": "gelu_new"}


def test_what_transformers_states_in_config_json_is_read_and_what_is_not_here_is_refused(tmp_path):
  read = lambda **changes: (
    (tmp_path / "config.json").write_text(json.dumps(BESIDE | changes)) and hugging_face.given_beside(tmp_path / "x.safetensors")
  )
  assert read() == {"heads": 3, "layernorm_eps": 1e-5, "image_size": (16, 32), "gelu": "tanh"}
  assert "gelu" not in read(hidden_act="gelu") and "image_size" not in read(image_size=32)
  assert "gelu" not in read(hidden_act="relu", use_swiglu_ffn=True)  # which does not use it
  for wrong in ({"hidden_act": "relu"}, {"model_type": "regnet", "hidden_act": "gelu"}):
    with pytest.raises(UserError, match=f"config.json: hidden_act='{wrong['hidden_act']}'; the network here has one of"):
      read(**wrong)


def test_config_json_of_an_export_makes_the_network_that_was_exported():
  sizes = dict(variant="custom", width=48, depth=1, heads=3, patch=8, image_size=32)
  make = lambda layout, classes=0, **fields: hugging_face.model_config(layout, transfer.backbone({**fields}), classes=classes)
  vit = make("hf_vit", 7, name="vit", mlp_dim=100, qkv_bias=False, gelu="tanh", **sizes)
  assert vit["architectures"] == ["ViTForImageClassification"] and len(vit["id2label"]) == len(vit["label2id"]) == 7
  assert vit["qkv_bias"] is False and vit["hidden_act"] == "gelu_pytorch_tanh" and vit["intermediate_size"] == 100
  dinov2 = lambda mlp_dim, mlp: make("hf_dinov2", name="vit", mlp_dim=mlp_dim, mlp=mlp, layer_scale=1.0, **sizes)["mlp_ratio"]
  assert (dinov2(96, "gelu"), dinov2(128, "swiglu"), dinov2(96, "swiglu"), dinov2(64, "swiglu")) == (2, 4, 3, 2)
  with pytest.raises(UserError, match="mlp_dim=100.*multiples of the width 48"):
    dinov2(100, "gelu")
  assert make("hf_regnet", name="regnet", variant="400mf", se_ratio=0.0)["layer_type"] == "x"


SMALL_VIT = dict(name="vit", variant="custom", width=24, depth=1, heads=3, mlp_dim=48, patch=8, image_size=16)


def exported(form, **fields):
  """The export of a fresh ViT, and the ViT with its parameters."""
  fields = SMALL_VIT | fields
  model = transfer.backbone(fields)
  images = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
  params = jax.tree.map(np.asarray, model.init(jax.random.key(0), images, train=False)["params"])
  saved = transfer.Saved(Weights({"backbone": params}, {}), {"model": fields}, "student")
  return export.prepare(saved, form=form), lambda: np.asarray(model.apply({"params": params}, images, train=False)["tokens"])


def test_a_format_that_has_no_such_network_is_named_with_those_that_have():
  saved = transfer.Saved(Weights({}, {}), {"model": {"name": "resmlp"}}, "student")
  with pytest.raises(UserError, match="--format=torchvision: not for config.model.name='resmlp'; there are .*timm.*safetensors"):
    export.prepare(saved, form="torchvision")


@pytest.mark.parametrize(
  "form,fields,layout",
  [
    ("official", dict(layer_scale=0.1), "dinov2"),
    ("hf", dict(mlp="swiglu"), "hf_dinov2"),
    ("timm", dict(name="vit22b", dtype="float32"), "timm_parallel_vit"),
    ("timm", dict(name="flexivit", kernel_patch=4, pos_grid=2), "timm_vit"),
    ("bigvision", dict(pos_table="sincos2d"), "bigvision"),
    ("torchvision", dict(class_position=False), "torchvision_vit"),
  ],
)
def test_an_export_has_the_layout_whose_code_runs_the_network(form, fields, layout):
  found = exported(form, **fields)[0]
  assert found.layout.name == layout and found.model["name"] == "vit"


@pytest.mark.parametrize(
  "form,fields,named",
  [
    ("hf", dict(class_token=False), "class_token=False"),
    ("hf", dict(norm="rmsnorm"), "norm='rmsnorm'"),
    ("official", dict(patch_bias=False), "patch_bias=False"),
    ("bigvision", dict(qkv_bias=False), "qkv_bias=False"),
  ],
)
def test_an_export_that_would_load_and_give_other_numbers_is_refused(form, fields, named):
  with pytest.raises(UserError, match=f"--format={form}: the code of a .* does not have config.model.{named}"):
    exported(form, **fields)


@pytest.mark.parametrize("form,table", [("timm", "sincos"), ("hf", "sincos_scrambled"), ("official", "sincos2d")])
def test_fixed_positions_are_in_an_export_as_a_table(form, table):
  found, tokens = exported(form, pos_table=table)
  again = convert(found.tensors, layout=found.layout, given={"heads": 3}, expected=transfer.expected)
  images = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
  learned = transfer.backbone(again.model).apply({"params": again.weights.params["backbone"]}, images, train=False)["tokens"]
  np.testing.assert_allclose(learned, tokens(), atol=1e-5)


def test_half_precision_and_counters_come_back_as_they_were(tmp_path, golden):
  state = {k.removeprefix("state/"): v for k, v in golden("swav_resnet_tiny").items() if k.startswith("state/")}
  state["projection_head.0.weight"] = state["projection_head.0.weight"].astype(np.float16)
  write_safetensors(tmp_path / "swav.safetensors", {f"module.{k}": v for k, v in state.items()}, metadata={})
  run("import", tmp_path / "swav.safetensors", f"--to={tmp_path / 'one'}")
  saved = Checkpointer(tmp_path / "one")
  assert {v.dtype for k, v in saved.read().items() if k.startswith("params/")} == {np.dtype("float32")}
  saved.close()
  run("export", tmp_path / "one", "--format=official", f"--to={tmp_path / 'again.safetensors'}")
  again = read_file(tmp_path / "again.safetensors").tensors
  assert set(again) == set(state)
  assert all(np.array_equal(again[k], state[k]) and again[k].dtype == state[k].dtype for k in state)


@pytest.fixture
def msn_config():
  return engine.small("msn")


def test_training_starts_from_an_imported_file_and_its_run_is_exported(tmp_path, msn_config):
  started = setup.make_run(msn_config, devices=jax.devices()[:1])
  fresh = started.initial_state()
  moved = jax.tree.map(lambda x: x + 1, fresh.params["encoder"])
  official = dump("msn", Weights(moved, fresh.extra["batch_stats"]), heads=2)
  file = tmp_path / "msn.safetensors"
  write_safetensors(file, {f"module.{k}": v for k, v in official.items()}, metadata={})
  patch, side = msn_config.model["patch"], msn_config.model["image_size"]
  run("import", file, f"--to={tmp_path / 'in'}", "--model.heads=2", "--layout=msn")
  card = json.loads((tmp_path / "in" / "model.json").read_text())
  assert (card["model"]["patch"], card["model"]["image_size"]) == (patch, side)
  notes = engine.Notes()
  state = start.start_from(InitFrom(path=str(tmp_path / "in")), started.initial_state(), notes, model=started.method.model)
  jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], moved)
  jax.tree.map(np.testing.assert_array_equal, state.extra["teacher"], moved)  # starts as its student does
  assert "as initialized: params/prototypes" in notes.lines[-1]
  after, history = engine.train_steps(msn_config, state=state, stop=1)
  assert np.isfinite(history[0]["loss"])

  checkpointer = Checkpointer(tmp_path / "run")
  checkpointer.save(after, meta=started.meta())
  checkpointer.close()
  tree = {"model": dict(msn_config.model), "method": {"name": "msn"}}
  (tmp_path / "run" / "config.json").write_text(json.dumps(tree))
  run("export", tmp_path / "run", "--format=official", f"--to={tmp_path / 'out.safetensors'}")
  out = read_file(tmp_path / "out.safetensors").tensors
  wanted = dump("msn", Weights(after.extra["teacher"], after.extra["teacher_batch_stats"]), heads=2)
  assert set(out) == set(wanted) and all(np.array_equal(out[k], wanted[k]) for k in wanted)  # msn evaluates its teacher
  run("export", tmp_path / "run", "--format=hf", f"--to={tmp_path / 'hf'}")
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "vit_msn"
  left = json.loads((tmp_path / "hf" / "model.json").read_text())["left"]
  assert left and all(path.split("/")[1] == "head" for path in left)


GRAY_VIT = dict(name="vit", variant="custom", width=24, depth=1, heads=2, mlp_dim=48, patch=8, image_size=16)


def gray_run(directory, method):
  """A work directory as a run on gray images leaves it; the number of their channels is not in its config."""
  model = transfer.backbone({**GRAY_VIT, "channels": 1})
  params = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))(np.zeros((1, 16, 16, 1), np.float32))["params"]
  state = TrainState(step=np.int32(0), params={"encoder": {"backbone": params}}, opt_state={}, extra={"batch_stats": {}})
  checkpointer = Checkpointer(directory)
  checkpointer.save(state, meta={})
  checkpointer.close()
  (directory / "config.json").write_text(json.dumps({"model": GRAY_VIT, "method": method}))


@pytest.mark.parametrize(
  "method,mean,std",
  [
    (dict(name="simclr", mean=[0.5], std=[0.25]), [0.5], [0.25]),
    (dict(name="simclr"), "none", "none"),  # its default: pixels in [0, 1]
    (dict(name="swav"), [0.485, 0.456, 0.406], [0.228, 0.224, 0.225]),  # not ImageNet's usual one
  ],
)
def test_the_card_of_a_run_states_its_own_normalization_and_channels(tmp_path, method, mean, std):
  gray_run(tmp_path / "run", method)
  run("export", tmp_path / "run", "--format=hf", f"--to={tmp_path / 'hf'}")
  card, config, images = (
    json.loads((tmp_path / "hf" / f"{name}.json").read_text()) for name in ("model", "config", "preprocessor_config")
  )
  assert (card["mean"], card["std"], card["model"]["channels"]) == (mean, std, 1)
  assert config["num_channels"] == 1 and images["do_normalize"] is (mean != "none")
  assert mean == "none" or (images["image_mean"], images["image_std"]) == (mean, std)
  run("import", tmp_path / "hf" / "model.safetensors", f"--to={tmp_path / 'again'}")
  assert json.loads((tmp_path / "again" / "model.json").read_text())["mean"] == mean


def test_a_run_on_gray_images_is_exported_as_a_program(tmp_path):
  gray_run(tmp_path / "run", dict(name="simclr"))
  run("export", tmp_path / "run", "--format=stablehlo", f"--to={tmp_path / 'x.stablehlo'}")
  program = jax.export.deserialize(bytearray((tmp_path / "x.stablehlo").read_bytes()))
  assert program.call(np.zeros((2, 16, 16, 1), np.float32)).shape == (2, 24)


@pytest.mark.parametrize(
  "fields",
  [
    GRAY_VIT,
    dict(name="resnet", depth=18),
    dict(name="xcit", variant="nano12", patch=16),
    dict(name="alexnet"),
  ],
  ids=lambda fields: fields["name"],
)
def test_the_channels_of_any_backbone_are_read_off_its_tensors(fields):
  found = {path: np.broadcast_to(np.float32(0), shape) for path, shape in transfer.expected({**fields, "channels": 5}).items()}
  assert transfer.image_channels(fields, found) == {"channels": 5}


def test_what_lies_below_a_prefix_is_found_and_read(vit_file, tmp_path, capsys):
  inside = {f"net/model.visual.{k}": v for k, v in read_file(vit_file).tensors.items() if not k.startswith("head.")}
  write_npz(tmp_path / "deep.npz", inside)
  argv = ("import", tmp_path / "deep.npz", f"--to={tmp_path / 'd'}", HEADS)
  assert "below 'net/model.visual' lies a DINO ViT: --subtree=net/model.visual." in error(capsys, *argv)
  assert "below 'model.visual' lies a DINO ViT: --subtree=net/model.visual." in error(capsys, *argv, "--subtree=net")
  run(*argv, "--subtree=net/model.visual")


def test_damage_within_a_file_is_one_line_with_its_name(vit_file, tmp_path, capsys):
  write_npz(tmp_path / "bad.npz", dict(read_file(vit_file).tensors))
  raw = bytearray((tmp_path / "bad.npz").read_bytes())
  at = raw.index(b"blocks.0.mlp.fc1.weight.npy") + 400
  raw[at] ^= 255
  (tmp_path / "bad.npz").write_bytes(raw)
  found = error(capsys, "import", tmp_path / "bad.npz", f"--to={tmp_path / 'd'}", HEADS)
  assert "bad.npz: 'blocks.0.mlp.fc1.weight' is damaged" in found
  (tmp_path / "cut.pth").write_bytes(raw[: len(raw) // 2])
  assert "cut.pth: damaged" in (found := error(capsys, "show", tmp_path / "cut.pth")) and "a zip archive and is cut off" in found


def test_show_says_what_is_there_and_what_would_be_read(vit_file, capsys):
  run("show", vit_file, HEADS)
  out = capsys.readouterr().out
  for part in ("layout: timm_vit", "heads=3", "complete", "cls_token", "-> params/backbone/cls_token"):
    assert part in out


def test_a_public_file_in_a_config_is_told_how_to_be_imported(vit_file):
  with pytest.raises(UserError, match=r"python -m big_ssl\.weights import FILE --to=DIR"):
    start.start_from(InitFrom(path=str(vit_file)), None, engine.Notes(), model=None)


def test_shards_of_vissl_are_refused_with_the_command_that_joins_them(tmp_path):
  (tmp_path / "rank0.torch").write_bytes(pickle.dumps({"type": "shard", "classy_state_dict": {"w": np.ones(2)}}, 2))
  file = read_file(tmp_path / "rank0.torch")
  with pytest.raises(UserError, match=r"rank0\.torch: one shard.*convert_sharded_checkpoint\.py"):
    transfer.choose(file, None)


def error(capsys, *argv):
  run(*argv, code=2)
  text = capsys.readouterr().err
  assert text.startswith("error: ") and text.count("\n") == 1
  return text


def test_mistakes_are_one_line_each(vit_file, tmp_path, golden, capsys):
  to = f"--to={tmp_path / 'd'}"
  assert "give --model.heads=N" in error(capsys, "import", vit_file, to)
  assert "config.model.heads=5: must divide" in error(capsys, "import", vit_file, to, "--model.heads=5")
  wrong = error(capsys, "import", vit_file, to, HEADS, "--layout=msn_vit")
  assert "--layout=msn_vit: expected one of" in wrong
  family = error(capsys, "import", vit_file, to, HEADS, "--layout=swav")
  assert "not a SwAV" in family and "looks like a timm ViT" in family
  assert "--subtree=teacher" in error(capsys, "import", vit_file, to, HEADS, "--subtree=teacher")
  patch = error(capsys, "import", vit_file, to, HEADS, "--layout=dino", "--model.patch=4")
  assert "patch_embed.proj.weight" in patch and "of another shape" in patch
  assert "neither a run's" in error(capsys, "export", tmp_path, "--format=timm", "--to=x.safetensors")
  run("import", vit_file, to, HEADS, "--layout=dino")
  capsys.readouterr()
  assert "holds checkpoints already" in error(capsys, "import", vit_file, to, HEADS, "--layout=dino")
  assert "Did you mean 'timm'" in error(capsys, "export", tmp_path / "d", "--format=tim", "--to=x")
  assert ".safetensors" in error(capsys, "export", tmp_path / "d", "--format=timm", f"--to={tmp_path}/x.bin")


def test_a_partial_import_has_to_be_asked_for_and_lists_what_it_left(vit_file, tmp_path, capsys):
  tensors = dict(read_file(vit_file).tensors) | {"neck.weight": np.zeros(3, np.float32)}
  del tensors["blocks.1.mlp.fc2.bias"]
  write_safetensors(tmp_path / "cut.safetensors", tensors, metadata={})
  argv = ("import", tmp_path / "cut.safetensors", f"--to={tmp_path / 'd'}", HEADS, "--layout=dino")
  assert "missing 1: blocks.1.mlp.fc2.bias; unexpected 1: neck.weight" in error(capsys, *argv)
  run(*argv, "--allow-partial")
  out = capsys.readouterr().out
  assert "left: missing 1: blocks.1.mlp.fc2.bias" in out and "left: unexpected 1: neck.weight" in out
  assert json.loads((tmp_path / "d" / "model.json").read_text())["left"]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_center_of_a_full_checkpoint_of_dino_comes_in_with_its_head_and_goes_on(vit_file, tmp_path, capsys, batch_norm):
  run("import", vit_file, f"--to={tmp_path / 'trunk'}", HEADS, "--layout=dino")
  card = json.loads((tmp_path / "trunk" / "model.json").read_text())
  given = {f"model.{k}": v for k, v in card["model"].items()}
  sizes = {"method.num_prototypes": 12, "method.hidden_dim": 8, "method.bottleneck_dim": 4, "method.head_layers": 2}
  sizes["method.head_batch_norm"] = batch_norm
  options = given | sizes | {"init_from.path": str(tmp_path / "d")}
  new = setup.make_run(engine.small("dino", **options), devices=jax.devices()[:1])
  fresh, center = new.initial_state(), np.arange(12, dtype=np.float32)
  stats = {k: v for k, v in fresh.extra["teacher_batch_stats"].items() if k == "head"}
  head = dump("dino", Weights({"head": fresh.extra["teacher"]["head"]}, stats))
  both = {f"backbone.{k}": v for k, v in read_file(vit_file).tensors.items() if not k.startswith("head.")} | head
  full = {f"{tree}/{k}": v for tree in ("teacher", "student") for k, v in both.items()}
  write_npz(tmp_path / "full.npz", full | {"dino_loss/center": center[None]})
  run("show", tmp_path / "full.npz", HEADS, "--layout=dino")
  assert "for the pretraining to go on: center [12]" in capsys.readouterr().out
  run("import", tmp_path / "full.npz", f"--to={tmp_path / 'd'}", HEADS, "--layout=dino")
  assert "with the state of its pretraining: center" in capsys.readouterr().out
  notes = engine.Notes()
  after = start.start_from(new.config.init_from, fresh, notes, model=new.method.model)
  np.testing.assert_array_equal(after.extra["center"], center)
  assert "as initialized: none; with its center" in notes.lines[-1]


def test_student_and_teacher_of_a_file_can_come_together(vit_file, tmp_path):
  tensors = dict(read_file(vit_file).tensors)
  both = {f"student/module.backbone.{k}": v for k, v in tensors.items()}
  both |= {f"teacher/backbone.{k}": 2 * v for k, v in tensors.items()}
  write_npz(tmp_path / "both.npz", both)
  run("import", tmp_path / "both.npz", f"--to={tmp_path / 'd'}", HEADS, "--layout=dino", "--subtree=student,teacher")
  student, teacher = (transfer.read_directory(tmp_path / "d", tree=tree).weights for tree in ("student", "teacher"))
  norm = lambda weights: weights.params["backbone"]["norm"]["norm"]["scale"]
  np.testing.assert_array_equal(norm(student), tensors["norm.weight"])
  np.testing.assert_array_equal(norm(teacher), 2 * tensors["norm.weight"])
