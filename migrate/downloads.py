"""Public files of Mochi: what the editor offers to download if a workflow names a missing file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

REPACKAGED = "https://huggingface.co/Comfy-Org/mochi_preview_repackaged/resolve/main/split_files"
WRAPPERS = "https://huggingface.co/Kijai/Mochi_preview_comfy/resolve/main"


class PublicFile(NamedTuple):
    """A file that anyone can download."""

    folder: str
    """Below ComfyUI's models/."""
    size: str
    url: str


# By the name that workflows use. Sizes are as listed by Hugging Face.
PUBLIC_FILES = {
    "mochi_preview_bf16.safetensors": PublicFile(
        "diffusion_models", "20.1 GB", f"{REPACKAGED}/diffusion_models/mochi_preview_bf16.safetensors"
    ),
    "mochi_preview_fp8_scaled.safetensors": PublicFile(
        "diffusion_models", "10.0 GB", f"{REPACKAGED}/diffusion_models/mochi_preview_fp8_scaled.safetensors"
    ),
    "t5xxl_fp16.safetensors": PublicFile(
        "text_encoders", "9.8 GB", f"{REPACKAGED}/text_encoders/t5xxl_fp16.safetensors"
    ),
    "t5xxl_fp8_e4m3fn_scaled.safetensors": PublicFile(
        "text_encoders", "5.2 GB", f"{REPACKAGED}/text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors"
    ),
    "mochi_vae.safetensors": PublicFile("vae", "0.9 GB", f"{REPACKAGED}/vae/mochi_vae.safetensors"),
    "fastmochi.safetensors": PublicFile(
        "diffusion_models", "40.1 GB", "https://huggingface.co/FastVideo/FastMochi/resolve/main/dit.safetensors"
    ),
    "mochi_lora.safetensors": PublicFile(
        "loras",
        "76 MB",
        "https://huggingface.co/svjack/mochi_game_landscape_early_lora/resolve/main/pytorch_lora_weights.safetensors",
    ),
    **{
        name: PublicFile(folder, size, f"{WRAPPERS}/{name}")
        for name, folder, size in (
            ("mochi_preview_dit_bf16.safetensors", "diffusion_models", "20.2 GB"),
            ("mochi_preview_dit_fp8_e4m3fn.safetensors", "diffusion_models", "10.3 GB"),
            ("mochi_preview_dit_GGUF_Q4_0_v2.safetensors", "diffusion_models", "6.0 GB"),
            ("mochi_preview_dit_GGUF_Q8_0.safetensors", "diffusion_models", "10.9 GB"),
            ("mochi_preview_vae_decoder_bf16.safetensors", "vae", "0.7 GB"),
        )
    },
}


def downloads(values: Iterable[object]) -> list[dict[str, str]]:
    """The property `models` of a node with these values: one entry for each public file among them.

    A file in a subfolder, such as mochi/NAME, is recognised by its last part.
    """
    named = [(str(value), PUBLIC_FILES.get(re.split(r"[\\/]", str(value))[-1])) for value in values]
    return [{"name": name, "url": file.url, "directory": file.folder} for name, file in named if file]
