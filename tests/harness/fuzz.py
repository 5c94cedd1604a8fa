"""Files of every kind that this project reads, broken at random: `python -m tests.harness.fuzz 10000`.

Each file comes from its own seed, is read the way a user would, and must either load or be refused with a one-line ValueError or
OSError, within limited time and memory. docs/reliability.md shows the final table.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import pickletools
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from safetensors.torch import save as save_bytes

from migrate.__main__ import migrate_file
from mochi_core import load_transformer, load_vae
from mochi_core.checkpoints import open_part
from mochi_core.checkpoints.convert import plan_conversion
from mochi_core.checkpoints.inspect import inspect, render
from mochi_core.io.latent_files import load_latents
from mochi_core.lora import read_lora
from mochi_core.shown import SENTENCE_LENGTH
from mochi_core.train.config import read_config
from tests.harness.bad_files import DIT, SMALL, with_header
from tests.harness.tiny_models import random_t5, random_vae

WORKFLOWS = sorted((Path(__file__).parents[1] / "data" / "old_workflows").glob("*.json"))
EVIL = "\x1b[31m\n\u202e\ud800\0"
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**400,
    0.5, -0.0, 1e308, float("inf"), float("nan"), True, False,
)  # fmt: skip
TEXTS = (
    "",
    "a",
    "blocks.0.",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "I64",
    "C64",
    "U32",
    EVIL,
    "n" * 501,
    "../a",
    "a.safetensors",
)
HANG_SECONDS = 120
PROGRESS = 1000
"""Number of files between progress lines."""
MEGABYTE = 2**20

Rng = random.Random


def save(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Write a safetensors file, even of tensors that share memory."""
    return save_bytes({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, metadata)


def some_json(rng: Rng, depth: int = 3) -> Any:
    """A value that does not belong where it will be put."""
    choice = rng.randrange(6 if depth else 4)
    if choice < 2:
        return rng.choice(NUMBERS)
    if choice == 2:
        return rng.choice(TEXTS)
    if choice == 3:
        return None
    inner = [some_json(rng, depth - 1) for _ in range(rng.randrange(5))]
    return inner if choice == 4 else {rng.choice(TEXTS): value for value in inner}


def mutated_json(rng: Rng, value: Any) -> Any:
    """`value` with one change inside: a part replaced, renamed, duplicated, moved, removed or wrapped."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return some_json(rng)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, other = rng.choice(keys), rng.choice(keys)
    new = dict(value) if isinstance(value, dict) else list(value)
    change = rng.randrange(9)
    if change < 4:
        new[key] = mutated_json(rng, value[key])
    elif change == 4:
        del new[key]
    elif change == 5:
        new[key], new[other] = value[other], value[key]
    elif change == 6:
        new[key] = [value[key]] * rng.choice((1, 2, 9))
    elif isinstance(new, dict):
        new[renamed(rng, key)] = new.pop(key) if change == 7 else value[key]
    else:
        new.insert(rng.randrange(len(new) + 1), value[key])
    return new


def renamed(rng: Rng, name: str) -> str:
    """Another name: with a large or odd layer number, of another part, very long, or unprintable."""
    numbers = [str(rng.choice(NUMBERS)), "00", "\u0663", "-1"]
    digits = [i for i, letter in enumerate(name) if letter.isdigit()]
    choice = rng.randrange(5)
    if choice == 0 and digits:
        place = rng.choice(digits)
        return name[:place] + rng.choice(numbers) + name[place + 1 :]
    prefixes = ("model.", "_orig_mod.", "encoder.", "decoder.", "transformer_blocks.", "model." * 90, EVIL)
    return [name + rng.choice(TEXTS), rng.choice(prefixes) + name, name[: len(name) // 2], name.upper(), name[::-1]][
        choice
    ]


def mutated_bytes(rng: Rng, content: bytes) -> bytes:
    """`content` with bits flipped, or pieces cut, duplicated, zeroed or replaced, mostly near the start."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        span = len(data) if rng.random() < 0.3 else min(len(data), 600)
        start = rng.randrange(span + 1)
        end = min(len(data), start + rng.choice((1, 2, 4, 8, 100)))
        change = rng.randrange(6)
        if change < 2 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif change == 2:
            del data[start:end]
        elif change == 3:
            data[start:start] = data[start:end] * rng.choice((1, 3, 50))
        elif change == 4:
            data[start:end] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * (end - start)
        else:
            data[start:end] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, len(data), rng.getrandbits(64))))
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


