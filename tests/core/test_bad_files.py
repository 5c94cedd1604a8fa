"""Whatever is wrong with a file, there is one error that names it, and nothing stays open."""

import gc
import json
import os
import pickle
import re
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from mochi_core import load_text_encoder, load_transformer, load_vae
from mochi_core.checkpoints import (
    Checkpoint,
    from_state_dict,
    is_finite,
    open_checkpoint,
    select_part,
    to_diffusers,
    transformer_rules,
)
from tests.harness import trained
from tests.harness.bad_files import BAD, DIT, HEADER, HEADER_END, NAME, OTHERS, SMALL, VALID, with_header
from tests.harness.tiny_models import random_t5, random_vae

LOADERS_BY_PART = {
    "transformer": (load_transformer, lambda: DIT, NAME),
    "vae": (load_vae, lambda: random_vae().state_dict(), "decoder.output_proj.weight"),
    "t5": (partial(load_text_encoder, tokenizer=trained.TOKENIZER), random_t5, "encoder.final_layer_norm.weight"),
}
CASES = settings(max_examples=1500, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("case", BAD)
def test_bad_bytes(tmp_path, case):
    content, phrase = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^bad.safetensors .*({phrase})"):
        load_transformer(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(tmp_path, value, dtype):
    weights = {**DIT, NAME: torch.tensor([0.0] * 7 + [value], dtype=dtype)}
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=rf"nan.safetensors has NaN or infinite values in {NAME}"):
        load_transformer(tmp_path / "nan.safetensors", dtype)


def test_weights_too_large_for_the_dtype(tmp_path):
    save_file({**DIT, NAME: torch.full((8,), 1e6)}, tmp_path / "large.safetensors")
    load_transformer(tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match=rf"in {NAME}, or values too large for this dtype; .* use another dtype"):
        load_transformer(tmp_path / "large.safetensors", torch.float16)


NO_FLOATS = {
    torch.bool: "does not fit the model: 1 not floating-point ({name} is bool)",
    torch.int64: "does not fit the model: 1 not floating-point ({name} is int64)",
    torch.complex64: "has {name} stored as C64, which cannot be read",
}
if hasattr(torch, "float8_e8m0fnu"):  # since PyTorch 2.7
    NO_FLOATS[torch.float8_e8m0fnu] = "does not fit the model: 1 not floating-point ({name} is float8_e8m0fnu)"


@pytest.mark.parametrize(
    ("part", "dtype"), [*(("transformer", dtype) for dtype in NO_FLOATS), ("vae", torch.int64), ("t5", torch.int64)]
)
def test_weights_that_are_no_floating_point_numbers(tmp_path, part, dtype):
    load, weights, name = LOADERS_BY_PART[part]
    tensors = weights()
    save_file({**tensors, name: torch.ones(tensors[name].shape).to(dtype)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="^odd.safetensors " + re.escape(NO_FLOATS[dtype].format(name=name))):
        load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_finite_fp8(dtype):
    for bits in range(256):
        pattern = torch.tensor([0, bits, 0x80], dtype=torch.uint8).view(dtype)
        assert is_finite(pattern) == pattern.float().isfinite().all(), bits


def loaded_or_refused(path: Path, content: bytes):
    """A load confirmed by safetensors' own reader, or an error that names the file."""
    path.write_bytes(content)
    try:
        loaded = load_transformer(path, torch.float32)
    except ValueError as error:
        assert path.name in str(error)
        return None
    expected = load(content)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    return loaded


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.safetensors"


def test_the_unchanged_file_loads(scratch):
    assert loaded_or_refused(scratch, VALID) is not None


@pytest.mark.slow
@CASES
@given(length=st.integers(0, len(VALID) - 1))
def test_truncated_anywhere(scratch, length):
    assert loaded_or_refused(scratch, VALID[:length]) is None


# Most flips are where they do harm: in the header.
POSITIONS = st.one_of(st.integers(0, HEADER_END), st.integers(0, HEADER_END), st.integers(0, len(VALID) - 1))


@pytest.mark.slow
@CASES
@given(flips=st.lists(st.tuples(POSITIONS, st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits(scratch, flips):
    content = bytearray(VALID)
    for position, bit in flips:
        content[position] ^= 1 << bit
    loaded_or_refused(scratch, bytes(content))


@pytest.mark.slow
@CASES
@given(start=st.integers(0, HEADER_END + 8), length=st.integers(0, 40), new=st.binary(max_size=40))
def test_replaced_bytes(scratch, start, length, new):
    loaded_or_refused(scratch, VALID[:start] + new + VALID[start + length :])


NOTE = "blocks.0.attn.proj_x.comfy_quant"
QUANTIZED = {
    **DIT,
    "blocks.0.attn.proj_x.weight": DIT["blocks.0.attn.proj_x.weight"].to(torch.float8_e4m3fn),
    "blocks.0.attn.proj_x.weight_scale": torch.ones(()),
}
NOTES = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"[" * 5000, b'{"format": [1]}', b'{"format": "float8_e4m3fn", "convrot": {}}', b"null", b"3"]),
)


@settings(CASES, max_examples=300)
@given(note=NOTES, shape=st.sampled_from([(), (1,), (8,), (1, 8), (3,), (0,)]), in_metadata=st.booleans())
def test_notes_about_quantised_layers(scratch, note, shape, in_metadata):
    tensors = {**QUANTIZED, "blocks.0.attn.proj_x.weight_scale": torch.ones(shape)}
    metadata = {"_quantization_metadata": note.decode("utf-8", "replace")} if in_metadata else None
    if not in_metadata and note:
        tensors[NOTE] = torch.frombuffer(bytearray(note), dtype=torch.uint8)
    scratch.write_bytes(save(tensors, metadata))
    try:
        load_transformer(scratch, torch.float32)
    except ValueError as error:
        assert scratch.name in str(error)


NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from([2**31, 2**63, 2**64, 10**30, 1.5, True]))
JUNK = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=6,
)
ENTRY_EDITS = st.one_of(
    st.tuples(st.just("shape"), st.one_of(JUNK, st.lists(NUMBERS, max_size=5))),
    st.tuples(st.just("data_offsets"), st.one_of(JUNK, st.lists(NUMBERS, min_size=2, max_size=2))),
    st.tuples(st.just("dtype"), st.one_of(JUNK, st.sampled_from(["F16", "BF16", "I32", "F64", "F8_E4M3", "C64"]))),
    st.tuples(st.sampled_from(["swap", "drop", "rename", "junk", "reshape"]), JUNK),
)
NAMES = st.sampled_from(sorted(HEADER))


