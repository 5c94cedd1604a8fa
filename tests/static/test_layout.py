"""Code shared by tests and benchmarks is in tests/harness, conftest.py files and benchmarks, never in a test module."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In strings too: some hold code for other processes.
IMPORT = re.compile(
    r"^\s*(?:from|import)\s+(\.*(?:tests|benchmarks|dev)\b[\w.]*|\.[\w.]*)(?:\s+import\s+([^#\n]*))?", re.M
)


def imported(path):
    """Dotted names that a Python file imports from the tests, the benchmarks or relative to itself."""
    for module, names in IMPORT.findall(path.read_text(encoding="utf-8")):
        yield from (f"{module}.{name.strip()}" for name in names.strip("( )").split(",") or [""])


def test_imports_are_found_in_strings_too():
    found = IMPORT.findall(
        'CODE = """\nfrom tests.core.test_dit import inputs\n"""\n    from tests import core  # why\n'
    )
    assert found == [("tests.core.test_dit", "inputs"), ("tests", "core  ")]


def test_no_test_module_is_imported():
    for path in (ROOT / "tests").rglob("*.py"):
        strangers = [name for name in imported(path) if not name.startswith(("tests.harness.", "benchmarks.", "dev."))]
        assert not strangers, path


def test_benchmarks_import_no_tests():
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert all(name.startswith("benchmarks.") for name in imported(path)), path


def test_sources_are_as_comfy_test_asks():
    """Only characters of Windows' code page (others are escaped); autocast is imported by its name."""
    for path in ROOT.rglob("*.py"):
        if ".dev" not in path.parts:
            text = path.read_text(encoding="utf-8")
            text.encode("cp1252")
            assert not re.search(r"torch\.(cuda\.|amp\.)*autocast\(", text), path