@cache
def safetensors_bases() -> list[bytes]:
    """Models of every kind, including quantised ones."""
    name = "blocks.0.attn.proj_x.weight"
    note = torch.tensor([*b'{"format": "float8_e4m3fn"}'], dtype=torch.uint8)
    layer = name.removesuffix("weight")
    fp8 = {**DIT, name: DIT[name].to(torch.float8_e4m3fn), f"{layer}weight_scale": torch.ones(())}
    t5 = {name: tensor[:8, :8] if tensor.ndim == 2 else tensor[:8] for name, tensor in random_t5().items()}
    models = [DIT, fp8 | {f"{layer}comfy_quant": note}, random_vae().state_dict(), t5, lora_tensors()]
    return [save(model, {"format": "pt"}) for model in models]


def lora_tensors() -> dict[str, torch.Tensor]:
    layers = {"blocks.0.attn.qkv_x": (24, 8), "blocks.0.mlp_x.w2": (8, 8)}
    factors = {f"{layer}.lora_B.weight": torch.ones(rows, 2) for layer, (rows, _) in layers.items()}
    factors |= {f"{layer}.lora_A.weight": torch.ones(2, columns) for layer, (_, columns) in layers.items()}
    return factors | {"blocks.0.attn.qkv_x.alpha": torch.ones(())}


def safetensors_bytes(rng: Rng, folder: Path) -> Path:
    return written(folder / "m.safetensors", mutated_bytes(rng, rng.choice(safetensors_bases())))


def safetensors_header(rng: Rng, folder: Path) -> Path:
    header, data = split_header(rng.choice(safetensors_bases()))
    for _ in range(rng.choice((1, 1, 2, 4))):
        header = mutated_json(rng, header)
    return written(folder / "m.safetensors", with_header(header, data))


def safetensors_tensors(rng: Rng, folder: Path) -> Path:
    """A complete file of tensors with wrong names, shapes or dtypes."""
    tensors = dict(load(rng.choice(safetensors_bases())))
    for _ in range(rng.choice((1, 2, 5))):
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        change = rng.randrange(6)
        if change == 0:
            tensors[renamed(rng, name).encode("utf-8", "replace").decode()] = tensor
        elif change == 1:
            dtypes = (
                torch.float16,
                torch.bfloat16,
                torch.float64,
                torch.int8,
                torch.uint8,
                torch.bool,
                torch.complex64,
            )
            tensors[name] = tensor.float().to(rng.choice(dtypes))
        elif change == 2:
            tensors[name] = tensor.float().reshape([1] * rng.randrange(5) + [*tensor.shape])
        elif change == 3:
            tensors[name] = torch.zeros([rng.choice((0, 1, 2, 8, 9)) for _ in range(rng.randrange(6))])
        elif change == 4:
            tensors[name] = torch.full_like(tensor.float(), rng.choice((float("nan"), float("inf"), 1e38)))
    return written(folder / "m.safetensors", save(tensors))


