"""What the pack adds to ComfyUI's start-up time: `COMFYUI_PATH=... python -m benchmarks.startup`.

Starts ComfyUI with the pack and with an empty pack by turns, each in a fresh process, and writes results/startup_cpu.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.measure import environment, write_report

ROOT, PACK = Path(__file__).resolve().parents[1], "mochi-nodes"
ROUNDS = 7
EMPTY_PACK = """from comfy_api.latest import ComfyExtension


class Nothing(ComfyExtension):
    async def get_node_list(self):
        return []


async def comfy_entrypoint():
    return Nothing()
"""


def main() -> None:
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with tempfile.TemporaryDirectory() as folder:
        bases = {"an empty pack": Path(folder) / "empty", PACK: Path(folder) / "ours"}
        for base in bases.values():
            (base / "custom_nodes").mkdir(parents=True)
        (bases["an empty pack"] / "custom_nodes" / "empty").mkdir()
        (bases["an empty pack"] / "custom_nodes" / "empty" / "__init__.py").write_text(EMPTY_PACK, encoding="utf-8")
        (bases[PACK] / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in bases}
        for _ in range(ROUNDS):
            for name, base in bases.items():
                runs[name].append(start(comfyui, base))
    report(runs)


def start(comfyui: Path, base: Path) -> tuple[float, float]:
    """Seconds of the whole start, and of the pack's import as logged by ComfyUI."""
    command = [
        sys.executable, str(comfyui / "main.py"), "--cpu", "--quick-test-for-ci", "--base-directory", str(base),
        "--database-url", "sqlite:///:memory:",
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=True)
    whole = time.perf_counter() - began
    (imported,) = re.findall(r"([\d.]+) seconds: .*custom_nodes/(?:empty|" + PACK + ")", done.stdout + done.stderr)
    return whole, float(imported)


def report(runs: dict[str, list[tuple[float, float]]]) -> None:
    rows = [
        f"| {name} | {median(whole for whole, _ in times):.2f} | {min(whole for whole, _ in times):.2f} | "
        f"{median(imported for _, imported in times):.2f} |"
        for name, times in runs.items()
    ]
    head = "| installed | start, median s | fastest s | import of the pack, median s |"
    how = f"`main.py --cpu --quick-test-for-ci`, in turn, {ROUNDS} processes each. The last column is ComfyUI's own."
    lines = ["# ComfyUI's start with the pack", "", environment(), "", how, "", head, "|---|---|---|---|", *rows, ""]
    write_report("startup", "\n".join(lines))


if __name__ == "__main__":
    main()
