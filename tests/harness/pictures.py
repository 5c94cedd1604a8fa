"""Make the documentation's pictures from the real thing: `python dev.py generate pictures`.

Thumbnails of the templates are videos made by them with the tiny model; the rest are screenshots of the editor.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from tests.harness import demo
from tests.harness.browser import PLAYING, Editor, open_editor
from tests.harness.client import ComfyClient
from tests.harness.contact_sheet import write_sheet
from tests.harness.frames import read_frames
from tests.harness.purple import train_purple
from tests.harness.server import ROOT, ComfyServer
from tests.harness.template_files import GIVEN, shrunk, write_files
from tests.harness.templates import TITLES, api_form, editor_form
from workflows.source import YOUR_VIDEO

WORKFLOWS = ROOT / "workflows"
HELP = ROOT / "web" / "docs" / "images"
DOCS = ROOT / "docs" / "images"
THUMBNAIL, THUMBNAIL_GAP, BEHIND = 320, 10, "#262729"
PROMPTS = {
    "text_to_video": "a red star moving to the right",
    "fast_preview": "a video of a blue square growing larger",
    "video_to_video": "a green circle moving right",
    "edit_video": "a red circle moving to the right",
    "edit_inverted": "a blue circle moving to the right",
    "long_video_low_memory": "a yellow circle moving in a circle",
    "fastmochi": "a white square moving to the left",
    "faster": "a red circle moving left",
    "genmo_exact": "A yellow circle falling over a gray background.",
    "lora": "a purple square moving left",
    "tiny_mochi": "a green triangle rising",
    "stock_nodes": "a blue square rising",
    "second_pass": "a white star growing larger",
    "prompt_list": "a green star moving to the right",
    "image_to_video": "a green square moving left",
    "first_last_frame": "a green square moving left",
    "extend_video": "a yellow circle moving right",
    "masked": "a red square moving left",
    "sharper": "a blue circle rising",
}
CHANGED = ("video_to_video", "edit_video", "edit_inverted", "masked")
"""Shown next to their inputs."""
EDITS = {"edit_video": "FlowEdit", "edit_inverted": "inversion"}
LONG = 3.2
# Shown in help pages.
SHOWN = (
    "text_to_video",
    "fast_preview",
    "video_to_video",
    "image_to_video",
    "edit_video",
    "edit_inverted",
    "lora",
    "fastmochi",
    "faster",
)
LOGO = (34, 66)
MOVING = 256
# A script that places the nodes of a readable picture next to the side bar, without notes that would be cut off, and returns
# their size including the titles of their groups.
NEAR = """() => {
    const title = 80, scale = 0.8, [x, y] = [80, 120];
    app.graph._nodes.filter(node => node.type === "MarkdownNote").forEach(note => app.graph.remove(note));
    const nodes = app.graph._nodes;
    const left = Math.min(...nodes.map(node => node.pos[0])), top = Math.min(...nodes.map(node => node.pos[1])) - title;
    const right = Math.max(...nodes.map(node => node.pos[0] + node.size[0]));
    const bottom = Math.max(...nodes.map(node => node.pos[1] + node.size[1]));
    Object.assign(app.canvas.ds, { scale, offset: [x / scale - left, y / scale - top] });
    app.canvas.setDirty(true, true);
    return [x - 15, y - 5, Math.min(scale * (right - left) + 30, 1500), Math.min(scale * (bottom - top) + 20, 800)];
}"""
MENU = {"x": 0, "y": 40, "width": 700, "height": 520}
# The area of the graph's nodes and groups on the page, with a margin.
AROUND = """() => {
    const { graph, ds: { scale, offset } } = app.canvas, margin = 20;
    const boxes = [...graph._nodes, ...graph._groups].map(item => item.boundingRect);
    const edges = [0, 1].map(axis => [
        Math.min(...boxes.map(box => box[axis])), Math.max(...boxes.map(box => box[axis] + box[axis + 2])),
    ].map(edge => scale * (edge + offset[axis])));
    const [[left, right], [top, bottom]] = edges;
    return [left - margin, top - margin, right - left + 2 * margin, bottom - top + 2 * margin];
}"""


def main() -> None:
    torch.set_num_threads(1)  # much faster for tiny models as soon as anything else runs
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_files(base)
        _, lora = train_purple(base / "purple")
        (base / "models" / "loras" / "mochi_lora.safetensors").write_bytes(lora.read_bytes())
        with ComfyServer(comfyui, base) as server:
            client = ComfyClient(server.url)
            shown = {name: template_frames(client, name, prompt) for name, prompt in PROMPTS.items()}
            given = pictures_of((base / "input" / YOUR_VIDEO).read_bytes())
            write_sheet(edits(given, shown), DOCS / "edits.png")
            shown |= {name: before_and_after(given, shown[name]) for name in CHANGED}
            for name, frames in shown.items():
                write_thumbnail(frames, WORKFLOWS / f"{TITLES[name]}.jpg")
            write_moving(demo_frames(client), DOCS / "tiny.webp")
            take_screenshots(server.url)


def demo_frames(client: ComfyClient) -> list[list[Image.Image]]:
    """The videos of `python dev.py demo`, with its seeds."""
    return [frames_of(client, demo.tiny_prompt(text, seed=seed)) for seed, text in enumerate(demo.PROMPTS)]


def template_frames(client: ComfyClient, name: str, prompt: str) -> list[Image.Image]:
    graph = shrunk(api_form(name), prompt)
    for node in graph.values():
        if name == "long_video_low_memory" and node["class_type"] == "Mochi1Length":
            node["inputs"]["seconds"] = LONG
    return frames_of(client, graph)


def frames_of(client: ComfyClient, graph: dict[str, Any]) -> list[Image.Image]:
    run = client.run(graph)
    assert run.outcome == "execution_success", run.error
    return pictures_of(client.download(run.files[0]))


def pictures_of(video: bytes) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in read_frames(video)]


def before_and_after(before: list[Image.Image], after: list[Image.Image]) -> list[Image.Image]:
    """Input and output side by side, uncropped. Templates of a pack have one picture, without the slider that
    ComfyUI's own have for this.
    """
    side = (THUMBNAIL - THUMBNAIL_GAP) // 2
    top = (THUMBNAIL - side) // 2
    joined = []
    for pair in zip(before, after, strict=False):
        picture = Image.new("RGB", (THUMBNAIL, THUMBNAIL), BEHIND)
        for left, title, frame in zip((0, THUMBNAIL - side), ("before", "after"), pair, strict=True):
            picture.paste(frame.resize((side, side), Image.Resampling.BICUBIC), (left, top))
            place = (left + side // 2, top - THUMBNAIL_GAP)
            ImageDraw.Draw(picture).text(place, title, "white", ImageFont.load_default(24), anchor="ms")
        joined.append(picture)
    return joined


def edits(given: list[Image.Image], shown: dict[str, list[Image.Image]]) -> list[tuple[str, list[Image.Image], Any]]:
    """Inputs above their results, as rows of a contact sheet."""
    rows = []
    for name, way in EDITS.items():
        frames = shown[name]
        rows.append((f"given: {GIVEN}", given[: len(frames)], ()))
        rows.append((f"{way}: {PROMPTS[name]}", frames, ()))
    return rows


def write_thumbnail(frames: list[Image.Image], path: Path) -> None:
    """An animated WebP: the editor requests .jpg, but browsers detect the type from the content."""
    first, *others = [frame.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC) for frame in frames]
    first.save(path, "WEBP", save_all=True, append_images=others, duration=50, loop=0, quality=70, method=4)
    print(path.relative_to(ROOT), path.stat().st_size)


def write_moving(videos: list[list[Image.Image]], path: Path) -> None:
    """Videos of equal length side by side, as an animated WebP."""
    frames = []
    for pictures in zip(*videos, strict=True):
        frame = Image.new("RGB", (MOVING * len(videos), MOVING))
        for i, picture in enumerate(pictures):
            frame.paste(picture.resize((MOVING, MOVING), Image.Resampling.BICUBIC), (i * MOVING, 0))
        frames.append(frame)
    frames[0].save(path, "WEBP", save_all=True, append_images=frames[1:], duration=50, loop=0, quality=75, method=4)
    print(path.relative_to(ROOT), path.stat().st_size)


def take_screenshots(url: str) -> None:
    HELP.mkdir(parents=True, exist_ok=True)
    # Without previews: the tiny model finishes after the first one, of noise, which would stay visible.
    settings = {"Comfy.Minimap.Visible": False, "Comfy.Execution.PreviewMethod": "none"}
    with open_editor(url, 1600, 1000, **settings) as editor:
        editor.open_templates()
        editor.page.wait_for_timeout(2000)
        shoot(editor, DOCS / "templates.png")
        editor.close_dialogs()
        for name in SHOWN:
            open_template(editor, name)
            shoot(editor, HELP / f"{name}.png", clip=clip(editor.page.evaluate(AROUND)))
        open_template(editor, "tiny_mochi")
        editor.page.get_by_test_id("queue-button").click()
        editor.page.wait_for_function(PLAYING, timeout=120_000)
        editor.page.wait_for_timeout(700)
        shoot(editor, DOCS / "graph.png", clip=bring_near(editor))
        show_help(editor, "Mochi1Sampler")
        shoot(editor, DOCS / "help.png")
        open_menu(editor, "Extensions", "Mochi Nodes")
        shoot(editor, DOCS / "convert.png", clip=MENU)


def open_template(editor: Editor, name: str) -> None:
    editor.load(editor_form(name), TITLES[name])
    editor.open_subgraph()
    editor.command("Comfy.Canvas.FitView")
    editor.page.wait_for_timeout(1500)


def bring_near(editor: Editor) -> dict[str, float]:
    """Zoom to the loaders through the video, as large as fits; returns their area on the page."""
    box = editor.page.evaluate(NEAR)
    editor.page.wait_for_timeout(1500)
    return clip(box)


def clip(box: list[float]) -> dict[str, float]:
    return dict(zip(("x", "y", "width", "height"), box, strict=True))


def show_help(editor: Editor, node_type: str) -> None:
    editor.page.evaluate("type => app.canvas.selectNode(app.graph._nodes.find(node => node.type === type))", node_type)
    editor.page.get_by_test_id("info-button").first.click()
    editor.page.wait_for_timeout(1500)


def open_menu(editor: Editor, *path: str) -> None:
    editor.page.mouse.click(*LOGO)
    for entry in path:
        editor.page.wait_for_timeout(600)
        editor.page.get_by_text(entry, exact=True).first.hover()
    editor.page.wait_for_timeout(600)


def shoot(editor: Editor, path: Path, **options: Any) -> None:
    editor.page.screenshot(path=path, **options)
    print(path.relative_to(ROOT), path.stat().st_size)


if __name__ == "__main__":
    main()
