"""A small client of ComfyUI's HTTP and WebSocket API."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

RUN_SECONDS = 600
FINAL_EVENTS = ("execution_success", "execution_error", "execution_interrupted")


class PromptRefused(Exception):  # noqa: N818 - named after what the server did
    """The server did not accept a prompt; `.details` is its answer."""

    def __init__(self, details: dict[str, Any]) -> None:
        self.details = details
        reasons = [details.get("error", {}).get("message", "refused")]
        reasons += [
            f"{e['message']}: {e['details']}" for n in details.get("node_errors", {}).values() for e in n["errors"]
        ]
        super().__init__("; ".join(reasons))


@dataclass
class Run:
    """The course of a prompt's run."""

    prompt_id: str
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    """As received: 4 bytes of length, metadata, an image."""

    @property
    def outcome(self) -> str:
        return self.events[-1][0]

    @property
    def error(self) -> str:
        return self.events[-1][1].get("exception_message", "").strip()

    @property
    def outputs(self) -> dict[str, Any]:
        return {data["node"]: data["output"] or {} for name, data in self.events if name == "executed"}

    @property
    def files(self) -> list[dict[str, str]]:
        found = [value for output in self.outputs.values() for value in output.values() if isinstance(value, list)]
        return [item for items in found for item in items if isinstance(item, dict) and "filename" in item]


class ComfyClient:
    def __init__(self, url: str, preview_method: str = "latent2rgb") -> None:
        self.url, self.preview_method = url, preview_method

    def run(self, prompt: dict[str, Any], on_event: Callable[[str, dict[str, Any]], None] | None = None) -> Run:
        """Queue a prompt and follow it until it ends.

        Raises:
            PromptRefused: the server rejected it as invalid.
        """
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_event), RUN_SECONDS))

    async def _run(self, prompt: dict[str, Any], on_event: Callable[[str, dict[str, Any]], None] | None) -> Run:
        client_id = uuid.uuid4().hex
        async with aiohttp.ClientSession() as session:
            socket = session.ws_connect(f"{self.url}/ws?clientId={client_id}", max_msg_size=0)
            async with socket as events:
                await events.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
                run = Run(await self._queue(session, prompt, client_id))
                async for message in events:
                    if message.type == aiohttp.WSMsgType.BINARY:
                        run.previews.append(message.data[4:])
                    elif message.type == aiohttp.WSMsgType.TEXT and self._record(run, message.json(), on_event):
                        return run
        raise ConnectionError("The server closed the connection before the prompt ended.")

    async def _queue(self, session: aiohttp.ClientSession, prompt: dict[str, Any], client_id: str) -> str:
        body = {"prompt": prompt, "client_id": client_id, "extra_data": {"preview_method": self.preview_method}}
        async with session.post(f"{self.url}/prompt", json=body) as answer:
            details = await answer.json()
            if answer.status != 200 or details.get("node_errors"):
                raise PromptRefused(details)
            return details["prompt_id"]

    @staticmethod
    def _record(run: Run, message: dict[str, Any], on_event: Callable[[str, dict[str, Any]], None] | None) -> bool:
        name, data = message["type"], message.get("data", {})
        if data.get("prompt_id") != run.prompt_id:
            return False
        run.events.append((name, data))
        if on_event is not None:
            on_event(name, data)
        return name in FINAL_EVENTS

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> None:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).close()

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def download(self, file: dict[str, str]) -> bytes:
        query = urllib.parse.urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
        with urllib.request.urlopen(f"{self.url}/view?{query}", timeout=60) as answer:
            return answer.read()
