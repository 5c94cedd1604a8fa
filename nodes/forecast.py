"""What the editor requests before a run: how many tokens a prompt has, and how much memory a video takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web
from server import PromptServer

from ..mochi_core.geometry import VideoSize
from .bridge.forecast import ModelFile, describe_memory, describe_prompt
from .loaders import DTYPE_CHOICES, QUANTIZED, LoadTransformer, full_path

MAX_BYTES = 200_000
NUMBERS = {"width": 848, "height": 480, "num_frames": 163, "batch_size": 1, "window": 0}
"""Inputs of a memory request with their defaults; window 0 means no window."""


def register() -> None:
    routes = PromptServer.instance.routes
    routes.post("/mochi-nodes/tokens")(answering(tokens))
    routes.post("/mochi-nodes/memory")(answering(memory))


def answering(describe: Callable[[dict[str, Any]], str]):
    """A handler that answers JSON with `describe` of it as {"text"}, or with what is wrong with it as {"error"}.

    Both have status 200: a file that is not there yet, or a size still being typed, is not a failure for the browser to report. A
    malformed body has status 400.
    """

    async def handle(request: web.Request) -> web.Response:
        try:
            asked = await read_object(request)
        except ValueError as problem:
            return web.json_response({"error": str(problem)}, status=400)
        try:
            text = await asyncio.to_thread(describe, asked)
        except (ValueError, OSError) as problem:
            return web.json_response({"error": str(problem)})
        return web.json_response({"text": text})

    return handle


async def read_object(request: web.Request) -> dict[str, Any]:
    """The JSON object in a short request; ValueError if it is not one."""
    if not (request.content_length or MAX_BYTES + 1) <= MAX_BYTES:
        raise ValueError(f"Requests of more than {MAX_BYTES:,} bytes are refused.")
    try:
        asked = await request.json()
    except (LookupError, RecursionError):  # unknown charset, nested too deeply
        asked = None
    if not isinstance(asked, dict):
        raise ValueError("The request is not a JSON object.")
    return asked


def tokens(asked: dict[str, Any]) -> str:
    prompt = asked.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError("The prompt is not text.")
    return describe_prompt(prompt)


def memory(asked: dict[str, Any]) -> str:
    """`model_name` and `weight_dtype` are those of Load Mochi Transformer; without a name, the released model is assumed."""
    numbers = NUMBERS | {name: asked[name] for name in NUMBERS if name in asked}
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{name} is not a whole number of 0 or more.")
    size = VideoSize(numbers["height"], numbers["width"], numbers["num_frames"])
    return describe_memory(size, max(1, numbers["batch_size"]), numbers["window"] or None, model_file(asked))


def model_file(asked: dict[str, Any]) -> ModelFile | None:
    name, kept = asked.get("model_name"), asked.get("weight_dtype", "auto")
    if name is None:
        return None
    if not (isinstance(name, str) and isinstance(kept, str)):
        raise ValueError("model_name and weight_dtype are not text.")
    return ModelFile(full_path(name, *LoadTransformer.KINDS), DTYPE_CHOICES.get(kept), QUANTIZED.get(kept))
