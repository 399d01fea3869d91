"""Networks of timm, transformers and torchvision, where these are installed: their files here, our exports there, equal outputs.

They are no requirement of this library. With them: pip install torch torchvision timm transformers
"""

import jax.numpy as jnp
import numpy as np
import pytest

from big_ssl.weights import transfer
from big_ssl.weights.families import dump, load

torch = pytest.importorskip("torch")


def timm_vit(**options):
  vit = pytest.importorskip("timm").models.vision_transformer.VisionTransformer
  return vit(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, **options)


def timm_swiglu():
  layers = pytest.importorskip("timm.layers")
  return timm_vit(mlp_layer=layers.SwiGLUPacked, act_layer=torch.nn.SiLU, mlp_ratio=3.0)


def timm_parallel():
  return timm_vit(block_fn=pytest.importorskip("timm").models.vision_transformer.ParallelScalingBlock, qk_norm=True)


def timm_model(name, **options):
  return pytest.importorskip("timm").create_model(name, num_classes=0, **options)


def hugging_face(name, **sizes):
  transformers = pytest.importorskip("transformers")
  config = getattr(transformers, f"{name}Config")(**sizes)
  model = getattr(transformers, f"{name}Model")
  return model(config, add_pooling_layer=False) if name in ("ViT",) else model(config)


def torchvision_resnet(depth, kind="resnet"):
  model = getattr(pytest.importorskip("torchvision").models, f"{kind}{depth}")()
  model.fc = torch.nn.Identity()
  return model


def torchvision_vit():
  vit = pytest.importorskip("torchvision").models.VisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=100)
  vit.heads = torch.nn.Identity()
  return vit


HF_VIT = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8)
HF_REGNET = dict(embedding_size=32, hidden_sizes=(48, 104, 208, 440), depths=(1, 3, 6, 6), groups_width=8, layer_type="y")
HEADS = dict(heads=3)
# name: (network, layout, fields that the file does not say, side of the images, its features)
CASES = {
  "timm ViT": (lambda: timm_vit(), "timm_vit", HEADS, 32, lambda m, x: m(x)),
  "timm ViT with registers": (lambda: timm_vit(reg_tokens=2, no_embed_class=True), "timm_vit", HEADS, 32, lambda m, x: m(x)),
  "timm ViT with LayerScale": (lambda: timm_vit(init_values=1e-5), "timm_vit", HEADS, 32, lambda m, x: m(x)),
  "timm ViT of attention pooling": (
    lambda: timm_vit(class_token=False, global_pool="map", fc_norm=False), "timm_vit", HEADS, 32, lambda m, x: m(x)
  ),
  "timm ViT of average pooling without CLS": (
    lambda: timm_vit(class_token=False, global_pool="avg", reg_tokens=1, no_embed_class=True), "timm_vit", HEADS, 32, lambda m, x: m(x)
  ),
  "timm ViT with other norms and biases": (
    lambda: timm_vit(qkv_bias=False, qk_norm=True, pre_norm=True), "timm_vit", HEADS, 32, lambda m, x: m(x)
  ),
  "timm ViT with SwiGLU": (lambda: timm_swiglu(), "timm_vit", HEADS, 32, lambda m, x: m(x)),
  "timm ViT of parallel blocks": (lambda: timm_parallel(), "timm_parallel_vit", HEADS, 32, lambda m, x: m(x)),
  "torchvision ViT": (lambda: torchvision_vit(), "torchvision_vit", HEADS, 32, lambda m, x: m(x)),
  "timm RegNetX": (lambda: timm_model("regnetx_004"), "timm_regnet", {}, 64, lambda m, x: m(x)),
  "torchvision ResNeXt-50": (lambda: torchvision_resnet("50_32x4d", "resnext"), "torchvision_resnet", {}, 64, lambda m, x: m(x)),
  "timm XCiT": (lambda: timm_model("xcit_nano_12_p16_224"), "timm_xcit", {}, 64, lambda m, x: m(x)),
  "timm ResMLP": (lambda: timm_model("resmlp_12_224"), "timm_resmlp", {}, 224, lambda m, x: m(x)),
  "timm RegNetY": (lambda: timm_model("regnety_004"), "timm_regnet", {}, 64, lambda m, x: m(x)),
  "torchvision ResNet-18": (lambda: torchvision_resnet(18), "torchvision_resnet", {}, 64, lambda m, x: m(x)),
  "torchvision ResNet-50": (lambda: torchvision_resnet(50), "torchvision_resnet", {}, 64, lambda m, x: m(x)),
  "HF ViT": (lambda: hugging_face("ViT", intermediate_size=192, **HF_VIT), "hf_vit", HEADS, 32, lambda m, x: m(x).last_hidden_state[:, 0]),
  "HF ViTMSN": (
    lambda: hugging_face("ViTMSN", intermediate_size=192, **HF_VIT), "hf_vit", HEADS, 32, lambda m, x: m(x).last_hidden_state[:, 0]
  ),
  "HF Dinov2": (lambda: hugging_face("Dinov2", **HF_VIT), "hf_dinov2", HEADS, 32, lambda m, x: m(x).last_hidden_state[:, 0]),
  "HF Dinov2 with registers": (
    lambda: hugging_face("Dinov2WithRegisters", **HF_VIT), "hf_dinov2_registers", HEADS, 32, lambda m, x: m(x).last_hidden_state[:, 0]
  ),
  "HF RegNet": (lambda: hugging_face("RegNet", **HF_REGNET), "hf_regnet", {}, 64, lambda m, x: m(x).pooler_output[:, :, 0, 0]),
}


def randomized(model):
  """No tensor keeps a value that hides a mistake: zeros, ones, small LayerScale."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
      if tensor.is_floating_point():
        noise = torch.rand(tensor.shape, generator=generator)
        tensor.copy_(0.5 + noise if name.endswith("var") else tensor + 0.1 * (noise - 0.5))
  return model.eval()


def file_of(model, tmp_path):
  """What the library itself writes: transformers has other names in memory than in files."""
  if hasattr(model, "save_pretrained"):
    model.save_pretrained(tmp_path)
    from safetensors.numpy import load_file

    return load_file(tmp_path / "model.safetensors")
  return {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_a_network_gives_the_same_features_here_and_its_file_comes_back(case, tmp_path):
  make, layout, given, side, features = CASES[case]
  theirs = randomized(make())
  tensors = file_of(theirs, tmp_path)
  found = load(layout, tensors, **given)
  model = transfer.backbone(found.model)
  images = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
  with torch.no_grad():
    wanted = features(theirs, torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
  trees = {"params": found.weights.params["backbone"], "batch_stats": found.weights.batch_stats.get("backbone", {})}
  ours = np.asarray(model.apply(trees, jnp.asarray(images), train=False)["pooled"])
  np.testing.assert_allclose(ours, wanted, atol=2e-4 * np.abs(wanted).max())
  again = dump(layout, found.weights, **found.model)
  assert again.keys() == tensors.keys() and all(np.array_equal(again[k], tensors[k]) for k in again)
  if not hasattr(theirs, "save_pretrained"):
    theirs.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in again.items()}, strict=True)
