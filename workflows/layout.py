"""Layout of a graph's nodes, groups and notes: columns from left to right along the data flow; no link runs backwards."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .source import Link, Node, Nodes

Json = dict[str, Any]
GAP = 28
TITLE = 30
"""Height of a node's title, which is above its position."""
MOST_WIDE = 1728
"""Maximum width of a graph, if its columns allow it: the editor fits it into three quarters of the window, and below 57 % of
their size nodes are drawn without text. This gives 60 % in a window of 1400 pixels."""
MOST_HIGH = 1150
LOADERS = ("Mochi1LoadTransformer", "Mochi1LoadT5", "Mochi1LoadVAE")
SAMPLERS = ("Mochi1Sampler", "Mochi1Edit", "KSampler", "SamplerCustomAdvanced")
TEXTS = ("Mochi1T5Encode", "CLIPTextEncode", "PrimitiveStringMultiline")
"""All have the same width: the default renderer reuses a text's width for the same id in other subgraphs."""
WIDTHS = {
    **dict.fromkeys(LOADERS, 280),
    "Mochi1Sampler": 300,
    "Mochi1TiledVAEDecode": 250,
    **dict.fromkeys(TEXTS, 266),
    "LoadVideo": 300,
    "LoadImage": 300,
}
WIDTH = 230
"""Minimum width of a node in the default renderer."""
SUBGRAPH = 440
RESULT = "SaveVideo"
RESULT_WIDTHS = (300, 460)
VIEWER = 340
"""Height of the player: that of a square video at the smaller of these widths."""
PREVIEW = 230
"""Height that a preview adds to a sampler."""
NOTE = 440
LETTER = 5
"""Average width of a character in a note."""
NOTE_LINES = {"|": 27, "-": 24, "": 7}
"""Heights of a table row, a list item and an empty line; a line of text has 16."""
# Groups: the title and colour of each step.
STEPS = (("Files", "#3f789e"), ("Prompt and settings", "#8a6d3b"), ("Video", "#5b7f4f"), ("Result", "#7a4f8f"))


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float


def columns(nodes: Nodes) -> list[list[str]]:
    """Names by column: loaders, and nodes that only have links from outside a subgraph, first; every other node right of all its
    inputs; settings directly left of the node that uses them.
    """
    depth: dict[str, int] = {}

    def column(name: str) -> int:
        if name not in depth:
            links = [column(link.node) for link in links_of(nodes[name]) if link.node in nodes]
            outside = nodes[name].type in LOADERS or (links_of(nodes[name]) and not links)
            depth[name] = 0 if outside else 1 + max(links, default=0)
        return depth[name]

    for name in nodes:
        column(name)
    for name, node in nodes.items():
        users = [depth[user] for user, other in nodes.items() if any(link.node == name for link in links_of(other))]
        if node.type not in LOADERS and not links_of(node) and users:
            depth[name] = max(1, min(users) - 1)
    used = sorted(set(depth.values()))
    return [[name for name in nodes if depth[name] == number] for number in used]


def links_of(node: Node) -> list[Link]:
    return [value for value in node.inputs.values() if isinstance(value, Link)]


