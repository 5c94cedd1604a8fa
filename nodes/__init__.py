"""The nodes: schemas and thin translation; bridge/ and mochi_core do the work."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import forecast, replacements, templates
from .bridge.doctor import log_report_if_asked
from .edit import Edit, Invert, RFEdit
from .image_to_video import ImageToVideo
from .loaders import LoadT5, LoadTransformer, LoadVAE
from .lora import LoadLoRA
from .sampling import Length, Sampler, Sigmas
from .speed import Cache, Guider, Parallel
from .text import T5Encode
from .vae import TiledVAEDecode, VAEEncode

NODES: list[type[io.ComfyNode]] = [
    LoadTransformer,
    LoadVAE,
    LoadT5,
    LoadLoRA,
    T5Encode,
    Length,
    Sigmas,
    Sampler,
    ImageToVideo,
    Edit,
    Invert,
    RFEdit,
    Cache,
    Guider,
    Parallel,
    TiledVAEDecode,
    VAEEncode,
]


class MochiExtension(ComfyExtension):
    async def on_load(self) -> None:
        await replacements.register()
        forecast.register()
        templates.register()
        await log_report_if_asked()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
