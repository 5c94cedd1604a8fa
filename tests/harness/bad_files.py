"""Faulty files, and what the error must say."""

import json
import struct

from safetensors.torch import save

from mochi_core import AsymmDiTConfig
from tests.harness.tiny_models import random_dit

SMALL = AsymmDiTConfig(
    depth=1,
    hidden_size_x=8,
    hidden_size_y=8,
    num_heads=2,
    text_width=8,
    mlp_size_x=8,
    mlp_size_y=8,
    timestep_features=4,
)
DIT = random_dit(SMALL).state_dict()
VALID = save(DIT, {"format": "pt"})
HEADER_END = 8 + struct.unpack("<Q", VALID[:8])[0]
HEADER = json.loads(VALID[8:HEADER_END])
NAME = "blocks.0.attn.proj_x.bias"


def with_header(header, data=VALID[HEADER_END:]):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edited(name=NAME, **changes):
    return with_header({**HEADER, name: {**HEADER[name], **changes}})


def shifted(by):
    start, end = HEADER[NAME]["data_offsets"]
    return edited(data_offsets=[start + by, end + by])


BAD = {
    "empty": (b"", "an empty file"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
    "web page": (b"\n<!DOCTYPE html><html><body>404</body></html>", "a web page"),
    "torch file": (b"PK\x03\x04" + bytes(60), "whose name should end in .pt"),
    "noise": (bytes(range(255, 0, -1)), "something else"),
    "7 bytes": (VALID[:7], "incomplete"),
    "cut in the header": (VALID[:100], "incomplete"),
    "cut in the data": (VALID[:-1], "incomplete"),
    "one byte more": (VALID + b"x", "1 surplus bytes"),
    "header of 2**63 bytes": (struct.pack("<Q", 2**63) + VALID[8:], "at most 64,000,000 are allowed"),
    "header longer than the file": (struct.pack("<Q", 10**6) + VALID[8:], "incomplete"),
    "header in no JSON": (with_header(b"{" + b"]" * 50), "invalid header"),
    "no tensors": (with_header({}, b""), "holds no tensors"),
    "header nested deeply": (with_header(b'{"a":' + b"[" * 10**5), "invalid header"),
    "header in no UTF-8": (with_header(b'{"\xff\xff": 1}'), "invalid header"),
    "duplicate name": (with_header(VALID[8:HEADER_END].rstrip()[:-1] + b"," + VALID[9:HEADER_END]), "occurs twice"),
    "number for a tensor": (with_header({**HEADER, NAME: 3}), "invalid header"),
    "negative size": (edited(shape=[-8]), "invalid header"),
    "wrong size": (edited(shape=[9]), "invalid header"),
    "wrong dtype": (edited(dtype="F16"), "invalid header"),
    "unknown dtype": (edited(dtype="F3"), "invalid header"),
    "dtype of no model": (edited(dtype="U32"), "stored as U32, which cannot be read"),
    "overlap": (shifted(-4), "invalid header"),
    "hole": (shifted(4), "invalid header"),
    "an endless tensor": (edited(data_offsets=[0, float("inf")]), r"invalid header \(Infinity is not a number"),
    "metadata that are no text": (with_header({**HEADER, "__metadata__": {"a": 1}}), "invalid header"),
    "missing axis": (edited("x_embedder.proj.weight", shape=[8, 48]), "needs 4 axes"),
}
# A few names of each kind, as in its released files.
OTHERS = {
    "a FLUX transformer": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"],
    "an SD3 transformer": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "a Wan transformer": ["blocks.0.cross_attn.k.weight", "blocks.0.self_attn.k.weight", "patch_embedding.weight"],
    "a HunyuanVideo transformer": [
        "double_blocks.0.img_attn.qkv.weight",
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    ],
    "an LTX transformer": ["transformer_blocks.0.scale_shift_table", "caption_projection.linear_1.weight"],
    "a Stable Diffusion UNet": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a full checkpoint with a Stable Diffusion UNet": [
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "first_stage_model.decoder.mid.block_1.conv1.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    ],
    "a CLIP text encoder": ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    "a umT5 text encoder": [
        f"encoder.block.{i}.layer.0.SelfAttention.{name}.weight"
        for i in range(2)
        for name in ("q", "relative_attention_bias")
    ],
    "a language model used as a text encoder": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
    "an image autoencoder": ["encoder.mid.block_1.conv1.weight", "decoder.mid.block_1.conv1.weight"],
    "a Wan or Qwen-Image autoencoder": ["decoder.middle.0.residual.0.gamma"],
    "a small autoencoder for previews": ["1.weight", "3.conv.0.weight", "3.conv.2.weight"],
    "a CLIP vision model": ["vision_model.encoder.layers.0.mlp.fc1.weight"],
    "a ControlNet": ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
    "an upscale model": ["model.1.sub.0.RDB1.conv1.0.weight"],
    "a LoRA for Wan": ["diffusion_model.blocks.0.self_attn.q.lora_A.weight"],
    "a LoRA for Stable Diffusion": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "a LoRA": ["blocks.0.attn.qkv_x.lora_A"],
    "latents": ["latent_format_version_0", "latent_tensor"],
    "a textual inversion": ["emb_params"],
}