def safetensors_bomb(rng: Rng, folder: Path) -> Path:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text, count = json.dumps(entry).encode(), rng.choice((100, 5000, 15_000, 20_000, 60_000))
    layers = ("blocks.{}.x", "transformer_blocks.{}.x", "encoder.layers.{}.layers.0.weight", "t{}", "a.{}" + ".b" * 30)
    name = rng.choice(layers)
    marks = (
        "t5_yproj.weight",
        "time_embed.caption_proj.weight",
        "layers.0.weight",
        "decoder.block_in.resnets.0.conv1.conv.weight",
    )
    bombs: list[Callable[[], bytes]] = [
        lambda: with_header({rng.choice(marks): entry} | {name.format(i): entry for i in range(count)}, b""),
        lambda: with_header(b"{" + b",".join([b'"a":' + text] * count) + b"}", b""),
        lambda: with_header({"a": {**entry, "shape": [rng.choice((0, 1, 2**62))] * rng.choice((9, count))}}, b""),
        lambda: with_header({"n" * rng.choice((501, 10**6, 3 * 10**6)): entry}, b""),
        lambda: with_header(b'{"a":' + rng.choice((b"[", b'{"a":', b"[],", b"{},", b"1,", b'"",')) * 10**6 + b"}", b""),
        lambda: with_header(b"{" + b" " * rng.choice((10**6, 5 * 10**6, 50 * 10**6)) + b"}", b""),
        lambda: with_header({"__metadata__": {"_quantization_metadata": "[" * count}, "a": entry}, b""),
        lambda: with_header({"__metadata__": {f"k{i}": "v" * 50 for i in range(count)}, "a": entry}, b""),
        lambda: with_header({"a": {**entry, "shape": [10 ** rng.randrange(30), 0]}}, b""),
        lambda: with_header(json.dumps({"a": entry}).encode().ljust(rng.choice((0x3C20, 0x3C0A, 0x1003C))), b""),
    ]
    return written(folder / "m.safetensors", rng.choice(bombs)())


def gguf_text(text: str | bytes) -> bytes:
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def gguf_value(rng: Rng) -> bytes:
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    sizes = {kind: struct.calcsize(code) for kind, code in codes.items()}
    kind = rng.choice([*sizes, 8, 9, 9, 13])
    if kind == 8:
        return struct.pack("<I", kind) + gguf_text(rng.choice(TEXTS))
    if kind != 9:
        plausible = struct.pack(f"<{codes.get(kind, 'I')}", 32)  # an alignment
        return struct.pack("<I", kind) + rng.choice((plausible, rng.randbytes(sizes.get(kind, 4))))
    inner, count = rng.choice([*sizes, 8, 9]), rng.choice((0, 1, 5, 1000, 2**20, 2**40, 2**63))
    body = gguf_text("t") * min(count, 200_000) if inner == 8 else bytes(min(count, 10**6) * sizes.get(inner, 4))
    return struct.pack("<IIQ", kind, inner, count) + body


