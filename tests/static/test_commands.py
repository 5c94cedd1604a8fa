"""The commands in the documentation: what they run exists, and accepts the options shown."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import migrate.__main__
import mochi_core.__main__
import mochi_core.train.__main__

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^ *((?:mochi|python|torchrun|accelerate|[A-Z_]+=[^\s$]+) (?:[^#\n\\]|\\\n)*)", re.M)
PARSERS = {
    module.__name__.removesuffix(".__main__"): module
    for module in (migrate.__main__, mochi_core.__main__, mochi_core.train.__main__)
}
LEFT_OUT = "--transformer FILE --t5 FILE --vae FILE"
"""What "..." stands for."""
LEAST = 40
"""The documentation shows at least this many commands; fewer means that the pattern no longer finds them."""


def shown():
    """The words of each command, by page and line."""
    return {
        f"{page.name}: {found.splitlines()[0].strip()}": shlex.split(found.replace("\\\n", " "))
        for page in PAGES
        for found in COMMAND.findall(page.read_text(encoding="utf-8"))
    }


def module_and_arguments(words):
    """The module that `python -m` runs, even through a launcher, and its arguments; None for other programs."""
    if words[0] == "mochi":
        return "mochi_core", words[1:]
    if "-m" in words and words[words.index("-m") + 1] != "pip":
        at = words.index("-m") + 1
        return words[at], words[at + 1 :]
    return None


def test_commands_are_found():
    assert len(shown()) >= LEAST


@pytest.mark.parametrize("words", shown().values(), ids=shown())
def test_command_can_be_given(words):
    module, arguments = module_and_arguments(words) or ("", [])
    if not module:
        assert "pip" in words or (ROOT / words[1]).is_file()
        return
    assert importlib.util.find_spec(module)
    if module in PARSERS and "--help" not in arguments:
        if "..." in arguments:
            at = arguments.index("...")
            arguments[at : at + 1] = shlex.split(LEFT_OUT)
            arguments += ["--prompt", "x"] * (arguments[0] == "generate" and "--prompt" not in arguments)
        PARSERS[module]._parser().parse_args(arguments)
