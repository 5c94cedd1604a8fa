"""Large files, and the memory that a process needs for them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mochi_core import AsymmDiT, AsymmDiTConfig
from tests.harness.command_line import convert

ROOT = Path(__file__).parents[2]


def write_sparse(path, tensors):
    """Write all names, shapes and bytes of a model of any size, as zeros that take no disk space."""
    entries, position = {}, 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * 2
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)
    return path


MEMORY = """
import json, re, sys, threading, time
import torch
from pathlib import Path
from mochi_core.checkpoints import check_fit, empty_transformer, load_transformer, open_part
from mochi_core.checkpoints.convert import plan_conversion, write_conversion

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak_of(action):
    before, peak, done = anonymous(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.monotonic()
    result = action()
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    return result, max(peak, anonymous()) - before, seconds

def open_whole(path):
    checkpoint = open_part(path, "transformer")
    check_fit(dict(empty_transformer(checkpoint).named_parameters()), checkpoint)
    return checkpoint.tensors
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def in_a_process(code, *arguments):
    command = [sys.executable, "-c", MEMORY + code, *map(str, arguments)]
    # Without this, glibc keeps freed memory, in which later tensors would hide.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Few large tensors: the largest has 50 MB in bf16.
LARGE = AsymmDiTConfig(
    depth=2, hidden_size_x=1536, hidden_size_y=512, num_heads=12, text_width=256, mlp_size_x=8192, mlp_size_y=1024
)
LAYOUTS = {"canonical": (), "diffusers": ("--to", "diffusers")}
SLACK = 10e6


def write_large(folder, layout):
    """Write a bf16 file; returns the bytes of the model in float32, and of the largest tensor as stored."""
    dit = AsymmDiT(LARGE, dtype=torch.bfloat16).requires_grad_(False)
    dit.pos_frequencies.zero_()
    save_file(dit.state_dict(), folder / "canonical.safetensors")
    if LAYOUTS[layout]:
        convert(folder / "canonical.safetensors", folder / f"{layout}.safetensors", *LAYOUTS[layout])
    sizes = [parameter.nbytes for parameter in dit.parameters()]
    return folder / f"{layout}.safetensors", 4 * sum(p.numel() for p in dit.parameters()), max(sizes)
