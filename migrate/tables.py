"""What old nodes become: the names, orders and defaults of their inputs, and of ours."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# What an old value becomes, and a sentence's end if that is not the same.
Adapted = tuple[Any, str]
AFTER_SEED = "control_after_generate"  # in the editor's form, a value without an input
MODEL_TYPES = {"MOCHIMODEL": "MODEL", "MOCHIVAE": "VAE"}


@dataclass(frozen=True)
class NewNode:
    """A node of ours: inputs that take a link, widgets in the editor's order with their defaults, the output's type."""

    slots: dict[str, str]
    widgets: dict[str, Any]
    output: str
    optional: tuple[str, ...] = ()


NEW_NODES = {
    "Mochi1LoadTransformer": NewNode({}, {"model_name": "", "weight_dtype": "auto"}, "MODEL"),
    "Mochi1LoadVAE": NewNode({}, {"vae_name": "", "dtype": "auto", "second_file": "none"}, "VAE"),
    "Mochi1LoadT5": NewNode({}, {"t5_name": "", "dtype": "auto", "device": "default"}, "CLIP"),
    "Mochi1T5Encode": NewNode({"clip": "CLIP"}, {"prompt": ""}, "CONDITIONING"),
    "Mochi1Sigmas": NewNode({}, {"steps": 64, "threshold_noise": 0.025, "linear_steps": 0, "denoise": 1.0}, "SIGMAS"),
    "Mochi1Sampler": NewNode(
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent": "LATENT",
            "sigmas": "SIGMAS",
        },
        {
            "width": 848,
            "height": 480,
            "num_frames": 163,
            "steps": 64,
            "cfg": 4.5,
            "seed": 0,
            AFTER_SEED: "fixed",
            "batch_size": 1,
            "denoise": 1.0,
        },
        "LATENT",
        ("latent", "sigmas"),
    ),
    "Mochi1TiledVAEDecode": NewNode({"samples": "LATENT", "vae": "VAE"}, {"memory": 0.0}, "IMAGE"),
    "Mochi1VAEEncode": NewNode({"pixels": "IMAGE", "vae": "VAE"}, {}, "LATENT"),
}


@dataclass(frozen=True)
class Part:
    """One node of ours: the old input that each of its inputs comes from, and what changes its value on the way."""

    node: str
    carry: dict[str, str]
    adapt: dict[str, Callable[[Any, dict[str, Any]], Adapted]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplacementRule:
    """An old node: its widgets in the editor's order with their defaults; output i is the output of part i."""

    widgets: dict[str, Any]
    parts: tuple[Part, ...]
    remark: str = ""


WEIGHT_DTYPES = {
    "default": "auto",
    **{name: name for name in ("fp32", "bf16", "fp16", "fp8_e4m3fn")},
    "fp8_e4m3fn_fast": "fp8_e4m3fn",
    "fp8_e5m2": "fp8_e4m3fn",
}
WEIGHT_DTYPE_REASONS = {
    "fp8_e4m3fn_fast": "products are computed in 16 bits",
    "fp8_e5m2": "it is as small, and rounds less",
}
NO_SUCH_PRECISION = "the loader has no such precision"


def weight_dtype(old: Any, values: dict[str, Any]) -> Adapted:
    """GGUF files stay as they are, whatever the node said, as they did."""
    if any("gguf" in str(value).lower() for value in values.values()):
        return "auto", ""
    if str(old) not in WEIGHT_DTYPES:
        return "auto", NO_SUCH_PRECISION
    return WEIGHT_DTYPES[str(old)], WEIGHT_DTYPE_REASONS.get(str(old), "")


def vae_dtype(old: Any, _: dict[str, Any]) -> Adapted:
    return (old, "") if old in ("fp32", "bf16", "fp16") else ("auto", NO_SUCH_PRECISION)


def local_file(old: Any, _: dict[str, Any]) -> Adapted:
    """Saved on another system, a name may have the other separator."""
    return re.sub(r"[\\/]", re.escape(os.sep), str(old)), ""


