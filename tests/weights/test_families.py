"""Every released layout: recognized, described, read completely, written back under the same names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.heads import ProjectionHead
from big_ssl.models.regnet import RegNet
from big_ssl.weights import transfer
from big_ssl.weights.families import LAYOUTS, dump, load
from big_ssl.weights.family import by_name, convert, detect
from big_ssl.weights.keymap import Weights

# file of the key tables: (layout, fields of config.model that must be found)
RELEASES = {
  "dino/dino_deitsmall16_pretrain.pth": ("dino", {"variant": "S", "patch": 16, "pos_rule": "dino"}),
  "dino/dino_deitsmall16_pretrain_full_checkpoint.pth:teacher": ("dino", {"variant": "S"}),
  "dino/dino_deitsmall16_pretrain_full_checkpoint.pth:student": ("dino", {"variant": "S"}),
  "dino/dino_resnet50_pretrain.pth": ("torchvision_resnet", {"depth": 50, "width": 1}),
  "dino/dino_xcit_small_12_p16_pretrain.pth": ("xcit", {"variant": "small12", "patch": 16}),
  "msn/vits16_800ep.pth.tar:target_encoder": ("msn", {"variant": "S", "pos_rule": "msn"}),
  "swav/swav_800ep_pretrain.pth.tar": ("swav", {"depth": 50}),
  "swav/swav_RN50w2_400ep_pretrain.pth.tar (backbone only)": ("torchvision_resnet", {"width": 2}),
  "swav/swav_RN50w4_400ep_pretrain.pth.tar (backbone only)": ("torchvision_resnet", {"width": 4}),
  "swav/deepclusterv2_800ep_pretrain.pth.tar": ("swav", {"depth": 50}),
  "paws/paws_imgnt_1percent_300ep.pth.tar:encoder (backbone+projection; prediction head under module.pred.* not listed)": (
    "paws",
    {"depth": 50},
  ),
  "vissl/seer_regnet32gf:classy_state_dict.base_model.model.trunk": ("seer", {"variant": "32gf"}),
  "xcit/xcit_tiny_24_p8_224.pth": ("xcit", {"variant": "tiny24", "patch": 8}),
  "deit/resmlp_12_dist.pth": ("resmlp", {"variant": "S12"}),
  "hf/facebook/vit-msn-small (model.safetensors)": ("hf_vit", {"variant": "S", "pos_rule": "hf"}),
  "hf/facebook/dino-vits16 (model.safetensors)": ("hf_vit", {"variant": "S"}),
  "hf/facebook/dinov2-with-registers-small": ("hf_dinov2_registers", {"registers": 4, "image_size": 518, "patch": 14}),
  "hf/facebook/regnet-y-320-seer (prefix regnet. in the file)": ("hf_regnet", {"variant": "32gf"}),
  "timm/vit_small_patch16_224.dino": ("timm_vit", {"variant": "S", "pos_rule": "antialias"}),
  "timm/vit_small_patch14_reg4_dinov2.lvd142m": ("timm_vit", {"registers": 4, "class_position": False}),
  "timm/xcit_small_12_p16_224": ("timm_xcit", {"variant": "small12"}),
  "timm/resmlp_12_224": ("timm_resmlp", {"variant": "S12"}),
  "timm/regnety_320.seer": ("timm_regnet", {"variant": "32gf"}),
  "timm/flexivit_small": ("timm_vit", {"variant": "S", "image_size": 240, "class_position": False}),
  "torchvision/resnet50": ("torchvision_resnet", {"depth": 50}),
}


def table(z, file):
  """Tensors of the released shapes that take no memory."""
  shapes = [tuple(int(n) for n in row if n >= 0) for row in z[f"{file}/shapes_pad_minus1"]]
  return {str(k): np.broadcast_to(np.float32(0), s) for k, s in zip(z[f"{file}/keys"], shapes, strict=True)}


def hints(file):
  place = file.partition(":")[2].split(".")[0].split(" ")[0]
  return (place, "safetensors" if file.startswith(("hf", "timm")) else "torch")


def test_the_list_of_releases_is_complete(golden):
  assert {key.removesuffix("/keys") for key in golden("checkpoint_key_tables") if key.endswith("/keys")} == set(RELEASES)


@pytest.mark.parametrize("file", RELEASES)
def test_every_tensor_of_a_release_has_a_place_and_shape_and_its_name_back(golden, file):
  tensors, (layout, fields) = table(golden("checkpoint_key_tables"), file), RELEASES[file]
  found = detect(tensors, LAYOUTS, hints=hints(file))
  assert found.name == layout
  imported = convert(tensors, layout=found, expected=transfer.expected)
  assert imported.model.items() >= fields.items()
  again = imported.tensors()
  assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in tensors.items()}


@pytest.mark.parametrize("file", ["dino/dino_resnet50_pretrain.pth", "hf/facebook/vit-msn-small (model.safetensors)"])
def test_a_missing_and_an_extra_tensor_are_named(golden, file):
  tensors = table(golden("checkpoint_key_tables"), file)
  name = next(k for k in tensors if k.endswith((".0.bn2.running_var", "layer.0.output.dense.bias")))
  broken = {k: v for k, v in tensors.items() if k != name} | {"strange.weight": np.zeros(3)}
  with pytest.raises(UserError, match=rf"missing 1: {name}.*unexpected 1: strange\.weight"):
    convert(broken, layout=detect(broken, LAYOUTS), expected=transfer.expected)


ONLY_ONE = ("timm_parallel_vit", "vit_pytorch_navit", "timm_naflex", "bigvision_naflex")  # no other fits


@pytest.mark.parametrize(
  "name,layout,given",
  [
    ("vit_dino_forward", "dino", {"heads": 3}),
    ("vit_dinov2_official_reg", "dinov2_registers", {"heads": 2}),
    ("msn_vit_tiny", "msn", {"heads": 4}),
    ("resnet_bottleneck_forward", "torchvision_resnet", {}),
    ("swav_resnet_tiny", "swav", {}),
    ("paws_wideresnet_tiny", "paws_wide_resnet", {}),
    ("loca_vit_tiny", "loca", {}),
    ("sela_alexnet_tiny", "alexnet", {}),
    ("vit_bigvision_old_layout", "bigvision", {}),
    ("vit_bigvision_scan_layout", "bigvision", {"image_size": (32, 24)}),
    ("vit_bigvision_map_forward", "bigvision", {"image_size": (24, 32)}),
    ("vit_hf_dinov2reg_swiglu_forward", "hf_dinov2_registers", {"heads": 3}),
    ("vit_dinov2_official_swiglu", "dinov2", {"heads": 2}),
    ("vit_timm_reg_gap_forward", "timm_vit", {"heads": 4}),
    ("vit_hf_vit_forward", "hf_vit", {"heads": 2}),
    ("vit22b_parallel_forward", "timm_parallel_vit", {}),
    ("navit_packing", "vit_pytorch_navit", {}),
    ("navit_factorised_timm", "timm_naflex", {"heads": 4}),
    ("navit_naflex_bigvision", "bigvision_naflex", {}),
  ],
)
def test_import_and_export_are_the_identity(golden, name, layout, given):
  state = {k.removeprefix("state/"): v for k, v in golden(name).items() if k.startswith("state/")}
  imported = convert(state, layout=by_name(layout, LAYOUTS), given=given, expected=transfer.expected)
  assert layout not in ONLY_ONE or detect(state, LAYOUTS).name == layout
  again = imported.tensors()
  assert again.keys() == state.keys()
  assert all(np.array_equal(again[k], state[k]) and again[k].dtype == state[k].dtype for k in state)


VIT = dict(name="vit", variant="custom", width=24, depth=2, heads=3, mlp_dim=40, patch=4, image_size=8)
PARALLEL = VIT | dict(block="parallel")
RESNET = dict(name="resnet", depth=50, blocks=(1, 1), stem_width=8, strides=(2,), width_per_group=128)
REGNET = dict(name="regnet", variant="custom", widths=(8, 16), depths=(1, 2), group_width=8)


@pytest.mark.parametrize(
  "layout,base,fields,name",
  [
    ("timm_vit", VIT, dict(qkv_bias=False), "blocks.0.attn.qkv.weight"),
    ("timm_vit", VIT, dict(class_token=False), "pos_embed"),
    ("timm_vit", VIT, dict(class_token=False, registers=1, pool="mean", final_norm="pooled"), "reg_token"),
    ("timm_vit", VIT, dict(class_token=False, pool="map"), "attn_pool.kv.weight"),
    ("timm_vit", VIT, dict(mlp="swiglu"), "blocks.1.mlp.fc1.weight"),
    ("timm_vit", VIT, dict(qk_norm="layernorm"), "blocks.1.attn.k_norm.bias"),
    ("timm_vit", VIT, dict(norm="rmsnorm", qk_norm="rmsnorm"), "blocks.1.attn.k_norm.weight"),
    ("timm_vit", VIT, dict(pre_norm=True, patch_bias=False), "norm_pre.weight"),
    ("timm_parallel_vit", PARALLEL, dict(qk_norm="layernorm", layer_scale=1.0), "blocks.1.in_proj.bias"),
    ("timm_parallel_vit", PARALLEL, dict(qkv_bias=False, norm="rmsnorm", class_token=False, pool="map"), "blocks.1.mlp_bias"),
    ("hf_vit", VIT, dict(qkv_bias=False), "encoder.layer.0.attention.attention.query.weight"),
    ("hf_dinov2_registers", VIT, dict(qkv_bias=False, mlp="swiglu", registers=1), "encoder.layer.0.mlp.weights_in.weight"),
    ("torchvision_vit", VIT, dict(), "encoder.layers.encoder_layer_1.self_attention.in_proj_weight"),
    ("torchvision_resnet", RESNET, dict(groups=4), "layer1.0.conv2.weight"),
    ("hf_regnet", REGNET, dict(se_ratio=0.0), "encoder.stages.0.layers.0.layer.2.convolution.weight"),
    ("timm_regnet", REGNET, dict(se_ratio=0.0), "s1.b1.conv3.conv.weight"),
  ],
)
def test_what_a_network_is_can_be_told_from_its_file(layout, base, fields, name):
  rng = np.random.default_rng(0)
  flat = {k: rng.normal(size=shape).astype(np.float32) for k, shape in transfer.expected(base | fields).items()}
  tensors = dump(layout, Weights.of(flat), **(base | fields))
  assert name in tensors and detect(tensors, LAYOUTS, hints=("safetensors",)).name == layout
  found = convert(tensors, layout=by_name(layout, LAYOUTS), given={"heads": 3} if base["name"] == "vit" else {}, expected=transfer.expected)
  assert {k: found.model.get(k) for k in fields} == fields
  again = found.weights.flat()
  assert again.keys() == flat.keys() and all(np.array_equal(again[k], flat[k]) for k in flat)


def test_the_bias_of_a_fused_projection_begins_with_that_of_the_mlp():
  flat = {k: np.full(shape, "mlp" in k, np.float32) for k, shape in transfer.expected(PARALLEL).items()}
  bias = dump("timm_parallel_vit", Weights.of(flat), **PARALLEL, qkv_bias=True)["blocks.0.in_proj.bias"]
  np.testing.assert_array_equal(bias, [1] * 40 + [0] * 72)


def test_the_first_files_of_torchvision_have_other_names():
  flat = {k: np.full(s, "fc2" in k, np.float32) for k, s in transfer.expected(VIT).items()}
  older = lambda name: name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")
  named = {older(k): v for k, v in dump("torchvision_vit", Weights.of(flat), **VIT).items()}
  found = convert(named, layout=detect(named, LAYOUTS), given={"heads": 3}, expected=transfer.expected)
  assert found.tensors().keys() == named.keys() and "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in named
  assert all(np.array_equal(value, flat[k]) for k, value in found.weights.flat().items())


def test_layer_scale_of_deit_iii_has_names_of_its_own():
  flat = {k: np.zeros(s, np.float32) for k, s in transfer.expected(VIT | dict(layer_scale=1.0)).items()}
  named = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in dump("timm_vit", Weights.of(flat), **VIT).items()}
  found = convert(named, layout=detect(named, LAYOUTS), given={"heads": 3}, expected=transfer.expected)
  assert found.model["layer_scale"] == 1.0 and found.tensors().keys() == named.keys() and "blocks.0.gamma_2" in named


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.bias", "blocks.0.norm1.bias", "patch_embed.proj.bias"])
def test_a_bias_that_one_layer_lacks_is_missing(name):
  flat = {k: np.zeros(s, np.float32) for k, s in transfer.expected(VIT).items()}
  tensors = dump("timm_vit", Weights.of(flat), **VIT)
  del tensors[name]
  with pytest.raises(UserError, match=f"missing 1: {name}"):
    convert(tensors, layout=by_name("timm_vit", LAYOUTS), given={"heads": 3}, expected=transfer.expected)


def test_shapes_with_which_no_network_can_be_are_told_in_one_line():
  flat = {k: np.zeros(s, np.float32) for k, s in transfer.expected(VIT).items()}
  tensors = dump("timm_vit", Weights.of(flat), **VIT)
  tensors["patch_embed.proj.weight"] = np.zeros((24, 48), np.float32)
  with pytest.raises(UserError, match=r"not the shapes of a timm ViT: .*patch_embed.proj.weight \[24, 48\]"):
    convert(tensors, layout=by_name("timm_vit", LAYOUTS), given={"heads": 3})


def test_positions_of_registers_are_refused_by_name():
  flat = {k: np.zeros(s, np.float32) for k, s in transfer.expected(VIT | dict(registers=2)).items()}
  tensors = dump("timm_vit", Weights.of(flat), **VIT)
  tensors["pos_embed"] = np.zeros((1, 1 + 2 + 4, 24), np.float32)
  with pytest.raises(UserError, match="'pos_embed' has 7 positions, those of 2 registers among them"):
    convert(tensors, layout=by_name("timm_vit", LAYOUTS), given={"heads": 3})


@pytest.mark.parametrize(
  "rename",
  [lambda n: f"module.backbone.{n}", lambda n: f"backbone.{n}", lambda n: n.replace("head.mlp", "projection_head.mlp")],
)
def test_wrappers_around_names_do_not_matter(golden, rename):
  file = "dino/dino_deitsmall16_pretrain_full_checkpoint.pth:teacher"
  bare = {k.removeprefix("backbone."): v for k, v in table(golden("checkpoint_key_tables"), file).items()}
  wrapped = {k if k.startswith("head.last") else rename(k): v for k, v in bare.items()}
  imported = convert(wrapped, layout=detect(wrapped, LAYOUTS), expected=transfer.expected)
  assert imported.layout.name == "dino" and imported.tensors().keys() == wrapped.keys()


def test_hugging_face_prefixes_are_optional_for_each_tensor(golden):
  """Classifiers of transformers write embeddings with and blocks without the prefix."""
  state = table(golden("checkpoint_key_tables"), "hf/facebook/vit-msn-small (model.safetensors)")
  mixed = {f"vit.{k}" if k.startswith("embeddings") else k: v for k, v in state.items()}
  mixed |= {"classifier.weight": np.zeros((5, 384), np.float32), "classifier.bias": np.zeros(5, np.float32)}
  imported = convert(mixed, layout=detect(mixed, LAYOUTS), expected=transfer.expected)
  assert imported.weights.params["head"]["fc"]["kernel"].shape == (384, 5)
  with pytest.raises(UserError, match="are the same tensor"):
    convert(state | {"vit.embeddings.cls_token": state["embeddings.cls_token"]}, layout=imported.layout)


def test_chunked_blocks_of_dinov2_are_numbered_through(golden):
  state = {k.removeprefix("state/"): v for k, v in golden("vit_dinov2_official_reg").items() if k.startswith("state/")}
  chunked = {k.replace("blocks.", "blocks.0."): v for k, v in state.items()}
  imported = load("dinov2_registers", chunked, heads=2)
  np.testing.assert_array_equal(
    imported.weights.params["backbone"]["block_2"]["mlp"]["fc1"]["bias"], state["blocks.2.mlp.fc1.bias"]
  )


def test_a_vissl_file_with_its_head_goes_to_encoder_and_prototypes():
  model = RegNet(variant="custom", widths=(8, 16), depths=(1, 2), group_width=8, stem_width=4)
  variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
  head = ProjectionHead(hidden=(6, 6), output=4, activation="relu").init(jax.random.key(0), jnp.zeros((2, 16)), train=False)
  trees = [{"backbone": variables[kind], "head": head[kind]} for kind in ("params", "batch_stats")]
  trees[0]["prototypes"] = {"head0": np.ones((9, 4), np.float32)}
  named = dump("seer", Weights(*trees), name="regnet")
  place = lambda k: f"heads/{k.removeprefix('heads.')}" if k.startswith("heads.") else f"trunk/_feature_blocks.{k}"
  file = {place(k): v for k, v in named.items()}
  imported = convert(file, layout=detect(file, LAYOUTS), expected=transfer.expected)
  assert imported.layout.name == "seer" and set(imported.weights.params) == {"backbone", "head", "prototypes"}
  assert "heads/0.projection_head.6.weight" in file and imported.tensors().keys() == file.keys()


def test_files_of_no_family_and_wrong_layouts_say_what_is_near(golden):
  with pytest.raises(UserError, match=r"of no family.*The nearest is a .*--layout=NAME"):
    detect({"cls_token": np.zeros(1), "pos_embed": np.zeros(1)}, LAYOUTS)
  with pytest.raises(UserError, match=r"--layout=dinno: expected one of dino, .*Did you mean 'dino'"):
    by_name("dinno", LAYOUTS)
  resnet = table(golden("checkpoint_key_tables"), "torchvision/resnet50")
  with pytest.raises(UserError, match=r"not a DINO ViT; missing 4: cls_token, .*It is a ResNet\."):
    convert(resnet, layout=by_name("dino", LAYOUTS), hint="It is a ResNet.")
