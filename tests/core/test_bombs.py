"""Small files that demand all of a machine's time or memory: one sentence each, before anything is built or read."""

import io
import json
import pickle
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from mochi_core import load_transformer, load_vae
from mochi_core.checkpoints import from_state_dict, limits, open_checkpoint
from mochi_core.checkpoints.names.bitsandbytes import translate_bitsandbytes
from mochi_core.quantization.block_floats import NF4_VALUES
from tests.harness.bad_files import with_header
from tests.harness.tiny_models import random_vae

EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
SECONDS = 5
"""Maximum CPU seconds for one file; without limits, most of these files would take minutes, or never finish."""


def named(count, name="t{}"):
    """A header with `count` tensors of one byte, and their bytes."""
    entries = {name.format(i): {"dtype": "U8", "shape": [1, 1], "data_offsets": [i, i + 1]} for i in range(count)}
    return with_header(entries, bytes(count))


def repeated(entry, count):
    return with_header(b"{" + b",".join([entry] * count) + b"}", b"")


def gguf_text(text):
    return struct.pack("<Q", len(text)) + text


def gguf(num_tensors, num_keys, body):
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + body


def gguf_list(count, text):
    return gguf(0, 1, gguf_text(b"k") + struct.pack("<IIQ", 9, 8, count) + gguf_text(text) * min(count, 2_000_000))


def zipped(pickled, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in {"data.pkl": pickled, "version": b"3", "byteorder": b"little"}.items():
            archive.writestr(f"x/{name}", content)
    return file.getvalue()


def unzipped(pickled):
    """A file as written by torch.save before version 1.6."""
    before = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in before) + pickled + pickle.dumps([], 2)


def called(name, argument=b"\x8a\x05\x00\x00\x00\x80\x00"):
    """A pickle of {"a": name(2**31)}."""
    return b"\x80\x02}X\x01\x00\x00\x00ac" + name.replace(b" ", b"\n") + b"\n" + argument + b"\x85Rs."


# A tuple of twice the same tuple of two, and so on: its hash takes 2**60 steps.
DOUBLED = b"\x80\x02K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00K\x01s."
STORAGE = (
    b"\x80\x02}X\x01\x00\x00\x00a(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    b"\x8a\x05\x00\x00\x00\x80\x00tQs."
)
BOMBS = {
    "tensors.safetensors": lambda: named(limits.MAX_TENSORS + 1),
    "name.safetensors": lambda: with_header({"a" * 600: EMPTY}, b""),
    "axes.safetensors": lambda: with_header({"a": {**EMPTY, "shape": [1] * 40_000}}, b""),
    "twice.safetensors": lambda: repeated(b'"a":' + json.dumps(EMPTY).encode(), 4000),
    "lists.safetensors": lambda: with_header(b'{"a":[' + b"[]," * 1_300_000 + b"[]]}", b""),
    "numbers.safetensors": lambda: with_header(b'{"a":[' + b"1," * 30_000_000 + b"1]}", b""),
    "header.safetensors": lambda: with_header(b"{" + b" " * 90_000_000, b""),
    "blocks.safetensors": lambda: named(10_000, "encoder.layers.{}.layers.0.weight"),
    "resnets.safetensors": lambda: named(10_000, "decoder.block_in.resnets.{}.conv1.conv.weight"),
    "keys.gguf": lambda: gguf(0, 5_000_000, bytes(6_000_000)),
    "texts.gguf": lambda: gguf_list(3_000_000, b""),
    "beyond.gguf": lambda: gguf(0, 1, gguf_text(b"k") + struct.pack("<IIQ", 9, 8, 9) + bytes(64) + b"\xff" * 8),
    "name.gguf": lambda: gguf(1, 0, gguf_text(b"a" * 10_000_000)),
    "deflated.pt": lambda: zipped(b"\x80\x02]" + b"K\x01" * 5_000_000, zipfile.ZIP_DEFLATED),
    "end.pt": lambda: zipped(DOUBLED) + b"\0",
    "steps.pt": lambda: zipped(b"\x80\x02](" + b"K\x01" * 1_000_000 + b"e."),
    "names.index.json": lambda: json.dumps({"weight_map": {f"a{i}": "b" for i in range(300_000)}}).encode(),
    "many.index.json": lambda: json.dumps({"weight_map": {f"a{i}": "b" for i in range(17_000)}}).encode(),
    "shards.index.json": lambda: json.dumps({"weight_map": {f"a{i}": f"b{i}" for i in range(501)}}).encode(),
    "shard.index.json": lambda: json.dumps({"weight_map": {"a": "b" * 10_000}}).encode(),
}
for kind, save in {"zip": zipped, "old": unzipped}.items():
    BOMBS |= {
        f"hash-{kind}.pt": lambda save=save: save(DOUBLED),
        f"bytearray-{kind}.pt": lambda save=save: save(called(b"builtins bytearray")),
        f"tensor-{kind}.pt": lambda save=save: save(called(b"torch FloatTensor")),
        f"untyped-{kind}.pt": lambda save=save: save(called(b"torch.storage UntypedStorage")),
        f"storage-{kind}.pt": lambda save=save: save(STORAGE),
        f"codec-{kind}.pt": lambda save=save: save(called(b"_codecs encode")),
    }


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bombs(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BOMBS[name]())
    before = time.process_time()
    with pytest.raises(ValueError, match=rf"^{name} ") as refusal:
        load_vae(path)
    assert len(str(refusal.value)) < 1000
    assert time.process_time() - before < SECONDS