def place(nodes: Nodes, heights: dict[str, int], notes: Sequence[str]) -> tuple[dict[str, Box], list[Box], list[Json]]:
    """Boxes of the nodes and of the notes, and the groups.

    The first note is above the nodes before the sampler, the second below the sampler. If that makes the graph too tall, both are
    below the sampler; next to a subgraph's node, both are on its left.
    """
    names = columns(nodes)
    around = "subgraph" in nodes
    left = NOTE + 2 * GAP if around and notes else 0
    widths = [max(_width(name, nodes[name]) for name in column) for column in names]
    least = [widths[i] if any(nodes[name].type in TEXTS for name in names[i]) else WIDTH for i in range(len(names))]
    if any(nodes[name].type == RESULT for name in names[-1]):
        narrow, wide = RESULT_WIDTHS
        widths = _fitting(widths[:-1], least[:-1], MOST_WIDE - GAP - narrow)
        room = MOST_WIDE - sum(widths) - GAP * len(names) - left
        widths.append(max(narrow, min(wide, room)))
    else:
        widths = _fitting(widths, least, MOST_WIDE)
    if around:
        return (
            _stacked(names, widths, heights, left, [0] * len(names)),
            _below(notes, 0, 0, NOTE),
            [],
        )
    first = _sampler(nodes, names)
    room = MOST_HIGH - max(sum(heights[name] + GAP + TITLE for name in column) for column in names[:first])
    title = note_height(notes[0], sum(widths[:first]) + GAP * (first - 1)) if notes else 0
    on_top = bool(notes) and title + 3 * GAP + TITLE <= room
    top = title + 3 * GAP + TITLE if on_top else 0
    boxes = _stacked(names, widths, heights, 0, [top] * first + [0] * (len(names) - first))
    steps = [names[:1], names[1:first], names[first:-1], names[-1:]]
    before, video = ([boxes[name] for column in step for name in column] for step in (steps[0] + steps[1], steps[2]))
    middle = (video[0].x, max(box.y + box.height for box in video) + 2 * GAP + TITLE, _right(video) - video[0].x)
    above = [Box(0, 0, _right(before), title)] if on_top else []
    below = notes[len(above) :]
    return boxes, above + _below(below, *middle), _groups(steps, boxes, PREVIEW if above and not below else 0)


def _fitting(widths: list[int], least: list[int], most: int) -> list[int]:
    """The widths of columns, reduced towards `least` if their sum would exceed `most`."""
    excess = sum(widths) + GAP * (len(widths) - 1) - most
    share = min(1.0, max(0.0, excess / max(1, sum(widths) - sum(least))))
    return [math.floor(width - share * (width - low)) for width, low in zip(widths, least, strict=True)]


def _stacked(
    names: list[list[str]], widths: list[int], heights: dict[str, int], left: float, tops: list[float]
) -> dict[str, Box]:
    boxes: dict[str, Box] = {}
    for column, width, top in zip(names, widths, tops, strict=True):
        for name in column:
            boxes[name] = Box(left, top, width, heights[name])
            top += heights[name] + GAP + TITLE
        left += width + GAP
    return boxes


def _below(notes: Sequence[str], left: float, top: float, width: float) -> list[Box]:
    boxes: list[Box] = []
    for text in notes:
        boxes.append(Box(left, top, width, note_height(text, width)))
        top += boxes[-1].height + GAP + TITLE
    return boxes


def note_height(text: str, width: float) -> float:
    """Height of a note's text, without its title: URLs of links are not shown, and lines of a paragraph are joined."""
    shown = re.sub(r"\]\(.+?\)|\*", "", text.partition("\n")[2])
    lines = re.sub(r"(?<=[^\s|])\n(?=[^\s|-])", " ", shown).splitlines()
    in_line = (width - 30) / LETTER
    return 18 + sum(NOTE_LINES.get(line.lstrip()[:1]) or 16 * math.ceil(len(line) / in_line) for line in lines)


def _width(name: str, node: Node) -> int:
    return SUBGRAPH if name == "subgraph" else WIDTHS.get(node.type, WIDTH)


def _sampler(nodes: Nodes, names: list[list[str]]) -> int:
    """Index of the first column with a sampler."""
    return min(number for number, column in enumerate(names) if any(nodes[name].type in SAMPLERS for name in column))


def _right(boxes: list[Box]) -> float:
    return max(box.x + box.width for box in boxes)


def _groups(steps: list[list[list[str]]], boxes: dict[str, Box], preview: float) -> list[Json]:
    """Numbered steps: loaders, nodes before the sampler, the rest with room for a preview below, and the result."""
    groups = []
    for number, (step, (title, color)) in enumerate(zip(steps, STEPS, strict=True), 1):
        inside = [boxes[name] for column in step for name in column]
        x, y = min(box.x for box in inside), min(box.y for box in inside)
        bottom = max(box.y + box.height for box in inside) + (preview if title == "Video" else 0)
        bounding = [x - 10, y - TITLE - 42, _right(inside) - x + 20, bottom - y + TITLE + 54]
        groups.append(
            {
                "id": number,
                "title": f"{number} {title}",
                "bounding": bounding,
                "color": color,
                "font_size": 24,
                "flags": {},
            }
        )
    return groups
