"""Other models are recognised by the tensor names of their own classes: diffusers', transformers' and ComfyUI's."""

import importlib

import pytest
import torch

from mochi_core.checkpoints.names.others import other_file

# With one block of each kind if the class has an argument for it; no weights are allocated.
DIFFUSERS = {
    "AutoencoderKL": ("an image autoencoder", {}),
    "AutoencoderKLCogVideoX": ("another video model's autoencoder", {}),
    "AutoencoderKLHunyuanVideo": ("another video model's autoencoder", {}),
    "AutoencoderKLLTXVideo": ("another video model's autoencoder", {}),
    "AutoencoderKLWan": ("a Wan or Qwen-Image autoencoder", {}),
    "AutoencoderTiny": ("a small autoencoder for previews", {}),
    "ChromaTransformer2DModel": ("a Chroma transformer", {"num_layers": 1, "num_single_layers": 1}),
    "CogVideoXTransformer3DModel": ("a CogVideoX transformer", {"num_layers": 1}),
    "ControlNetModel": ("a ControlNet", {}),
    "Flux2Transformer2DModel": ("a FLUX.2 transformer", {"num_layers": 1, "num_single_layers": 1}),
    "FluxControlNetModel": ("a ControlNet", {"num_layers": 1, "num_single_layers": 1}),
    "FluxTransformer2DModel": ("a FLUX transformer", {"num_layers": 1, "num_single_layers": 1}),
    "HiDreamImageTransformer2DModel": (
        "a HiDream transformer",
        {"num_layers": 1, "num_single_layers": 1, "in_channels": 16, "caption_channels": [8, 8], "patch_size": 2},
    ),
    "HunyuanVideoTransformer3DModel": ("a HunyuanVideo transformer", {"num_layers": 1, "num_single_layers": 1}),
    "LTXVideoTransformer3DModel": ("an LTX transformer", {"num_layers": 1}),
    "Lumina2Transformer2DModel": ("a Lumina or Z-Image transformer", {"num_layers": 1}),
    "PixArtTransformer2DModel": ("a PixArt transformer", {"num_layers": 1, "caption_channels": 8}),
    "QwenImageTransformer2DModel": ("a Qwen-Image transformer", {"num_layers": 1}),
    "SD3Transformer2DModel": ("an SD3 transformer", {"num_layers": 1}),
    "UNet2DConditionModel": ("a Stable Diffusion UNet", {}),
    "WanTransformer3DModel": ("a Wan transformer", {"num_layers": 1}),
    "ZImageTransformer2DModel": ("a Lumina or Z-Image transformer", {"n_layers": 1}),
}
TRANSFORMERS = {
    "CLIPTextModelWithProjection": ("a CLIP text encoder", "CLIPTextConfig"),
    "CLIPVisionModelWithProjection": ("a CLIP vision model", "CLIPVisionConfig"),
    "LlamaForCausalLM": ("a language model used as a text encoder", "LlamaConfig"),
    "UMT5EncoderModel": ("a umT5 text encoder", "UMT5Config"),
}
COMFYUI = {
    "flux.model.Flux": (
        "a FLUX transformer",
        {
            "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 8, "hidden_size": 64, "mlp_ratio": 2,
            "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10_000, "patch_size": 2,
            "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
        },
    ),
    "wan.model.WanModel": ("a Wan transformer", {"num_layers": 1}),
    "lightricks.model.LTXVModel": ("an LTX transformer", {"num_layers": 1}),
    "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": (
        "an SD3 transformer",
        {"depth": 1, "input_size": None, "adm_in_channels": 8, "pos_embed_max_size": 8, "num_patches": 64},
    ),
    "cosmos.predict2.MiniTrainDIT": (
        "a Cosmos transformer",
        {
            "max_img_h": 8, "max_img_w": 8, "max_frames": 1, "in_channels": 4, "out_channels": 4, "patch_spatial": 2,
            "patch_temporal": 1, "num_blocks": 1, "pos_emb_cls": "rope3d",
        },
    ),
    "lumina.model.NextDiT": ("a Lumina or Z-Image transformer", {"n_layers": 1, "cap_feat_dim": 8}),
    "aura.mmdit.MMDiT": ("an AuraFlow transformer", {"n_layers": 1, "n_double_layers": 1}),
}  # fmt: skip


def assert_known(model, phrase):
    found = other_file(model.state_dict())
    assert found, list(model.state_dict())[:20]
    assert found.phrase == phrase


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_names(name):
    phrase, arguments = DIFFUSERS[name]
    with torch.device("meta"):
        assert_known(getattr(importlib.import_module("diffusers"), name)(**arguments), phrase)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_names(name):
    phrase, config = TRANSFORMERS[name]
    transformers = importlib.import_module("transformers")
    arguments = {"num_hidden_layers": 2} if name != "UMT5EncoderModel" else {"num_layers": 2}
    with torch.device("meta"):
        assert_known(getattr(transformers, name)(getattr(transformers, config)(**arguments)), phrase)


@pytest.mark.usefixtures("comfyui")
@pytest.mark.parametrize("name", COMFYUI)
def test_comfyui_names(name):
    import comfy.ops

    phrase, arguments = COMFYUI[name]
    module, _, cls = name.rpartition(".")
    made = getattr(importlib.import_module(f"comfy.ldm.{module}"), cls)
    with torch.device("meta"):
        model = made(**arguments, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    assert_known(model, phrase)
