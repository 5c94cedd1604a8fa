"""Mochi Nodes: Genmo's Mochi 1 for ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import MochiExtension

    return MochiExtension()
