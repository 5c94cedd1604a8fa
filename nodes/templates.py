"""The order in which the editor lists this pack's templates: the server reads a folder as the disk has it."""

from __future__ import annotations

import json
from pathlib import Path

from aiohttp import web
from server import PromptServer

ROUTES = ("/workflow_templates", "/api/workflow_templates")
PACK = Path(__file__).parents[1].name
FIRST = ("Mochi 1 - Text to Video", "Mochi 1 - Tiny demo, no download")
"""For beginners; the others follow by the alphabet."""


def register() -> None:
    app = PromptServer.instance.app
    app.middlewares.append(ordering)


@web.middleware
async def ordering(request: web.Request, handler) -> web.StreamResponse:
    """Sorts this pack's titles in the host's answer, and leaves every other answer alone."""
    response = await handler(request)
    if request.path in ROUTES and isinstance(response, web.Response) and response.text:
        titles = json.loads(response.text)
        titles[PACK] = sorted(titles.get(PACK, []), key=place)
        response.text = json.dumps(titles)
    return response


def place(title: str) -> tuple[int, str]:
    return FIRST.index(title) if title in FIRST else len(FIRST), title.lower()
