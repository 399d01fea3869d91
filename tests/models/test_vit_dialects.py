"""One ViT in the dialects of timm, Hugging Face, DINOv2 and big_vision: features, attention and gradients of their networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.core.types import UserError
from big_ssl.models.encoder import Encoder
from big_ssl.models.heads import Classifier
from big_ssl.models.vit import ViT
from big_ssl.weights.bigvision import big_vision
from big_ssl.weights.heads import classifier
from big_ssl.weights.keymap import KeyMap
from big_ssl.weights.vit import hugging_face, official


def part(z, prefix):
  return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}


def config_of(z):
  return {k: v.item() if v.ndim == 0 else tuple(v.tolist()) for k, v in part(z, "config/").items()}


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, -3, -1))


def nchw(x):
  return np.moveaxis(np.asarray(x), -1, -3)


def close(a, b, message=""):
  np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=2e-5, err_msg=message)


def load(z, *rules):
  """The weights of a file, after a look at whether they come out again bit for bit."""
  keymap, state = KeyMap("ViT", rules), part(z, "state/")
  weights = keymap.load(state)
  again = keymap.dump(weights)
  assert again.keys() == state.keys() and all(np.array_equal(again[k], state[k]) for k in state)
  return weights


def sequence(out):
  """CLS, registers and patches as public code returns them."""
  return jnp.concatenate([out["cls"][:, None], *([out["registers"]] if "registers" in out else []), out["tokens"]], axis=1)


def forward(module, params, images, *, weight, read, **kwargs):
  """Outputs, and the gradient of sum(read(outputs) * weight) with respect to the images."""

  @jax.jit
  def both(images):
    def loss(images):
      out = module.apply({"params": params}, images, train=False, **kwargs)
      return jnp.sum(read(out) * weight), out

    return jax.value_and_grad(loss, has_aux=True)(images)

  (_, out), grad = both(images)
  return out, grad


def timm_encoder(c, **kwargs):
  backbone = ViT(
    variant="custom",
    width=c["embed_dim"],
    depth=c["depth"],
    heads=c["num_heads"],
    mlp_dim=int(c["mlp_ratio"] * c["embed_dim"]),
    patch=c["patch_size"],
    image_size=c["img_size"],
    pos_rule="antialias",
    **kwargs,
  )
  return Encoder(backbone, Classifier(c["num_classes"]))


@pytest.mark.parametrize("name", ["vit_timm_forward", "vit_timm_reg_gap_forward"])
@pytest.mark.parametrize("tag", ["native", "nonsquare"])
def test_timm_networks(golden, name, tag):
  z = golden(name)
  c = config_of(z)
  weights = load(z, *official(heads=c["num_heads"], registers="reg_token"), *classifier("head"))
  gap = {"registers": 3, "class_position": False, "layer_scale": 0.1, "pool": "mean", "final_norm": "pooled"}
  encoder = timm_encoder(c, **(gap if "gap" in name else {}))
  wanted = part(z, f"{tag}/output/")
  out, grad = forward(
    encoder,
    weights.params,
    nhwc(z[f"{tag}/input"]),
    weight=z[f"{tag}/grad_weight"],
    read=lambda out: out["projection"],
    token_layers=tuple(range(c["depth"])),
  )
  close(sequence(out), wanted["features"])
  for i, tokens in out["token_layers"].items():
    close(tokens, np.concatenate([wanted[f"block{i}_prefix"], wanted[f"block{i}_patch"]], 1), f"block {i}")
  close(out["pooled"], wanted["pre_logits"])
  close(out["projection"], wanted["logits"])
  close(nchw(grad), z[f"{tag}/grad/input"])


HUGGING_FACE = {
  "vit_hf_vit_forward": {},
  "vit_hf_msn_forward": {},
  "vit_hf_dinov2_forward": {"layer_scale": 1.0},
  "vit_hf_dinov2reg_forward": {"layer_scale": 1.0, "registers": 4, "pos_rule": "antialias"},
  "vit_hf_dinov2reg_swiglu_forward": {"layer_scale": 1.0, "registers": 2, "pos_rule": "antialias", "mlp": "swiglu"},
}


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize("tag", ["native", "nonsquare"])
def test_hugging_face_networks(golden, name, tag, monkeypatch):
  z = golden(name)
  c, fields = config_of(z), HUGGING_FACE[name]
  weights = load(z, *hugging_face(heads=c["num_attention_heads"], dinov2="dinov2" in name))
  hidden = c["intermediate_size"] if "intermediate_size" in c else c["mlp_ratio"] * c["hidden_size"]
  if fields.get("mlp") == "swiglu":
    hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
  depth = c["num_hidden_layers"]
  model = ViT(
    variant="custom",
    width=c["hidden_size"],
    depth=depth,
    heads=c["num_attention_heads"],
    mlp_dim=hidden,
    patch=c["patch_size"],
    image_size=c["image_size"],
    layernorm_eps=c["layer_norm_eps"],
    **({"pos_rule": "hf"} | fields),
  )
  embedded, blocks = [], ViT._blocks
  see = lambda x: jax.debug.callback(lambda value: embedded.append(np.asarray(value)), x)
  monkeypatch.setattr(ViT, "_blocks", lambda self, x, **kwargs: see(x) or blocks(self, x, **kwargs))
  out, grad = forward(
    model,
    weights.params["backbone"],
    nhwc(z[f"{tag}/input"]),
    weight=z[f"{tag}/grad_weight"],
    read=sequence,
    token_layers=tuple(range(depth)),
    attention_layers=(depth - 1,),
  )
  jax.effects_barrier()
  wanted = part(z, f"{tag}/output/")
  close(embedded[0], wanted["hidden_state_0"])
  for i in range(depth):
    close(out["token_layers"][i], wanted[f"hidden_state_{i + 1}"], f"block {i}")
  close(sequence(out), wanted["last_hidden_state"])
  close(out["attention"][depth - 1], wanted["last_attention"])
  close(nchw(grad), z[f"{tag}/grad/input"])


DINOV2 = {
  "vit_dinov2_official_reg": {"registers": 3, "pos_rule": "antialias", "mlp_dim": 96},
  "vit_dinov2_official_swiglu": {"mlp": "swiglu", "mlp_dim": 88},
}


@pytest.mark.parametrize("name", DINOV2)
@pytest.mark.parametrize("tag", ["native", "nonsquare"])
def test_dinov2_networks_with_masked_patches(golden, name, tag):
  z = golden(name)
  c = config_of(z)
  weights = load(z, *official(heads=c["num_heads"]))
  params = dict(weights.params["backbone"]) | {"mask_token": z["state/mask_token"]}
  model = ViT(
    variant="custom",
    width=32,
    depth=c["depth"],
    heads=2,
    patch=7,
    image_size=28,
    layer_scale=1.0,
    mask_token=True,
    **DINOV2[name],
  )
  images, masks, wanted = nhwc(z[f"{tag}/input"]), z[f"{tag}/masks"], part(z, f"{tag}/output/")
  last = (c["depth"] - 2, c["depth"] - 1)

  @jax.jit
  def run(token, images):
    variables = {"params": params | {"mask_token": token}}
    plain = model.apply(variables, images, train=False, token_layers=last)
    out = model.apply(variables, images, train=False, masked=masks, token_layers=last[1:])
    read = jnp.concatenate([out["cls"], out["tokens"].mean(1)], axis=1)
    return jnp.sum(read * z[f"{tag}/grad_weight"]), (plain, out)

  (_, outs), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(params["mask_token"], images)
  for prefix, out in zip(("", "masked_"), outs, strict=True):
    close(out["cls"], wanted[f"{prefix}x_norm_clstoken"])
    close(out["tokens"], wanted[f"{prefix}x_norm_patchtokens"])
    close(out["token_layers"][last[1]], wanted[f"{prefix}x_prenorm"])
    if "registers" in DINOV2[name]:
      close(out["registers"], wanted[f"{prefix}x_norm_regtokens"])
  for i, layer in enumerate(last):
    close(outs[0]["token_layers_normed"][layer][:, 0], wanted[f"last2_{i}_cls"])
    first = 1 + model.registers
    close(outs[0]["token_layers_normed"][layer][:, first:], wanted[f"last2_{i}_patch"])
  close(grads[0], z[f"{tag}/grad/mask_token"])
  close(nchw(grads[1]), z[f"{tag}/grad/input"])


def big_vision_encoder(z, image_size, table=None, **kwargs):
  """Of the released code: tanh GELU, positions of the patches only."""
  state, table = part(z, "state/"), table or config_of(z)
  pool = {"tok": "cls", "gap": "mean", "map": "map"}[table["pool_type"]]
  backbone = ViT(
    variant="custom",
    width=table["width"],
    depth=table["depth"],
    heads=table["num_heads"],
    mlp_dim=table["mlp_dim"],
    patch=table["patch_size"][0],
    image_size=image_size,
    gelu="tanh",
    pool=pool,
    class_token=pool == "cls",
    pos_table="sincos2d" if table["posemb"] == "sincos2d" else "learned",
    pos_rule="linear",
    **({"class_position": False} | kwargs),
  )
  width = table["width"] if "pre_logits/kernel" in state else 0
  return Encoder(backbone, Classifier(table["num_classes"], pre_logits=width))


@pytest.mark.parametrize("pool,image_size", [("tok", (32, 24)), ("gap", 32), ("map", (24, 32))])
def test_big_vision_networks(golden, pool, image_size):
  z = golden(f"vit_bigvision_{pool}_forward")
  encoder, weights = big_vision_encoder(z, image_size), load(z, *big_vision())
  out, grad = forward(
    encoder,
    weights.params,
    jnp.asarray(z["input"]),
    weight=z["grad_weight"],
    read=lambda out: out["projection"],
    token_layers=tuple(range(encoder.backbone.depth)),
  )
  close(sequence(out) if "cls" in out else out["tokens"], z["output/encoded"])
  for i, tokens in out["token_layers"].items():
    close(tokens, z[f"output/block{i:02d}_after"], f"block {i}")
  close(out["pooled"], z["output/head_input"])
  close(out["projection"], z["output/logits"])
  close(grad, z["grad/input"])


def test_big_vision_scanned_and_old_files(golden):
  shared = {"patch_size": (8, 8), "width": 32, "num_heads": 4, "posemb": "learn"}
  z = golden("vit_bigvision_scan_layout")
  table = shared | {"depth": 3, "mlp_dim": 80, "pool_type": "gap", "num_classes": 7}
  encoder, weights = big_vision_encoder(z, (32, 24), table, scan=True), load(z, *big_vision(depth=3))
  run = lambda encoder, z: jax.jit(lambda x: encoder.apply({"params": weights.params}, x, train=False))(z["input"])
  close(run(encoder, z)["projection"], z["output/logits"])
  z = golden("vit_bigvision_old_layout")
  table = shared | {"depth": 2, "mlp_dim": 64, "pool_type": "tok", "num_classes": 5}
  encoder, weights = big_vision_encoder(z, 32, table, class_position=True), load(z, *big_vision(old=True))
  out = run(encoder, z)
  close(out["projection"], z["output/logits"])
  close(sequence(out), z["output/encoded"])


def test_options_that_contradict_each_other_are_clear_errors():
  small = {"variant": "custom", "width": 16, "depth": 1, "heads": 2, "mlp_dim": 32, "patch": 8, "image_size": 16}
  images = jnp.zeros((2, 16, 16, 3))
  for fields, message in (
    ({"pool": "cls", "class_token": False}, "config.model.pool='cls': needs config.model.class_token=True"),
    ({"final_norm": "pooled"}, "config.model.final_norm='pooled'.*pool='auto'"),
  ):
    with pytest.raises(UserError, match=message):
      jax.eval_shape(lambda fields=fields: ViT(**small, **fields).init(jax.random.key(0), images, train=False))
  model = ViT(**small)
  with pytest.raises(UserError, match="config.model.mask_token=False"):
    jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False, masked=jnp.zeros((2, 4), bool)))
  with pytest.raises(UserError, match=r"masked: expected \[2, 4\].*found \[2, 3\]"):
    jax.eval_shape(
      lambda: model.clone(mask_token=True).init(jax.random.key(0), images, train=False, masked=jnp.zeros((2, 3), bool))
    )


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_any_number_of_channels_and_any_rectangle(channels):
  model = ViT(variant="custom", width=16, depth=1, heads=2, mlp_dim=32, patch=8, image_size=(16, 24), channels=channels)
  shapes = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, 41, 19, channels)), train=False))
  assert shapes[0]["tokens"].shape == (2, 10, 16)
  assert shapes[1]["params"]["patch_embed"]["conv"]["kernel"].shape == (8, 8, channels, 16)


def test_published_parameter_count_of_the_largest_dinov2():
  """1,136.5 million in timm's table of vit_giant_patch14_dinov2 at 518 px."""
  model = ViT(variant="giant2", patch=14, image_size=518, mlp="swiglu", layer_scale=1e-5)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 518, 518, 3)), train=False))
  assert round(sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) / 1e6, 1) == 1136.5


def test_without_a_bias_the_patch_embedding_is_that_of_a_zero_bias():
  sizes = dict(variant="custom", width=12, depth=1, heads=2, mlp_dim=12, patch=4, image_size=8)
  images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  params = ViT(**sizes).init(jax.random.key(1), images, train=False)["params"]
  conv = params["patch_embed"]["conv"]
  zero, none = ({"kernel": conv["kernel"], "bias": 0 * conv["bias"]}, {"kernel": conv["kernel"]})
  with_bias, without = (
    ViT(**sizes, patch_bias=kept).apply({"params": params | {"patch_embed": {"conv": leaves}}}, images, train=False)["tokens"]
    for kept, leaves in ((True, zero), (False, none))
  )
  np.testing.assert_array_equal(with_bias, without)
  assert np.any(with_bias != ViT(**sizes).apply({"params": params}, images, train=False)["tokens"])