@pytest.mark.slow
@CASES
@given(edits=st.lists(st.tuples(NAMES, NAMES, ENTRY_EDITS), min_size=1, max_size=3))
def test_edited_headers(scratch, edits):
    header = {name: dict(entry) for name, entry in HEADER.items()}
    for name, other, (key, value) in edits:
        entry = header.get(name)
        if key == "swap":
            header[name], header[other] = header.get(other), entry
        elif key == "drop":
            header.pop(name, None)
        elif key == "rename":
            header[str(value)] = header.pop(name, None)
        elif key == "junk" or not isinstance(entry, dict):
            header[name] = value
        elif key == "reshape":
            header[name] = {**entry, "shape": [1, *entry.get("shape", [])][::-1]}
        else:
            header[name] = {**entry, key: value}
    loaded_or_refused(scratch, with_header(header))


def test_nothing_stays_open(scratch):
    def held():
        gc.collect()
        maps = Path("/proc/self/maps")
        return len(os.listdir("/proc/self/fd")), maps.read_text().count(scratch.name)  # noqa: PTH208

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    before = held()
    for content, _ in BAD.values():
        loaded_or_refused(scratch, content)
    nan = save({**DIT, NAME: torch.full((8,), torch.nan)})
    assert loaded_or_refused(scratch, nan) is None
    assert held() == before


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trap"),)


@pytest.mark.parametrize("save_trap", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, save_trap):
    monkeypatch.chdir(tmp_path)
    save_trap({"a": Trap()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt is not a file of plain tensors"):
        load_transformer(tmp_path / "evil.pt")
    assert not (tmp_path / "trap").exists()


EXPANDED = {"a": torch.ones(1).expand(10**12)}


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"PK\x03\x04", {"a": 1}, {1: torch.ones(1)}, torch.ones(2), [1], EXPANDED]
)
def test_torch_files_of_something_else(tmp_path, content):
    path = tmp_path / "odd.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"odd.pt (is not|holds something)"):
        open_checkpoint(path)