def bytes_of(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_many_states_of_4_bit_weights(tmp_path):
    """Time is linear in their number: all tensor names are scanned once, not once for each state."""
    states = {f"a{i}.weight.quant_state.bitsandbytes__nf4": torch.zeros(1) for i in range(limits.MAX_TENSORS)}
    save_file(states, tmp_path / "states.safetensors")
    before = time.process_time()
    with pytest.raises(ValueError, match=r"^states.safetensors "):
        load_transformer(tmp_path / "states.safetensors")
    assert time.process_time() - before < SECONDS


@pytest.mark.parametrize("changes", ['"nested_offset": 1' + "0" * 400, '"nested_blocksize": 1' + "0" * 12])
def test_states_of_4_bit_weights_with_large_numbers(changes):
    """An offset that is not a float is refused; claiming more scales than there are costs nothing."""
    state = f'{{"quant_type": "nf4", "blocksize": 64, "shape": [1, 64], "nested_blocksize": 64, {changes}}}'
    parts = {
        "": torch.zeros(32, dtype=torch.uint8),
        ".absmax": torch.zeros(1, dtype=torch.uint8),
        ".quant_map": torch.tensor(NF4_VALUES),
        ".nested_absmax": torch.ones(1),
        ".nested_quant_map": torch.ones(256),
        ".quant_state.bitsandbytes__nf4": bytes_of(state),
    }
    found = translate_bitsandbytes(from_state_dict({f"a.weight{part}": value for part, value in parts.items()}))
    assert ("a.comfy_quant" in found) == ("offset" in changes)
    assert torch.equal(found["a.weight"].read().flatten().unique(), torch.tensor([0.0 if "offset" in changes else -1]))


def test_a_layer_with_a_large_number(tmp_path):
    """Counts come from the layers present, not from their numbers."""
    weights = random_vae().state_dict() | {"encoder.layers.1000000000000.layers.0.weight": torch.zeros(4, 4, 3, 3, 3)}
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"has encoder.layers.1000000000000, but not the layers before it"):
        load_vae(tmp_path / "vae.safetensors")


CANONICAL = {"t5_yproj.weight": (8, 8), "x_embedder.proj.weight": (8, 12, 2, 2), "blocks.0.mlp_x.w2.weight": (8, 8)}
DIFFUSERS = {"time_embed.caption_proj.weight": (8, 8)}


@pytest.mark.parametrize(("name", "shapes"), [("blocks.{}.x", CANONICAL), ("transformer_blocks.{}.x", DIFFUSERS)])
def test_more_blocks_than_any_model_has(tmp_path, name, shapes):
    weights = {name.format(i): torch.zeros(1) for i in range(limits.MAX_BLOCKS + 1)}
    save_file(weights | {key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "deep.safetensors")
    with pytest.raises(ValueError, match=r"has 513 blocks; at most 512 are allowed"):
        load_transformer(tmp_path / "deep.safetensors")


def test_metadata_may_be_large(tmp_path):
    """Trainers and ComfyUI store tags, pictures and workflows there."""
    note = {"ss_tag_frequency": '{"a kite, red": 3}, ' * 90_000, "preview": "/9j/" * 1_000_000}
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors", note)
    assert open_checkpoint(tmp_path / "lora.safetensors").metadata == note


FLOATS = torch.arange(6.0)
PLAIN = {
    "tensor": FLOATS,
    "parameter": torch.nn.Parameter(FLOATS),
    "half of a storage": FLOATS[::2],
    "float8": FLOATS.to(torch.float8_e4m3fn),
    "bfloat16": FLOATS.bfloat16(),
}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": x, "step": 3, "rng": torch.get_rng_state()}])
@pytest.mark.parametrize("zip_archive", [True, False])
def test_plain_torch_files_load(tmp_path, wrap, zip_archive):
    tensors = PLAIN if zip_archive else {key: value for key, value in PLAIN.items() if key != "float8"}
    torch.save(wrap(tensors), tmp_path / "plain.pt", _use_new_zipfile_serialization=zip_archive)
    found = open_checkpoint(tmp_path / "plain.pt").tensors
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(found[key].read().float(), tensor.float())


ODD = {
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "float4": lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "text": lambda: "a text",
}


@pytest.mark.parametrize("kind", sorted(ODD))
def test_torch_files_of_odd_tensors(tmp_path, kind):
    if kind == "float4" and not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this PyTorch has no such dtype")
    torch.save({"a": ODD[kind]()}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"^odd.pt (is not a file of|holds something other than named) plain tensors"):
        open_checkpoint(tmp_path / "odd.pt")
