"""The order in which the editor lists this pack's templates: the server lists them in the disk's order."""

from __future__ import annotations

import json
from pathlib import Path

from aiohttp import web
from server import PromptServer

ROUTES = ("/workflow_templates", "/api/workflow_templates")
PACK = Path(__file__).parents[1].name
PREFIX = "Mochi 1 - "
ORDER = (
    "Text to Video",
    "Tiny demo, no download",
    "Quick draft",
    "Image to Video",
    "First and last frame",
    "Extend a video",
    "Video to Video",
    "Video to Video, masked",
    "Edit video",
    "Edit video by inversion",
    "Long video, 8 to 12 GB",
    "List of prompts",
    "LoRA",
    "Second pass, larger",
    "Sharper",
    "Faster",
    "FastMochi, 8 steps",
    "Genmo exact",
    "KSampler and stock nodes",
)
"""Beginners' first, then by input (text, images, a video), then by technique. The order of `TEMPLATES` in workflows/source.py,
which is not published."""


def register() -> None:
    app = PromptServer.instance.app
    app.middlewares.append(ordering)


@web.middleware
async def ordering(request: web.Request, handler) -> web.StreamResponse:
    """Sorts this pack's titles in the host's response, and leaves every other response alone."""
    response = await handler(request)
    if request.path in ROUTES and isinstance(response, web.Response) and response.status == 200 and response.text:
        titles = json.loads(response.text)
        titles[PACK] = sorted(titles.get(PACK, []), key=place)
        response.text = json.dumps(titles)
    return response


def place(title: str) -> int:
    name = title.removeprefix(PREFIX)
    return ORDER.index(name) if name in ORDER else len(ORDER)