def test_a_zip_whose_members_would_start_before_the_file(tmp_path):
    """The system refuses to seek there (EINVAL), which is the file's fault, not the disk's."""
    path = tmp_path / "odd.pt"
    torch.save({"a": torch.ones(3)}, path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, content.rindex(b"PK\x06\x06") + 48, 2**20)  # offset of the central directory
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"odd.pt is not a file of plain tensors \(its list of members points to before"
    ):
        open_checkpoint(path)


@settings(CASES, max_examples=200)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=4))
def test_torch_files_with_flipped_bits(scratch, flips):
    path = scratch.with_name("fuzzed.pt")
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    content = bytearray(path.read_bytes())
    for position, bit in flips:
        content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        read = [tensor.read() for tensor in open_checkpoint(path).tensors.values()]
    except ValueError as error:
        assert path.name in str(error)
    else:
        assert sum(tensor.numel() for tensor in read) <= 7


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs the users of Unix")
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.gguf", "x.safetensors.index.json"])
def test_a_file_that_may_not_be_read(tmp_path, name):
    (tmp_path / name).write_bytes(VALID)
    (tmp_path / name).chmod(0)
    before = os.geteuid()
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)  # the last may be /tmp, which others write to
    try:
        if before == 0:  # not restricted by permissions
            os.seteuid(65534)
        with pytest.raises(
            PermissionError, match=rf"^{name} cannot be read \(Permission denied\); check its permissions"
        ):
            open_checkpoint(tmp_path / name)
    finally:
        os.seteuid(before)


def test_a_file_that_changes_while_it_loads(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    tensors = open_checkpoint(path).tensors
    assert torch.equal(tensors[NAME].read(), DIT[NAME])
    path.write_bytes(VALID[:-100])
    with pytest.raises(ValueError, match=r"x.safetensors changed while it was being loaded"):
        tensors[NAME].read()


def as_diffusers(weights):
    return {
        name: t.read() for name, t in to_diffusers(from_state_dict(weights), transformer_rules(SMALL.depth)).items()
    }


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (lambda t: t.pop("transformer_blocks.0.attn1.to_k.weight"), "lacks transformer_blocks.0.attn1.to_k.weight"),
        (lambda t: t.update({"transformer_blocks.0.attn1.to_k.weight": torch.zeros(9, 8)}), "differ in shape"),
        (lambda t: t.update({"surprise": torch.zeros(1)}), "1 tensors do not belong to it, e.g. surprise"),
        (lambda t: t.update({f"_orig_mod.{NAME}": torch.zeros(1), NAME: torch.zeros(1)}), "holds tensors twice"),
    ],
)
def test_broken_diffusers_files(tmp_path, change, phrase):
    tensors = as_diffusers(DIT)
    change(tensors)
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=rf"^odd.safetensors does not fit Mochi: .*{phrase}"):
        load_transformer(tmp_path / "odd.safetensors")


OWN = {
    "a Mochi transformer": lambda: DIT,
    "a T5 text encoder": random_t5,
    "a Mochi autoencoder": lambda: random_vae().state_dict(),
}
PHRASES = {"transformer": "a Mochi transformer", "vae": "a Mochi autoencoder", "t5": "a T5 text encoder"}
LOADERS = {
    "a Mochi transformer": load_transformer,
    "a Mochi autoencoder": load_vae,
    "a T5 text encoder": load_text_encoder,
}


@pytest.mark.parametrize("wanted", LOADERS)
@pytest.mark.parametrize("kind", [*OTHERS, *OWN])
def test_another_model_is_named(tmp_path, kind, wanted):
    if kind == wanted:
        return
    tensors = OWN[kind]() if kind in OWN else {name: torch.zeros(2, 2) for name in OTHERS[kind]}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"^other.safetensors holds {kind}.*, not {wanted}"):
        LOADERS[wanted](tmp_path / "other.safetensors")


def test_half_an_autoencoder_says_which_half_it_lacks(tmp_path):
    for half, missing in (("decoder", "encoder"), ("encoder", "decoder")):
        module = getattr(random_vae(), half)
        save_file(module.state_dict(), tmp_path / f"{half}.safetensors")
        vae = load_vae(tmp_path / f"{half}.safetensors")
        act, argument = (vae.encode, (1, 3, 7, 16, 16)) if half == "decoder" else (vae.decode, (1, 12, 2, 2, 2))
        with pytest.raises(ValueError, match=f"has no {missing}"):
            act(torch.zeros(argument))
    with pytest.raises(ValueError, match=r"decoder.safetensors both hold decoder"):
        load_vae([tmp_path / "decoder.safetensors", tmp_path / "decoder.safetensors"])


