"""Other packs' workflows.

For MochiWrapper's, the editor offers to replace nodes, and prompts are converted on arrival. The editor's command converts those
and, because only users who chose the command want it, graphs for the built-in Mochi.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from aiohttp import web
from comfy_api.latest import ComfyAPI, io
from server import PromptServer

import nodes as host

from ..migrate import migrate, migrate_prompt
from ..migrate.account import add_account
from ..migrate.api import Prompt, is_prompt
from ..migrate.editor import is_workflow
from ..migrate.shown import sentence
from ..migrate.tables import WRAPPER, ReplacementRule

CONVERTED: ContextVar[tuple[object, object]] = ContextVar("CONVERTED", default=(None, None))
"""The prompt of the current request, as it arrived and as converted; None for both if there is none."""


async def register() -> None:
    """Offer replacements only for nodes that become a single one of ours; the server itself would stop at a missing input."""
    api = ComfyAPI()
    for old, rule in WRAPPER.items():
        if len(rule.parts) == 1:
            await api.node_replacement.register(replacement(old, rule))
    app = PromptServer.instance.app
    app.middlewares.append(convert_in_a_thread)
    PromptServer.instance.add_on_prompt_handler(on_prompt)
    PromptServer.instance.routes.post("/mochi-nodes/migrate")(migrate_request)


def replacement(old: str, rule: ReplacementRule) -> io.NodeReplace:
    (part,) = rule.parts
    mappings: Any = [mapping(new, old) for new, old in part.carry.items()]  # the host's type hint does not allow a dict
    return io.NodeReplace(
        new_node_id=part.node,
        old_node_id=old,
        old_widget_ids=list(rule.widgets),
        input_mapping=mappings,
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    )


def mapping(new: str, old: str) -> dict[str, Any]:
    """The host copies values verbatim, and the loader lacks some of the wrapper's precisions: use the file's own."""
    return {"new_id": new, "set_value": "auto"} if new == "weight_dtype" else {"new_id": new, "old_id": old}


@web.middleware
async def convert_in_a_thread(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Convert a prompt before the host's handler reads it: there, a large one would block every other client."""
    if request.method == "POST" and request.path in ("/prompt", "/api/prompt"):
        CONVERTED.set(await asyncio.to_thread(read_and_convert, await request.read()))  # the request caches its body
    return await handler(request)


def read_and_convert(body: bytes) -> tuple[object, object]:
    try:
        prompt = json.loads(body)["prompt"]
    except (ValueError, LookupError, TypeError, RecursionError):  # the host reports what is wrong with it
        return None, None
    return (prompt, converted(prompt)) if is_prompt(prompt) else (None, None)


def on_prompt(request: Any) -> Any:
    """Convert a prompt's old nodes that nothing installed runs; every other request stays as it is."""
    prompt = request.get("prompt") if isinstance(request, dict) else None
    if not is_prompt(prompt):
        return request
    arrived, done = CONVERTED.get()
    if arrived != prompt:  # another handler changed it
        done = converted(prompt)
    return {**request, "prompt": done}


def converted(prompt: Prompt) -> Prompt:
    """The prompt with any old nodes replaced by ours."""
    try:
        migration = migrate_prompt(prompt, runs=host.NODE_CLASS_MAPPINGS)  # pyright: ignore[reportAttributeAccessIssue] - resolved to our own folder
    except ValueError:  # none of the wrapper's nodes in it
        return prompt
    for note in migration.notes:
        logging.info("Old Mochi workflow: %s", sentence(note))
    return migration.workflow


async def migrate_request(request: web.Request) -> web.Response:
    """The editor's command to convert: a workflow in, {"workflow", "notes"} or {"error"} out."""
    try:
        workflow = await request.json()
    except (ValueError, LookupError, RecursionError):  # not JSON, unknown charset, nested too deeply
        return refused("The workflow cannot be read: send it as JSON in UTF-8, as the editor saves it.")
    try:
        migration = await asyncio.to_thread(migrate, workflow, stock=True)
    except ValueError as problem:
        return refused(str(problem))
    notes = [*map(sentence, migration.notes)]
    if is_workflow(migration.workflow):
        add_account(migration.workflow, notes)
    return web.json_response({"workflow": migration.workflow, "notes": notes})


def refused(reason: str) -> web.Response:
    return web.json_response({"error": sentence(reason)}, status=400)
