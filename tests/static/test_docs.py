"""Links and pictures of the documentation lead somewhere; docstrings are read without what is around them."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.harness import architecture

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PAGES = [path for folder in ("", "docs/", "web/docs/", ".github/") for path in ROOT.glob(f"{folder}*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_kept(page):
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
    if (ROOT / ".git").exists():
        kept = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        inside = [(page.parent / target).resolve().relative_to(ROOT).as_posix() for target in targets]
        lost = [target for target in inside if not any(k == target or k.startswith(target + "/") for k in kept)]
        assert not lost


def test_docstrings_begin_with_what_they_are_about():
    """Editors show them alone: "Of one frame, in bytes" means nothing there."""
    sources = [path for path in ROOT.rglob("*.py") if ".dev" not in path.parts]
    bare = re.compile(r'^\s*(?:"""|# )(?:Of|Its|Their) .*', re.M)
    found = {path.name: bare.findall(path.read_text(encoding="utf-8")) for path in sources}
    assert sources
    assert not {name: lines for name, lines in found.items() if lines}


def test_the_picture_of_the_layers_is_drawn_from_the_code():
    assert architecture.PAGE.read_text(encoding="utf-8") == architecture.page(), (
        "run: python -m tests.harness.architecture"
    )