def in_mochi_folder(old: Any, _: dict[str, Any]) -> Adapted:
    """Where the downloading loader put its files, inside the model folder."""
    return f"mochi{os.sep}{old}", ""


def empty_is_nothing(old: Any, _: dict[str, Any]) -> Adapted:
    """Genmo's code gives no token for it, others the end token."""
    return old, "" if old else "an empty prompt is no text at all now, as in Genmo's code; it was one end token"


def plain_text(old: Any, values: dict[str, Any]) -> Adapted:
    if not old:
        return empty_is_nothing(old, values)
    weighted = re.search(r"\(.+:\s*[\d.]+\)", str(old), re.DOTALL)
    return old, "brackets are text for T5 Encode, no weights" if weighted else ""


LOADER_OPTIONS = {"attention_mode": "sdpa", "cublas_ops": False, "rms_norm_func": "default"}
TILES = {"num_tiles_w": 4, "num_tiles_h": 4, "overlap": 16, "min_block_size": 1}
LOAD_VAE = Part(
    "Mochi1LoadVAE",
    {"vae_name": "model_name", "dtype": "precision"},
    {"vae_name": local_file, "dtype": vae_dtype},
)
DECODE = Part("Mochi1TiledVAEDecode", {"samples": "samples", "vae": "vae"})

WRAPPER = {
    "MochiModelLoader": ReplacementRule(
        {"model_name": "", "precision": "fp8_e4m3fn", **LOADER_OPTIONS},
        (
            Part(
                "Mochi1LoadTransformer",
                {"model_name": "model_name", "weight_dtype": "precision"},
                {"model_name": local_file, "weight_dtype": weight_dtype},
            ),
        ),
    ),
    "DownloadAndLoadMochiModel": ReplacementRule(
        {"model": "", "vae": "", "precision": "fp8_e4m3fn", **LOADER_OPTIONS},
        (
            Part(
                "Mochi1LoadTransformer",
                {"model_name": "model", "weight_dtype": "precision"},
                {"model_name": in_mochi_folder, "weight_dtype": weight_dtype},
            ),
            Part("Mochi1LoadVAE", {"vae_name": "vae"}, {"vae_name": in_mochi_folder}),
        ),
        "is two loaders now, which download nothing: the files are looked for in the folder mochi, where it put them",
    ),
    "MochiVAELoader": ReplacementRule({"model_name": "", "precision": "bf16"}, (LOAD_VAE,)),
    "MochiVAEEncoderLoader": ReplacementRule({"model_name": "", "precision": "bf16"}, (LOAD_VAE,)),
    "MochiTextEncode": ReplacementRule(
        {"prompt": "", "strength": 1.0, "force_offload": True},
        (Part("Mochi1T5Encode", {"clip": "clip", "prompt": "prompt"}, {"prompt": empty_is_nothing}),),
    ),
    "MochiSigmaSchedule": ReplacementRule(
        {"num_steps": 30, "threshold_noise": 0.025, "linear_steps": 15, "denoise": 1.0},
        (
            Part(
                "Mochi1Sigmas",
                {
                    "steps": "num_steps",
                    "threshold_noise": "threshold_noise",
                    "linear_steps": "linear_steps",
                    "denoise": "denoise",
                },
            ),
        ),
    ),
    "MochiSampler": ReplacementRule(
        {
            "width": 848,
            "height": 480,
            "num_frames": 49,
            "steps": 50,
            "cfg": 4.5,
            "seed": 0,
            AFTER_SEED: "fixed",
        },
        (
            Part(
                "Mochi1Sampler",
                {
                    **{name: name for name in ("model", "positive", "negative", "width", "height", "num_frames")},
                    **{name: name for name in ("steps", "cfg", "seed", AFTER_SEED)},
                    "latent": "samples",
                    "sigmas": "opt_sigmas",
                },
            ),
        ),
    ),
    "MochiDecode": ReplacementRule(
        {
            "enable_vae_tiling": False,
            "auto_tile_size": True,
            "frame_batch_size": 6,
            "tile_sample_min_height": 240,
            "tile_sample_min_width": 424,
            "tile_overlap_factor_height": 0.1666,
            "tile_overlap_factor_width": 0.2,
            "unnormalize": True,
        },
        (DECODE,),
    ),
    "MochiDecodeSpatialTiling": ReplacementRule(
        {"enable_vae_tiling": False, **TILES, "per_batch": 6, "unnormalize": True}, (DECODE,)
    ),
    "MochiImageEncode": ReplacementRule(
        {"enable_vae_tiling": False, **TILES, "normalize": True},
        (Part("Mochi1VAEEncode", {"pixels": "images", "vae": "encoder"}),),
    ),
}

