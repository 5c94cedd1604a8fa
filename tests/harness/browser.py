"""ComfyUI's editor in a headless Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, TimeoutError, sync_playwright

from dev import BROWSERS
from tests.harness.client import ComfyClient

# For machines without a screen, a sandbox or network access.
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
# Settings of a user who has seen the tutorial.
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": True, "Comfy.Execution.PreviewMethod": "latent2rgb",
}  # fmt: skip
READY = "Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.Mochi1Sampler)"
PLAYING = """() => [...document.querySelectorAll("video")].some(video => {
    video.muted = true; video.play(); return video.readyState >= 3 && video.currentTime > 0.2; })"""
# Titles of drawn nodes in the open graph that overlap another one, or are partly outside a group.
CROWDED = """() => {
    const { _nodes: nodes, _groups: groups } = app.canvas.graph;
    nodes.forEach(node => node.updateArea());
    const edges = ({ boundingRect: [x, y, width, height] }) => [x, y, x + width, y + height];
    const meet = ([a, b, c, d], [e, f, g, h]) => a < g && e < c && b < h && f < d;
    const holds = ([a, b, c, d], [e, f, g, h]) => a <= e && b <= f && g <= c && h <= d;
    return nodes.filter((node, i) =>
        nodes.some((other, j) => i !== j && meet(edges(node), edges(other)))
        || groups.some(group => meet(edges(group), edges(node)) && !holds(edges(group), edges(node)))
    ).map(node => node.title);
}"""
# What the front end itself logs on a fresh or offline server, and when it first looks for translated help.
FOREIGN = re.compile(
    r"/(?:api/)?(?:userdata|users?\.css|user\.css|settings|view\?)|/docs/\w+/\w+\.md|^https?://(?!127\.0\.0\.1)"
)
HARMLESS = ("ComfyApp graph accessed before initialization",)


def executable() -> str | None:
    """A browser on this machine; None for the one that Playwright installed."""
    return os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)


class Editor:
    """A page with the editor, and its console messages."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, message: Any) -> None:
        if message.type != "error" or any(words in message.text for words in HARMLESS):
            return
        if not (message.text.startswith("Failed to load resource") and FOREIGN.search(message.location["url"])):
            self.errors.append(f"{message.text} {message.location['url']}")

    def wait_until_ready(self) -> None:
        self.page.wait_for_function(READY, timeout=60_000)
        self.page.wait_for_timeout(2000)

    def load(self, workflow: dict[str, Any], name: str = "test") -> None:
        self.page.evaluate("([flow, name]) => app.loadGraphData(flow, true, true, name)", [workflow, name])
        self.page.wait_for_timeout(500)

    def prompt(self) -> dict[str, Any]:
        """The prompt that the editor would queue now."""
        return json.loads(self.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))

    def node_types(self) -> list[str]:
        return self.page.evaluate("app.graph._nodes.map(node => node.type)")

    def missing(self) -> list[str]:
        """Node types unknown to the editor, and files that it marks as missing."""
        return self.page.evaluate(
            "app.graph._nodes.filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types))"
            ".map(node => node.type)"
        )

    def crowded(self) -> list[str]:
        """Titles of nodes that overlap others or the edge of a group, in the graph and in its subgraph."""
        found = self.page.evaluate(CROWDED)
        if self.open_subgraph():
            self.page.wait_for_timeout(700)
            found += self.page.evaluate(CROWDED)
            self.page.evaluate("app.canvas.setGraph(app.rootGraph ?? app.graph)")
        return found

    def open_subgraph(self) -> bool:
        """Open the first subgraph; returns whether there is one."""
        return self.page.evaluate(
            "() => { const node = app.graph._nodes.find(node => node.subgraph);"
            " if (node) app.canvas.openSubgraph(node.subgraph, node); return Boolean(node); }"
        )

    def command(self, name: str) -> None:
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)

    def open_templates(self) -> None:
        """The pack's page of the template browser. On a busy machine the dialog may not appear, so there is a second try."""
        for patience in (15_000, 60_000):
            self.command("Comfy.BrowseTemplates")
            entry = self.page.get_by_role("dialog").get_by_text("Mochi Nodes", exact=True).first
            try:
                return entry.click(timeout=patience)
            except TimeoutError:
                self.close_dialogs()
        raise AssertionError("The template browser does not list the pack.")

    def close_dialogs(self) -> None:
        for _ in range(3):
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(150)


@contextmanager
def open_editor(url: str, width: int = 1600, height: int = 1000, **settings: Any) -> Iterator[Editor]:
    """A fresh browser on the server's editor; `settings` are the front end's."""
    ComfyClient(url).post("/settings", SETTINGS | settings)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height})
        editor = Editor(page)
        page.goto(url)
        editor.wait_until_ready()
        try:
            yield editor
        finally:
            browser.close()


def label(editor, node_type, name):
    return editor.page.evaluate(
        "([type, name]) => app.graph._nodes.find(node => node.type === type)"
        ".widgets.find(widget => widget.name === name).label",
        [node_type, name],
    )


def line(editor, node_type):
    """The pack's text inside the first node of a type."""
    return editor.page.evaluate(
        "type => app.graph._nodes.find(node => node.type === type)"
        ".widgets.find(widget => widget.name === 'forecast').element.textContent",
        node_type,
    )


TIME_LEFT = re.compile(r"^\d+ of \d+, \d+:\d\d left$")
