"""`python -m migrate old.json`: convert a workflow made for other Mochi nodes to ours."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from secrets import token_hex
from typing import Any

from .account import add_account
from .editor import is_workflow
from .migration import Migration, migrate
from .shown import sentence, without_advice


def main(arguments: list[str] | None = None) -> int:
    """Convert one file; returns 0, 2 with one sentence on stderr if the user has to change something, or 130 on Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        output = options.output or options.workflow.with_stem(f"{options.workflow.stem}-mochi1")
        if output.exists() and not options.force:
            raise ValueError(f"{output} exists already; choose another name with -o, or overwrite it with --force.")
        migration = migrate_file(options.workflow, stock=options.stock)
        notes = [*map(sentence, migration.notes)]
        if is_workflow(migration.workflow):  # the API form has no notes
            add_account(migration.workflow, notes)
        write_workflow(migration.workflow, output)
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for note in notes:
        print(note, file=sys.stderr)
    print(output)
    return 0


def migrate_file(path: Path, *, stock: bool) -> Migration:
    """`migrate` for a JSON file.

    Raises:
        ValueError: the file is not JSON, or not a workflow with nodes to replace; the message names the file.
        FileNotFoundError: there is no such file.
    """
    try:
        workflow = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a JSON file ({without_advice(error)}); save the workflow in the editor."
        ) from None
    try:
        return migrate(workflow, stock=stock)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_workflow(workflow: dict[str, Any], path: Path) -> None:
    """Write a JSON file atomically; through a symbolic link, the file that it points to is replaced."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a file that can be replaced; choose another name with -o.")
    text = json.dumps(workflow, indent=2, ensure_ascii=False) + "\n"
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{token_hex(4)}.part")
    try:
        # UTF-8 cannot encode a lone surrogate, but JSON can, in the form that this writes: \ud800.
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m migrate", description="Put Mochi Nodes into an old workflow.")
    add = parser.add_argument
    add("workflow", type=Path, help=".json file, saved in the editor or exported for the API")
    add("-o", "--output", type=Path, help="(default: the same name with -mochi1 appended)")
    add("--stock", action="store_true", help="also replace ComfyUI's own nodes in a graph for its built-in Mochi")
    add("--force", action="store_true", help="overwrite the output")
    return parser


if __name__ == "__main__":
    sys.exit(main())
