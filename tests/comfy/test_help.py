"""The nodes' help pages are accurate: every input with its real range and default, and real messages."""

import ast
import re
import urllib.request
from pathlib import Path

import pytest

from tests.harness.locales import inputs_of, node_infos
from tests.harness.server import PACK, ROOT
from tests.harness.templates import TITLES, api_form

PAGES = ROOT / "web" / "docs"
SECTIONS = ["Inputs", "Outputs", "Example", "Common errors"]
# As in "16 to 4096 pixels, step 16".
UNIT = re.compile(r"(?<=\d) [a-zA-Z]+(?=[,;])")
# This many letters of its own distinguish a sentence from any other.
FIXED_LETTERS = 20


def pages():
    return {path.stem: path.read_text(encoding="utf-8") for path in PAGES.rglob("*.md")}


def sections(page):
    """The text under each heading; text before the first is under the title."""
    title, *rest = re.split(r"^#+ (.+)\n", page, flags=re.M)[1:]
    return {title: rest[0], **dict(zip(rest[1::2], rest[2::2], strict=True))}


def rows(section):
    """The cells of the first table, without its header."""
    table = section[section.index("|") :].split("\n\n")[0].strip()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def values(name, kind, options, info):
    """The required text about an input's range and default, without the unit."""
    if "default" in options:
        return f"{value_range(kind, options)}; default {number(options['default']) or 'empty'}"
    return f"{value_range(kind, options)}; {'required' if name in info['input']['required'] else 'optional'}"


def value_range(kind, options):
    """The required text about an input's range."""
    if kind == "COMBO":
        fixed = [choice for choice in options["options"] if "." not in choice]
        files = ["or a file" if fixed else "a file"] if fixed != options["options"] or not fixed else []
        return ", ".join(fixed + files)
    if kind in ("INT", "FLOAT"):
        step = f", step {number(options['step'])}" if "step" in options else ""
        return f"{number(options['min'])} to {number(options['max'])}{step}"
    return "text" if kind == "STRING" else kind


def number(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def sentences():
    """Patterns of all longer texts in the code, with values left open; `Checkpoint.error` prepends the file's name."""
    for path in [*(ROOT / "nodes").rglob("*.py"), *(ROOT / "mochi_core").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield from pattern(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "error":
                yield from pattern(node.args[0], before=r".+ ")


def pattern(node, before=""):
    """A pattern for a text in the syntax tree, if it can be distinguished from others."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
    if sum(len(text) for text in texts if isinstance(text, str)) >= FIXED_LETTERS:
        yield re.compile(before + "".join(re.escape(text) if isinstance(text, str) else ".*" for text in texts))


@pytest.fixture
def infos(comfy_client):
    return node_infos(comfy_client)


def test_every_node_has_a_page_and_every_page_a_node(infos):
    assert pages().keys() == infos.keys(), "a node's page is web/docs/<its id>.md"
    for name, page in pages().items():
        title, *others = sections(page)
        assert title == infos[name]["display_name"]
        assert others == SECTIONS, name


def test_every_input_is_there_with_its_range_and_default(infos):
    for name, page in pages().items():
        expected = [
            [f"`{key}`", values(key, kind, options, infos[name])]
            for key, (kind, options) in inputs_of(infos[name]).items()
        ]
        found = rows(sections(page)["Inputs"])
        told = [(key, *cell.split("<br>")) for key, cell in found]
        assert [[key, UNIT.sub("", given.strip("*"))] for key, _, given in told] == expected, name
        assert all(meaning for _, meaning, _ in told), name
        advanced = [options.get("advanced", False) for _, options in inputs_of(infos[name]).values()]
        assert [row[1].startswith("Advanced. ") for row in found] == advanced, name


def test_every_output_is_there(infos):
    for name, page in pages().items():
        assert [row[0].strip("`") for row in rows(sections(page)["Outputs"])] == infos[name]["output_name"], name


def test_examples_show_the_node():
    """One picture, and templates (in bold) that use the node; the front end follows no other links from here."""
    names = {title.removeprefix("Mochi 1 - "): name for name, title in TITLES.items()}
    for name, page in pages().items():
        example = sections(page)["Example"]
        (picture,) = re.findall(r"!\[.+\]\((.+)\)", example)
        assert page.count("](") == 1, name
        assert (PAGES / picture).is_file(), picture
        templates = [names[title] for title in re.findall(r"\*\*(.+?)\*\*", example)]
        assert templates, name
        for template in [*templates, Path(picture).stem]:
            assert name in {node["class_type"] for node in api_form(template).values()}, f"{name}: {template}"


def test_messages_are_those_of_the_code():
    known = list(sentences())
    shown = [
        (name, row[0].strip("`"))
        for name, page in pages().items()
        if "|" in sections(page)["Common errors"]
        for row in rows(sections(page)["Common errors"])
    ]
    unknown = [(name, message) for name, message in shown if not any(text.fullmatch(message) for text in known)]
    assert len(shown) > 20
    assert not unknown


def test_the_front_end_gets_the_pages(comfy_server):
    for name, page in pages().items():
        address = f"{comfy_server.url}/extensions/{PACK}/docs/{name}.md"
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert answer.read().decode() == page
            assert "html" not in answer.headers["Content-Type"]