def gguf(rng: Rng, folder: Path) -> Path:
    """A header of random keys and tensor descriptions, most of which almost fit the data."""
    keys = [gguf_text(rng.choice(("general.alignment", *TEXTS))) + gguf_value(rng) for _ in range(rng.randrange(4))]
    tensors, offset = [], 0
    for name in rng.sample(sorted(DIT), rng.randrange(5)):
        shape = [
            rng.choice((1, 8, 8, 32, 256, rng.choice((0, 2**31, 2**63)))) for _ in range(rng.choice((1, 2, 2, 4, 9)))
        ]
        kind = rng.choice((0, 0, 1, 2, 8, 12, 14, 20, 30, 99))
        name = renamed(rng, name) if rng.random() < 0.3 else name
        tensors.append(gguf_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        offset += rng.choice((32, 256, 1024, 1, 2**40))
    counts = [rng.choice((len(part), len(part), len(part), 2**20, 2**63)) for part in (tensors, keys)]
    head = b"GGUF" + struct.pack("<IQQ", rng.choice((3, 3, 3, 2, 1)), *counts)
    content = head + b"".join(keys) + b"".join(tensors) + bytes(rng.choice((0, 2000, 20_000)))
    return written(folder / "m.gguf", mutated_bytes(rng, content) if rng.random() < 0.3 else content)


ODD_VALUES: tuple[Callable[[], Any], ...] = (
    lambda: torch.ones(2, 2), lambda: torch.ones(1).expand(10**12), lambda: torch.ones(3).to_sparse(), lambda: {"a": 1},
    lambda: torch.empty(2, device="meta"), lambda: [torch.ones(1)], lambda: torch.nn.Parameter(torch.ones(2)), lambda: EVIL,
    lambda: torch.ones(2).to(torch.float8_e4m3fn), lambda: torch.Size([2]), lambda: {1, 2}, lambda: bytearray(9),
    lambda: torch.ones(2, dtype=torch.complex64), lambda: torch.zeros(4, dtype=torch.bool), lambda: 10**400,
)  # fmt: skip


def torch_file(rng: Rng, folder: Path) -> Path:
    """torch.save's file of odd values, with its pickle's steps rearranged or its bytes corrupted."""
    content = dict(rng.sample(sorted(DIT.items()), 5)) | {
        renamed(rng, "blocks.0.x"): rng.choice(ODD_VALUES)() for _ in range(rng.randrange(3))
    }
    wrapped = {rng.choice(("state_dict", "module", "x")): content, "step": 3} if rng.random() < 0.4 else content
    file, is_zip = io.BytesIO(), rng.random() < 0.7
    torch.save(wrapped, file, _use_new_zipfile_serialization=is_zip)
    saved = file.getvalue()
    choice = rng.randrange(4)
    if choice == 0:
        saved = mutated_bytes(rng, saved)
    elif choice > 1 and is_zip:
        saved = rezipped(rng, saved)
    return written(folder / f"m{rng.choice(('.pt', '.ckpt', '.bin'))}", saved)


def rezipped(rng: Rng, saved: bytes) -> bytes:
    """The same archive with another pickle, possibly compressed, or with members added or removed."""
    result = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(result, "w", method) as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("data.pkl"):
                content = mutated_pickle(rng, content)
            elif rng.random() < 0.1:
                content = rng.choice((b"", content * 2, bytes(10**7)))
            if rng.random() > 0.05:
                new.writestr(member.filename, content)
    return result.getvalue()


def mutated_pickle(rng: Rng, content: bytes) -> bytes:
    """A pickle with steps duplicated, removed, moved or replaced, also by ones that demand much memory or time."""
    places = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    steps = [content[start:end] for start, end in pairwise(places)]
    number = b"\x8a\x08" + struct.pack("<q", rng.choice((0, 1, 9, 2**31, 2**62)))
    names = (b"torch FloatTensor", b"builtins bytearray", b"torch UntypedStorage", b"torch.storage UntypedStorage",
             b"_codecs encode", b"os system", b"torch._utils _rebuild_tensor_v2", b"torch Size", b"builtins set",
             b"torch._utils _rebuild_qtensor", b"torch._utils _rebuild_sparse_tensor", b"collections Counter")  # fmt: skip
    calls = [b"c" + name.replace(b" ", b"\n") + b"\n" + number + b"\x85R" for name in names]
    doubled = b"K\x01\x85q\xff" + b"h\xffh\xff\x86q\xff" * rng.choice((5, 60))
    extra = [
        *calls,
        number,
        doubled,
        b"(" * 100,
        b"]" * 1000,
        b"t",
        b"Q",
        b"R",
        b"b",
        b"s",
        b"u",
        b"a",
        b"e",
        b"\x81",
        b"h\x00",
    ]
    for _ in range(rng.choice((1, 1, 2, 6))):
        at, choice = rng.randrange(len(steps)), rng.randrange(5)
        if choice == 0:
            del steps[at]
        elif choice == 1:
            steps.insert(at, rng.choice(steps))
        elif choice == 2:
            steps[at] = rng.choice(extra)
        else:
            steps.insert(at, rng.choice(extra))
    return b"".join(steps)


def lora(rng: Rng, folder: Path) -> Path:
    tensors = lora_tensors()
    for _ in range(rng.choice((1, 2, 4))):
        name = rng.choice(sorted(tensors))
        ends = (
            "lora_A",
            "lora_down.weight",
            "diff",
            "diff_b",
            "dora_scale",
            "alpha",
            "hada_w1_a",
            "lora_B.default.weight",
        )
        new = rng.choice((renamed(rng, name), f"{name.rsplit('.lora', 1)[0]}.{rng.choice(ends)}"))
        shape = [rng.choice((0, 1, 2, 8, 24)) for _ in range(rng.randrange(5))]
        filled = torch.full(shape, rng.choice((1.0, 0.0, float("nan"), 1e38)))
        tensors[new.encode("utf-8", "replace").decode()] = rng.choice((tensors[name], filled))
    notes = json.dumps(mutated_json(rng, {"lora_alpha": 2, "alpha_pattern": {"attn": 3}, "qkv_proj_lora_alpha": 4}))
    if rng.random() < 0.3:
        written(folder / "adapter_config.json", notes.encode())
    name = rng.choice(("m.safetensors", "adapter_model.safetensors"))
    metadata = {rng.choice(("kwargs", "lora_adapter_metadata", "x")): rng.choice((notes, "[" * 5000, EVIL[:4]))}
    content = save(tensors, rng.choice((None, metadata)))
    return written(folder / name, mutated_bytes(rng, content) if rng.random() < 0.2 else content)


def index(rng: Rng, folder: Path) -> Path:
    path, weight_map = sharded(folder)
    text = json.dumps(mutated_json(rng, {"metadata": {"total_size": 1}, "weight_map": weight_map}))
    if rng.random() < 0.3:
        names = [f"a{i}" for i in range(rng.choice((10, 600, 20_000, 200_000)))]
        text = json.dumps({"weight_map": {name: rng.choice((name, "m-1.safetensors")) for name in names}})
    content = text.encode()
    return written(path, mutated_bytes(rng, content) if rng.random() < 0.2 else content)


def sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    names = sorted(DIT)
    shards = {"m-1.safetensors": names[::2], "m-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        written(folder / shard, save({name: DIT[name] for name in part}))
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    return written(folder / "m.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode()), weight_map


def diffusers_folder(rng: Rng, folder: Path) -> Path:
    """A pipeline folder with files broken, missing, added, or named as variants."""
    root = folder / "pipeline"
    for part in ("transformer", "vae"):
        (root / part).mkdir(parents=True)
        written(root / part / "config.json", rng.choice((b"{}", b"[" * 10**4, rng.randbytes(20))))
    sharded(root / "transformer")
    written(root / "vae" / "diffusion_pytorch_model.safetensors", safetensors_bases()[2])
    for path in sorted(root.rglob("*.*")):
        change = rng.randrange(8)
        if change == 0:
            path.write_bytes(mutated_bytes(rng, path.read_bytes()))
        elif change == 1:
            path.unlink()
        elif change == 2:
            shutil.copy(path, path.with_name(path.name.replace(".", rng.choice((".fp16.", ".bf16.", ".ema.")), 1)))
        elif change == 3:
            path.unlink()
            path.symlink_to(rng.choice((path, root, Path("/dev/null"), Path("gone"))))
    return rng.choice((root, root / "transformer", root / "vae"))


def latents(rng: Rng, folder: Path) -> Path:
    shape = [rng.choice((0, 1, 2, 4)), rng.choice((12, 12, 12, 4, 16)), *(rng.choice((0, 1, 3)) for _ in range(3))]
    tensor = torch.zeros(shape[rng.randrange(3) :]).to(
        rng.choice((torch.float32, torch.float16, torch.int64, torch.bool))
    )
    content = save(
        {
            rng.choice(("latent_tensor", "x", "samples")): tensor,
            rng.choice(("latent_format_version_0", "y")): torch.zeros(0),
        }
    )
    return written(folder / "m.latent", mutated_bytes(rng, content) if rng.random() < 0.4 else content)


YAML = """transformer: a
dataset: b
output: c
steps: 10
learning_rate: 1e-4
lora: {qkv_proj_lora_rank: 4, qkv_proj_lora_alpha: 4.0}
sample:
  prompts: [a kite]
  vae: v
  t5: t
  size: 848x480
"""
YAML_PIECES = (
    "&a ", "*a", "&a [*a]", "<<: *a", "!!int ", "!!float x", "!!timestamp 2000-99-99", "!!binary x", "!!set {a}",
    "!!python/name:os.system",
    "9" * 400, "9" * 5000, "0x" + "f" * 4000, "1:1:1", ".nan", ".inf", "null", "true", "2000-01-01", "[", "{", "]", "}",
    "? ", ": ", "- ",
    "|\n", ">\n", "\t", "\n\n", "'", '"', '"\\ud800\\e[31m"', "%YAML 9", "---\n", "#", "\x1b", "[" * 3000, "a: " * 500,
    "[" + ", ".join(["&l0 [x, x]", *(f"&l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 60))]) + "]",
)  # fmt: skip


def yaml_file(rng: Rng, folder: Path) -> Path:
    text = YAML
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = [i + 1 for i, letter in enumerate(text) if letter in " \n:,[{"]
        at = rng.choice(places)
        end = rng.choice((at, at, text.find("\n", at), text.find(" ", at)))
        text = text[:at] + rng.choice(YAML_PIECES) + text[max(at, end) :]
    content = text.encode("utf-8", "replace")
    return written(folder / "c.yaml", mutated_bytes(rng, content) if rng.random() < 0.2 else content)


def workflow(rng: Rng, folder: Path) -> Path:
    content = json.loads(rng.choice(WORKFLOWS).read_text(encoding="utf-8"))
    for _ in range(rng.choice((1, 2, 5, 20))):
        content = mutated_json(rng, content)
    text = json.dumps(content).encode()
    if rng.random() < 0.1:
        text = rng.choice((b"[" * 10**5, b'{"a":' * 10**5, b"[" + b"[]," * 10**5 + b"1]", b'"\\ud800"', b"9" * 5000))
    return written(folder / "w.json", mutated_bytes(rng, text) if rng.random() < 0.2 else text)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def find_parts(path: Path) -> None:
    for part in ("t5", "vae", "transformer"):
        open_part(path, part)


# The ways in which a user would have a weights file read; one is chosen for each file.
WEIGHTS = (
    lambda path: load_transformer(path, torch.float32),
    load_vae,
    lambda path: render(inspect(path)),
    lambda path: plan_conversion([path], "canonical", "bf16"),
    find_parts,
)


def read_workflow(path: Path) -> None:
    for stock in (False, True):
        for note in migrate_file(path, stock=stock).notes:
            note.encode("utf-8", "replace")


Maker = Callable[[Rng, Path], Path]
KINDS: dict[str, tuple[Maker, tuple[Callable[[Path], Any], ...]]] = {
    "safetensors, bytes": (safetensors_bytes, WEIGHTS),
    "safetensors, header": (safetensors_header, WEIGHTS),
    "safetensors, tensors": (safetensors_tensors, WEIGHTS),
    "safetensors, bombs": (safetensors_bomb, WEIGHTS),
    "GGUF": (gguf, WEIGHTS),
    "torch.save": (torch_file, WEIGHTS),
    "LoRA": (lora, (lambda path: read_lora(path, SMALL).report(),)),
    "index of shards": (index, WEIGHTS),
    "diffusers folder": (diffusers_folder, WEIGHTS),
    "latents": (latents, (load_latents,)),
    "YAML": (yaml_file, (read_config,)),
    "workflow": (workflow, (read_workflow,)),
}
ADVICE = ("weights_only=False", "add_safe_globals", "set_int_max_str_digits")


def check_fit(error: BaseException) -> None:
    """AssertionError unless an error is one printable line, and logging it prints nothing else."""
    text = str(error)
    assert len(text) <= SENTENCE_LENGTH + 300, "long"
    assert text.isprintable(), "not printable"
    logged = "".join(line for line in traceback.format_exception(error) if not line.startswith("  File"))
    assert logged.replace("\n", "").isprintable(), "its log is not printable"
    assert not any(advice in logged for advice in ADVICE), "passes advice on"


@dataclass
class Tally:
    """The outcomes for the files of one kind."""

    loaded: int = 0
    refused: int = 0
    seconds: float = 0.0
    """The most CPU seconds for one file."""
    megabytes: float = 0.0
    """The largest growth of the process's memory for one file."""
    faults: list[str] = field(default_factory=list)


def try_one(kind: str, seed: str, tally: Tally, limits: tuple[float, float]) -> None:
    rng, (make, readers) = Rng(f"{kind}/{seed}"), KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path, read = make(rng, Path(folder)), rng.choice(readers)
        before, start = reset_peak(), time.process_time()
        watch_for_hang(HANG_SECONDS)
        try:
            read(path)
            tally.loaded += 1
        except (ValueError, OSError) as error:
            tally.refused += 1
            try:
                check_fit(error)
            except AssertionError as fault:
                tally.faults.append(f"{kind}/{seed}: {fault}: {ascii(str(error))[:300]}")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            tally.faults.append(
                f"{kind}/{seed}: {type(error).__name__} at {last.filename}:{last.lineno}: {ascii(str(error))[:300]}"
            )
        finally:
            watch_for_hang(0)
        seconds, megabytes = time.process_time() - start, (peak() - before) / MEGABYTE
        tally.seconds, tally.megabytes = max(tally.seconds, seconds), max(tally.megabytes, megabytes)
        if seconds > limits[0] or megabytes > limits[1]:
            tally.faults.append(f"{kind}/{seed}: {seconds:.1f} s, {megabytes:.0f} MB")


def watch_for_hang(seconds: float) -> None:
    """End the process with a traceback after `seconds` of CPU time (wall time on Windows); 0 is never.

    A process that is stopped or starved by others is not hanging.
    """
    if sys.platform != "win32":
        faulthandler.register(signal.SIGPROF, chain=True)  # then the signal's default action: end the process
        signal.setitimer(signal.ITIMER_PROF, seconds)
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def reset_peak() -> int:
    """Reset the peak memory, where the system can; returns the bytes in use."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return peak()


def peak() -> int:
    """This process's peak memory in bytes since `reset_peak`; 0 if the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def run(count: int, seed: int, limits: tuple[float, float]) -> dict[str, Tally]:
    """Try `count` files, the same number of each kind."""
    tallies = {kind: Tally() for kind in KINDS}
    kinds = list(KINDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:  # imports and caching on first use count for no kind
            try_one(kind, "first", Tally(), limits)
        for i in range(count):
            kind = kinds[i % len(kinds)]
            try_one(kind, f"{seed}-{i}", tallies[kind], limits)
            if i % PROGRESS == PROGRESS - 1:
                print(f"{i + 1:,} of {count:,} files", file=sys.stderr, flush=True)
    return tallies


def table(tallies: dict[str, Tally]) -> Iterator[str]:
    yield "| kind | files | load | refused | longest, s | most memory, MB |"
    yield "|---|---|---|---|---|---|"
    for kind, tally in tallies.items():
        counts = f"{tally.loaded + tally.refused:,} | {tally.loaded:,} | {tally.refused:,}"
        yield f"| {kind} | {counts} | {tally.seconds:.2f} | {tally.megabytes:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--megabytes", type=float, default=500.0)
    options = parser.parse_args()
    tallies = run(options.count, options.seed, (options.seconds, options.megabytes))
    print("\n".join(table(tallies)))
    faults = [fault for tally in tallies.values() for fault in tally.faults]
    print(f"\n{len(faults)} faults", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
