"""Who may import whom, and that importing does nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ROOT / "mochi_core"
# Each layer may use the ones before it.
LAYERS = (
    ("config", "geometry", "latents", "schedule", "rope", "attention", "streaming", "ggml", "fp8", "migrate"),
    ("layers", "causal", "quantized", "video"),
    ("encoder", "decoder", "block"),
    ("dit", "vae"),
    ("cache",),
    ("sample", "checkpoints", "offload"),
    ("text_encoder", "lora", "latent_files"),
    ("pipeline",),
    ("__init__", "__main__"),
    ("train",),
)
# `AsymmDiT.load_lora` is a convenience, and imports when it is called.
UPWARDS = {("dit", "lora")}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "node_helpers", "nodes"}
PURE_IMPORT = """
import logging, sys, threading
sys.path.append({root!r})
for name in {blocked!r}:
    sys.modules[name] = None
handlers, threads = list(logging.getLogger().handlers), threading.active_count()
import torch, mochi_core
assert not torch.cuda.is_initialized()
assert logging.getLogger().handlers == handlers
assert threading.active_count() == threads
assert not any(name in sys.modules for name in ("transformers", "accelerate", "mochi_core.train"))
"""


def imports(path):
    """(dots, module) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


def test_importing_the_core_needs_no_host_and_has_no_side_effect():
    code = PURE_IMPORT.format(root=str(ROOT), blocked=sorted(HOST | {"diffusers"}))
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_core_never_names_host_or_peers():
    for path in CORE.rglob("*.py"):
        absolute = {module.split(".")[0] for dots, module in imports(path) if dots == 0}
        assert not absolute & (HOST | {"diffusers"}), path


def test_core_layers_only_look_down():
    for path in CORE.rglob("*.py"):
        inside = path.relative_to(CORE).with_suffix("").parts
        for dots, module in imports(path):
            own_package = len(inside) > 1 and dots == 1
            if dots and not own_package:
                target = module.split(".")[0]
                down = RANK[target] < RANK[inside[0]]
                assert down or (inside[0], target) in UPWARDS, f"{path} imports {module}"


def test_only_the_bridge_knows_both_worlds():
    for path in (ROOT / "nodes").rglob("*.py"):
        if "bridge" not in path.parts:
            core = {module.split(".")[-1] for dots, module in imports(path) if dots and "mochi_core" in module}
            assert not core & {"dit", "vae", "text_encoder", "pipeline"}, path
