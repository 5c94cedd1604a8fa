"""Files that users mistake for Mochi's, recognised by their tensor names: other models, LoRAs, latents.

The names are those of the released files, in the authors' layout and in diffusers'; the tests take them from the classes of
ComfyUI and diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .t5 import UMT5

LORA = r"\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up|dora_scale|diff|diff_b|w_norm|b_norm)(\.|$)"
# Names of the other models that a full checkpoint holds besides the diffusion model.
ALL_IN_ONE = re.compile(r"^(first_stage_model|vae|cond_stage_model|conditioner|text_encoders)\.", re.MULTILINE)


@dataclass(frozen=True)
class OtherFile:
    """A kind of file, and how to recognise it."""

    phrase: str
    sort: str
    """Role, whatever the model: diffusion model, autoencoder, text encoder ..."""
    marks: tuple[str, ...]
    """Patterns that must all occur in the names, one name per line."""


def other_file(names: Iterable[str]) -> OtherFile | None:
    """The kind of a file with tensors of these names; None if it is unknown."""
    lines = "\n".join(names)
    found = next(
        (kind for kind in OTHER_FILES if all(re.search(mark, lines, re.MULTILINE) for mark in kind.marks)), None
    )
    if found is not None and found.sort == DIFFUSION and ALL_IN_ONE.search(lines):
        return replace(found, phrase=f"a full checkpoint with {found.phrase}", sort=CHECKPOINT)
    return found


CHECKPOINT, DIFFUSION, TEXT, VAE = "checkpoint", "diffusion model", "text encoder", "autoencoder"
PREVIEW, VISION, CONTROL, UPSCALER = "preview autoencoder", "vision model", "control network", "upscale model"
LORA_OF_MOCHI, LORA_OF_OTHERS, LORA_OF_BOTH = "lora", "lora of another model", "lora with text encoder"
LATENTS, NO_MODEL = "latents", "no model"

# The first match counts, so kinds whose names also match another pattern come before it.
OTHER_FILES = (
    OtherFile("latents", LATENTS, (r"^latent_tensor$",)),
    OtherFile("a prepared clip for training", NO_MODEL, (r"^logvar$", r"^embeds$")),
    OtherFile("a textual inversion", NO_MODEL, (r"^(emb_params|string_to_param\.\*|clip_[lg])$",)),
    OtherFile("an IP-Adapter", NO_MODEL, (r"^(ip_adapter\.|image_proj\.)",)),
    OtherFile("a LoHa, LoKr or OFT adapter", LORA_OF_MOCHI, (r"\.(hada_w|lokr_w|oft_)",)),
    OtherFile(
        "a LoRA for FLUX or HunyuanVideo", LORA_OF_OTHERS,
        (LORA, r"double_blocks|single_blocks|single_transformer_blocks"),
    ),
    OtherFile("a LoRA for FLUX or SD3", LORA_OF_OTHERS, (LORA, r"joint_blocks|transformer_blocks[._]\d+[._]attn[._]")),
    OtherFile("a LoRA for Wan", LORA_OF_OTHERS, (LORA, r"blocks[._]\d+[._](self|cross)_attn")),
    OtherFile("a LoRA for LTX", LORA_OF_OTHERS, (LORA, r"transformer_blocks[._]\d+[._]attn2")),
    OtherFile(
        "a LoRA for Stable Diffusion", LORA_OF_BOTH,
        (LORA, r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks"),
    ),
    OtherFile("a LoRA for a text encoder", LORA_OF_BOTH, (LORA, r"^(lora_te|text_encoder)")),
    OtherFile("a LoRA", LORA_OF_MOCHI, (LORA,)),
    OtherFile("a ControlNet", CONTROL, (r"controlnet_(blocks\.0|cond_embedding)\.|control_model\.|zero_convs\.0\.",)),
    OtherFile(
        "a HunyuanVideo transformer", DIFFUSION,
        (r"txt_in\.individual_token_refiner\.|context_embedder\.token_refiner\.",),
    ),
    OtherFile("a Chroma transformer", DIFFUSION, (r"distilled_guidance_layer\.",)),
    OtherFile("a FLUX transformer", DIFFUSION, (r"double_blocks\.0\.img_attn\.|single_transformer_blocks\.0\.proj_mlp\.",)),
    OtherFile("a FLUX.2 transformer", DIFFUSION, (r"single_transformer_blocks\.0\.attn\.to_qkv_mlp_proj\.",)),
    OtherFile("a Qwen-Image transformer", DIFFUSION, (r"transformer_blocks\.0\.img_mod\.1\.", r"txt_norm\.")),
    OtherFile("a Wan transformer", DIFFUSION, (r"blocks\.0\.cross_attn\.|condition_embedder\.", r"patch_embedding\.")),
    OtherFile("a PixArt transformer", DIFFUSION, (r"transformer_blocks\.0\.scale_shift_table", r"pos_embed\.proj\.")),
    OtherFile("a PixArt transformer", DIFFUSION, (r"t_block\.1\.", r"y_embedder\.")),
    OtherFile("an LTX transformer", DIFFUSION, (r"transformer_blocks\.0\.scale_shift_table", r"caption_projection\.")),
    OtherFile("a CogVideoX transformer", DIFFUSION, (r"blocks\.0\.norm1\.linear\.", r"patch_embed\.text_proj\.")),
    OtherFile("a Cosmos transformer", DIFFUSION, (r"blocks\.block0\.blocks\.0\.block\.|adaln_modulation_self_attn\.",)),
    OtherFile("a HiDream transformer", DIFFUSION, (r"double_stream_blocks\.0\.",)),
    OtherFile("a Lumina or Z-Image transformer", DIFFUSION, (r"noise_refiner\.0\.",)),
    OtherFile("an AuraFlow transformer", DIFFUSION, (r"double_layers\.0\.attn\.w1q\.",)),
    OtherFile("an SD3 transformer", DIFFUSION, (r"joint_blocks\.0\.",)),
    OtherFile("an SD3 transformer", DIFFUSION, (r"transformer_blocks\.0\.norm1_context\.", r"pos_embed\.proj\.")),
    OtherFile("a Stable Diffusion UNet", DIFFUSION, (r"input_blocks\.0\.0\.weight",)),
    OtherFile("a Stable Diffusion UNet", DIFFUSION, (r"down_blocks\.0\.resnets\.0\.", r"time_embedding\.linear_1\.")),
    OtherFile("a umT5 text encoder", TEXT, (UMT5.pattern,)),
    OtherFile("a CLIP text encoder", TEXT, (r"text_model\.encoder\.layers\.0\.|(?<!visual\.)transformer\.resblocks\.0\.",)),
    OtherFile("a CLIP vision model", VISION, (r"vision_model\.encoder\.layers\.0\.|visual\.transformer\.resblocks\.0\.",)),
    OtherFile("a language model used as a text encoder", TEXT, (r"layers\.0\.self_attn\.|blk\.0\.attn_q\.",)),
    OtherFile("a Wan or Qwen-Image autoencoder", VAE, (r"decoder\.middle\.0\.residual\.|mid_block\.resnets\.0\.norm1\.gamma",)),
    OtherFile("another video model's autoencoder", VAE, (r"decoder\.conv_in\.conv\.|decoder\.unpatcher3d\.",)),
    OtherFile("an image autoencoder", VAE, (r"decoder\.(mid|mid_block|up_blocks\.0\.resnets\.0\.norm1)\.",)),
    OtherFile("a small autoencoder for previews", PREVIEW, (r"^((taesd_)?(de|en)coder\.(layers\.)?)?\d+\.conv\.[024]\.weight",)),
    OtherFile("an upscale model", UPSCALER, (r"(?i)rdb1\.conv1\.",)),
)  # fmt: skip