PREFIXES = {
    "transformer": [
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.model.diffusion_model.",
        "model.",
        "transformer.",
    ],
    "vae": ["_orig_mod.", "module.first_stage_model.", "vae._orig_mod."],
    "t5": [
        "_orig_mod.module.",
        "text_encoders.t5xxl.transformer.",
        "text_encoder.",
        "module.model.",
        "conditioner.embedders.0.transformer.",
        "cond_stage_model.t5xxl.transformer.",
        "text_encoder_3.",
    ],
}


@pytest.mark.parametrize(
    ("part", "prefix"), [(part, prefix) for part, prefixes in PREFIXES.items() for prefix in prefixes]
)
def test_wrappers_are_stripped(part, prefix):
    weights = {"transformer": DIT, "vae": random_vae().state_dict(), "t5": random_t5()}[part]
    file = Checkpoint("x", Path("x"), from_state_dict({prefix + name: t for name, t in weights.items()}))
    assert select_part(file, part).tensors.keys() == weights.keys()


@pytest.mark.parametrize(
    ("part", "name"),
    [("transformer", "num_updates"), ("transformer", "ema.decay"), ("t5", "logit_scale"), ("t5", "lm_head.weight")],
)
def test_what_is_known_and_not_needed_is_left_out(caplog, part, name):
    weights = {"transformer": DIT, "t5": random_t5()}[part]
    file = Checkpoint("x.pt", Path("x.pt"), from_state_dict({**weights, name: torch.tensor(3)}))
    with caplog.at_level("INFO"):
        assert select_part(file, part).tensors.keys() == weights.keys()
    assert caplog.messages == [f"x.pt: skipped 1 tensors that {PHRASES[part]} does not need: {name}"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_updates", torch.zeros(2)), ("lm_head.weight", torch.zeros(2)), ("decoder.surprise", torch.zeros(1))],
)
def test_unknown_companions_are_an_error(tmp_path, name, value):
    save_file({**DIT, name: value}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"^x.safetensors does not fit the model: 1 unexpected \({name}\)"):
        load_transformer(tmp_path / "x.safetensors")


def test_wrappers_inside_names():
    weights = {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in DIT.items()}
    file = Checkpoint("x", Path("x"), from_state_dict(weights))
    assert select_part(file, "transformer").tensors.keys() == DIT.keys()


def write_sharded(folder, tensors, variant=""):
    shards = {f"m{variant}-0000{i + 1}-of-00002.safetensors": list(tensors)[i::2] for i in range(2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (folder / f"m.safetensors.index{variant}.json").write_text(json.dumps(index))
    return folder / next(iter(shards))


@pytest.mark.parametrize("write", [write_sharded, None])
def test_folders_with_variants_and_pipeline_roots(tmp_path, write):
    folder = tmp_path / "transformer"
    folder.mkdir()
    doubled = as_diffusers({name: 2 * t for name, t in DIT.items()})
    for variant, tensors in ((".bf16", doubled), (".fp16", doubled), ("", as_diffusers(DIT))):
        if write:
            write(folder, tensors, variant)
        else:
            save_file(tensors, folder / f"m{variant}.safetensors")
        if variant == ".bf16":
            assert torch.equal(load_transformer(folder, torch.float32).state_dict()[NAME], 2 * DIT[NAME])
        elif variant == ".fp16":
            with pytest.raises(ValueError, match="give the path of the file itself"):
                load_transformer(folder)
    for path in (folder, tmp_path):
        assert torch.equal(load_transformer(path, torch.float32).state_dict()[NAME], DIT[NAME])
    one = folder / ("m.safetensors.index.bf16.json" if write else "m.bf16.safetensors")
    assert torch.equal(load_transformer(one, torch.float32).state_dict()[NAME], 2 * DIT[NAME])


def test_a_shard_index_that_lies(tmp_path):
    shard = write_sharded(tmp_path, as_diffusers(DIT))
    index = tmp_path / "m.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "extra": shard.name}}))
    with pytest.raises(ValueError, match=r"index.json says that .* holds extra"):
        load_transformer(tmp_path)
    itself = json.dumps({"weight_map": {"a": index.name}})
    for junk in ("", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "[" * 10**5, itself):
        index.write_text(junk)
        with pytest.raises(ValueError, match=r"index.json is not a shard index"):
            load_transformer(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": ".."}}))
    with pytest.raises(ValueError, match="outside its folder"):
        load_transformer(tmp_path)