STOCK = {
    "UNETLoader": ReplacementRule(
        {"unet_name": "", "weight_dtype": "default"},
        (
            Part(
                "Mochi1LoadTransformer",
                {"model_name": "unet_name", "weight_dtype": "weight_dtype"},
                {"model_name": local_file, "weight_dtype": weight_dtype},
            ),
        ),
    ),
    "VAELoader": ReplacementRule(
        {"vae_name": ""}, (Part("Mochi1LoadVAE", {"vae_name": "vae_name"}, {"vae_name": local_file}),)
    ),
    "CLIPLoader": ReplacementRule(
        {"clip_name": "", "type": "mochi", "device": "default"},
        (Part("Mochi1LoadT5", {"t5_name": "clip_name", "device": "device"}, {"t5_name": local_file}),),
    ),
    "CLIPTextEncode": ReplacementRule(
        {"text": ""},
        (Part("Mochi1T5Encode", {"clip": "clip", "prompt": "text"}, {"prompt": plain_text}),),
    ),
    "VAEDecode": ReplacementRule({}, (DECODE,)),
    "VAEDecodeTiled": ReplacementRule({}, (DECODE,), "needs no tiles any more: frames stream through the decoder"),
}

# Values and links without a counterpart, and why they are not missed. Of others, values are dropped without a word.
DROPPED = {
    "attention_mode": "attention is chosen on Load Mochi Transformer, such as sage",
    "cublas_ops": "matrix products are ComfyUI's",
    "rms_norm_func": "norms are PyTorch's",
    "compile_args": "the node TorchCompileModel behind the loader compiles",
    "torch_compile_args": "the autoencoder runs as it is",
    "trigger": "ComfyUI orders the work itself",
    "strength": "prompts are encoded as Genmo does, without a factor",
    "force_offload": "ComfyUI frees memory itself",
    "cfg_schedule": "cfg is the same in all steps",
    "fastercache": "the node EasyCache behind the loader saves steps, too",
    "enable_vae_tiling": "frames stream through the autoencoder without tiles or seams",
    "unnormalize": "LATENTs are always in the autoencoder's space",
    "normalize": "LATENTs are always in the autoencoder's space",
}
# Nodes that only held settings, or showed latents.
REMOVED = {
    "MochiTorchCompileSettings": DROPPED["compile_args"],
    "MochiFasterCache": DROPPED["fastercache"],
    "MochiLatentPreview": "Mochi Sampler shows previews while it works",
}
# Nodes of a pack for editing videos, which work on the wrapper's own objects.
LEFT = ("MochiWrapperSamplerCustom", "MochiUnsampler", "MochiResampler", "MochiPrepareSigmas")
# An output that only passes an input on. T5 Encode has one when the editor put it in MochiTextEncode's place.
PASSES_ON = {("MochiTextEncode", 1): "clip", ("Mochi1T5Encode", 1): "clip"}
CLIP_LOADERS = {"CLIPLoader": ("clip_name", "type"), "CLIPLoaderGGUF": ("clip_name", "type")}
