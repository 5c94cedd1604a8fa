"""What old nodes become: rules for the nodes of MochiWrapper, of MochiEdit and for ComfyUI's own, as data.

Facts about MochiEdit: logtd/ComfyUI-MochiEdit, nodes/ and sampling/sampling_functions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .our_nodes import AFTER_SEED
from .values import (
    Adapted,
    at_most_1,
    empty_is_nothing,
    in_mochi_folder,
    local_file,
    plain_text,
    pull,
    vae_dtype,
    weight_dtype,
)

MODEL_TYPES = {"MOCHIMODEL": "MODEL", "MOCHIVAE": "VAE"}
"""The wrapper's link types -> ComfyUI's."""


@dataclass(frozen=True)
class Part:
    """One of the nodes that an old node becomes."""

    node: str
    """Type of the new node, one of `NEW_NODES`."""
    carry: dict[str, str]
    """{input: the old node's input that the value or link comes from}"""
    adapt: dict[str, Callable[[object, dict[str, object]], Adapted]] = field(default_factory=dict)
    """{input: the function that adapts the value}, see values.py"""


@dataclass(frozen=True)
class ReplacementRule:
    """How one type of old node is replaced."""

    widgets: dict[str, object]
    """The old node's widgets in the editor's order, with their defaults."""
    parts: tuple[Part, ...]
    """The new nodes; output i of the old node is the output of part i."""
    remark: str = ""
    """The end of a sentence that begins with the node's name, added to the notes whenever the rule is used."""


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
    "MochiWrapperSamplerCustom": ReplacementRule(
        {"cfg": 4.5, "seed": 0, AFTER_SEED: "fixed", "add_noise": False},
        (
            Part(
                "Mochi1Sampler",
                {
                    **{name: name for name in ("model", "positive", "negative", "cfg", "seed", AFTER_SEED)},
                    **{name: name for name in ("sigmas", "sampler")},
                    "latent": "latents",
                },
            ),
        ),
    ),
    "MochiUnsampler": ReplacementRule(
        {"seed": 0, AFTER_SEED: "fixed", "gamma": 0.0},
        (Part("Mochi1Invert", {name: name for name in ("gamma", "seed", AFTER_SEED)}, {"gamma": at_most_1}),),
    ),
    "MochiResampler": ReplacementRule(
        {"eta": 0.9, "start_step": 0, "end_step": 10, "eta_trend": "constant"},
        (
            Part(
                "Mochi1RFEdit",
                {
                    "latent": "latents",
                    "trend": "eta_trend",
                    **{name: name for name in ("eta", "start_step", "end_step")},
                },
                {"eta": pull},
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
    "add_noise": "Mochi Invert and Mochi RF Edit start from the LATENT itself",
}
"""Old inputs without a counterpart, and why they are not missed. Values of inputs neither carried over nor listed here are
dropped silently."""
REMOVED = {
    "MochiTorchCompileSettings": DROPPED["compile_args"],
    "MochiFasterCache": DROPPED["fastercache"],
    "MochiLatentPreview": "Mochi Sampler shows previews while it works",
    "MochiPrepareSigmas": "schedules end at 0 already",
}
"""Old nodes that only held settings, showed latents or changed nothing, and why they are not missed."""
PASSES_ON: dict[tuple[str, int | str], str] = {
    ("MochiTextEncode", 1): "clip",
    ("Mochi1T5Encode", 1): "clip",
    ("MochiPrepareSigmas", 0): "sigmas",
}
"""{(type, output): the input that this output only passes on}. T5 Encode has no such output, but links to it remain if the editor
replaced MochiTextEncode."""
SETTERS, GETTERS = ("SetNode", "easy setNode"), ("GetNode", "easy getNode")
"""Nodes of KJNodes and Easy-Use that link without a line: a getter outputs the input of the setter with the same name."""
PASSES_ALL_ON = ("Reroute", "Reroute (rgthree)", *SETTERS, *GETTERS)
"""Nodes that output their only input."""
SENDERS = (
    "Anything Everywhere",
    "Anything Everywhere3",
    "Anything Everywhere?",
    "Prompts Everywhere",
    "Seed Everywhere",
)
"""Nodes of Use Everywhere: their inputs are sent to all unlinked inputs of the same type."""
CLIP_LOADERS = {"CLIPLoader": ("clip_name", "type"), "CLIPLoaderGGUF": ("clip_name", "type")}
"""Widgets of ComfyUI's text encoder loaders, in the editor's order, up to the one that selects the model."""
