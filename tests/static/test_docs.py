"""The documentation's links and pictures exist; docstrings can be read out of context."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.harness import architecture
from workflows.notes import PAGE, files_note, task_note
from workflows.source import TEMPLATES

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
TO_HEADING = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")
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


def headings(page):
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page):
    found = TO_HEADING.findall(page.read_text(encoding="utf-8"))
    assert [(to, title) for to, title in found if title not in headings(page.parent / to if to else page)] == []


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_notes_of_templates_link_to_pages_that_are_there(template):
    for to in re.findall(rf"\]\({re.escape(PAGE)}/([^)]+)\)", task_note(template) + files_note(template)):
        page, _, title = to.partition("#")
        assert (ROOT / "docs" / page).exists()
        assert not title or title in headings(ROOT / "docs" / page)


def test_every_template_is_described():
    """For readers of the README, for users of the API, and for whoever tests everything before a release."""
    for page, named in (("README.md", "title"), ("docs/api.md", "name"), ("docs/manual_tests.md", "title")):
        text = (ROOT / page).read_text(encoding="utf-8")
        names = [getattr(template, named).removeprefix("Mochi 1 - ") for template in TEMPLATES]
        assert [name for name in names if name.lower() not in text.lower()] == []


def test_every_picture_is_shown():
    pictures = [path for folder in ("docs", "web/docs") for path in (ROOT / folder / "images").glob("*.[pw][ne]*")]
    text = "".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "pyproject.toml"])
    assert pictures
    assert [path.name for path in pictures if f"images/{path.name}" not in text] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_docstrings_begin_with_what_they_are_about():
    """Editors show them alone, where "Of one frame, in bytes" means nothing."""
    sources = [path for path in ROOT.rglob("*.py") if ".dev" not in path.parts]
    bare = re.compile(r'^\s*(?:"""|# )(?:Of|Its|Their) .*', re.M)
    found = {path.name: bare.findall(path.read_text(encoding="utf-8")) for path in sources}
    assert sources
    assert not {name: lines for name, lines in found.items() if lines}


def test_the_picture_of_the_layers_is_drawn_from_the_code():
    assert architecture.PAGE.read_text(encoding="utf-8") == architecture.page(), (
        "run: python -m tests.harness.architecture"
    )
