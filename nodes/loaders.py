"""Load Mochi Transformer, Load Mochi VAE, Load Mochi T5."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..mochi_core.checkpoints.formats.reader import INDEX_PATTERN
from ..mochi_core.checkpoints.names.detect import FRAME_LEVELS_CHOICES
from ..mochi_core.dtypes import DTYPES
from ..mochi_core.shown import shown
from .bridge.attention import CHOICES as ATTENTIONS
from .bridge.model import load_model
from .bridge.text import load_clip
from .bridge.tiny_vae import is_tiny_vae, load_tiny_vae
from .bridge.vae import load_vae
from .category import CATEGORY

DTYPE_CHOICES = {"auto": None, **DTYPES}
DTYPE_CHOICES_WITH_FP8 = {**DTYPE_CHOICES, "fp8_e4m3fn": torch.float8_e4m3fn}
# Values of weight_dtype that quantise the matrices of the blocks, and the core's names for them.
QUANTIZED = {"fp8_e4m3fn": "fp8", "fp8_rowwise": "fp8_rowwise", "int8": "int8", "q4_0": "q4_0"}
UNLISTED = ("*.gguf", INDEX_PATTERN)
NO_SECOND_FILE = "none"
# Index of the creation time in an entry of the host's cache.
WALKED_AT = 2
# The tiny Mochi that comes with the pack: only these loaders list it; other nodes' lists stay unchanged.
OWN_MODELS = Path(__file__).parents[1] / "models"


def files(*kinds: str) -> list[str]:
    """Files in the host's model folders, including those it does not list (GGUF, indices of sharded files), and the tiny Mochi.

    Schemas, and with them these lists, are built many times per prompt, so folders are only walked again if the host did so.
    """
    for kind in kinds:
        folder_paths.get_filename_list(kind)
    walks = folder_paths.filename_list_cache
    # Another pack lists files in its own way, or has cleared the cache.
    if any(kind not in walks for kind in kinds):
        return _listed(kinds)
    return [*_listed_once(kinds, tuple(walks[kind][WALKED_AT] for kind in kinds))]


@lru_cache(maxsize=4)  # one per loader
def _listed_once(kinds: tuple[str, ...], _walked_at: tuple[float, ...]) -> list[str]:
    return _listed(kinds)


def _listed(kinds: tuple[str, ...]) -> list[str]:
    listed = {name for kind in kinds for name in [*folder_paths.get_filename_list(kind), *unlisted_files(kind)]}
    return [*sorted(listed - own_files(*kinds)), *sorted(own_files(*kinds))]


def own_files(*kinds: str) -> set[str]:
    return {path.name for kind in kinds for path in (OWN_MODELS / kind).glob("*.safetensors")}


def unlisted_files(kind: str) -> list[str]:
    folders = folder_paths.get_folder_paths(kind)
    names = (name for folder in folders for name in folder_paths.recursive_search(folder, [".git"])[0])
    return [name for name in names if any(fnmatch(name.lower(), pattern) for pattern in UNLISTED)]


def full_path(name: str, *kinds: str) -> str:
    """The path of a file in the host's model folders or the pack's own; ValueError if it is in neither."""
    for kind in kinds:
        if path := folder_paths.get_full_path(kind, name):
            return path
        if name in own_files(kind):
            return str(OWN_MODELS / kind / name)
    raise ValueError(f"{shown(name)} is in none of the model folders {', '.join(kinds)}; put it there and press R.")


class LoadTransformer(io.ComfyNode):
    KINDS = ("diffusion_models", "checkpoints")

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1LoadTransformer",
            display_name="Load Mochi Transformer",
            category=CATEGORY,
            description="Loads Mochi's denoiser from a file in Genmo's, ComfyUI's or diffusers' layout, from an all-in-one "
            "file, or from the index of a sharded one.",
            search_aliases=["genmo", "video model", "mochi model", "mochi unet", "MochiModelLoader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files(*cls.KINDS),
                    tooltip="A file in models/diffusion_models or models/checkpoints, such as mochi_preview_bf16.safetensors.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=[*DTYPE_CHOICES, *QUANTIZED],
                    default="auto",
                    tooltip="Precision of the weights. auto uses bf16 if the device supports it, and keeps quantised files "
                    "as they are. fp8_e4m3fn and int8 halve the memory of the blocks, q4_0 reduces it to 28 %; the "
                    "result changes a little, least with int8. fp8_rowwise also multiplies in fp8 if the GPU can, "
                    "which changes the result more; it has not yet been run on a GPU.",
                ),
                io.Combo.Input(
                    "attention",
                    options=ATTENTIONS,
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="auto picks the exact attention that published figures call the fastest for the device, or what "
                    "the server was started with; host leaves it to ComfyUI. A name picks that one, or ends in an "
                    "error that says why not. All are exact except sage, which multiplies in 8 bits. None has yet "
                    "been run on a GPU with this pack.",
                ),
                io.Combo.Input(
                    "frame_levels",
                    options=list(FRAME_LEVELS_CHOICES),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Whether the weights were trained with a noise level for each frame, for Mochi Image to Video. "
                    "auto looks for pusa in the file's name, or for a note in the file; on is for a LoRA that was "
                    "trained this way.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Works with every sampler, LoRA loader and model patch of ComfyUI.")],
        )

    @classmethod
    def execute(cls, model_name, weight_dtype="auto", attention="auto", frame_levels="auto"):
        path, dtype = full_path(model_name, *cls.KINDS), DTYPE_CHOICES.get(weight_dtype)
        levels = FRAME_LEVELS_CHOICES[frame_levels]
        return io.NodeOutput(load_model(path, dtype, QUANTIZED.get(weight_dtype), attention, levels))


class LoadVAE(io.ComfyNode):
    KINDS = ("vae", "checkpoints")

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1LoadVAE",
            display_name="Load Mochi VAE",
            category=CATEGORY,
            description="Loads Mochi's autoencoder. Decoding streams through it exactly, without tiles or seams.",
            search_aliases=["genmo", "video vae", "mochi vae", "MochiVAELoader", "MochiVAEEncoderLoader"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=files(*cls.KINDS),
                    tooltip="A file in models/vae or models/checkpoints, such as mochi_vae.safetensors; also a decoder or an "
                    "encoder alone.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPE_CHOICES),
                    default="auto",
                    tooltip="Precision of the autoencoder. fp32 is the most exact; auto uses bf16 if the device supports it.",
                ),
                io.Combo.Input(
                    "second_file",
                    options=[NO_SECOND_FILE, *files(*cls.KINDS)],
                    default=NO_SECOND_FILE,
                    optional=True,
                    advanced=True,
                    tooltip="The other half, if encoder and decoder are separate files.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="Works with ComfyUI's own VAE Decode and VAE Encode, too.")],
        )

    @classmethod
    def execute(cls, vae_name, dtype="auto", second_file=NO_SECOND_FILE):
        names = [vae_name] if second_file == NO_SECOND_FILE else [vae_name, second_file]
        paths = [full_path(name, *cls.KINDS) for name in names]
        if len(paths) == 1 and is_tiny_vae(paths[0]):
            return io.NodeOutput(load_tiny_vae(paths[0], DTYPE_CHOICES[dtype]))
        return io.NodeOutput(load_vae(paths, DTYPE_CHOICES[dtype]))


class LoadT5(io.ComfyNode):
    KINDS = ("text_encoders", "checkpoints")

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1LoadT5",
            display_name="Load Mochi T5",
            category=CATEGORY,
            description="Loads the T5 text encoder that Mochi reads prompts with.",
            search_aliases=["genmo", "mochi clip", "mochi text encoder", "t5xxl"],
            inputs=[
                io.Combo.Input(
                    "t5_name",
                    options=files(*cls.KINDS),
                    tooltip="A file in models/text_encoders or models/checkpoints, such as t5xxl_fp16.safetensors.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPE_CHOICES_WITH_FP8),
                    default="auto",
                    tooltip="Precision of the weights; auto keeps that of the file. The arithmetic is fp32 either way.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip="cpu leaves the graphics memory to the other models; a prompt then takes some seconds.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="Works with T5 Encode (Mochi) and with CLIP Text Encode.")],
        )

    @classmethod
    def execute(cls, t5_name, dtype="auto", device="default"):
        return io.NodeOutput(load_clip(full_path(t5_name, *cls.KINDS), DTYPE_CHOICES_WITH_FP8[dtype], device))
