"""Every part in every quantised format loads, stays quantised in memory, and matches its dequantised weights."""

import json
import random
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.k_types import K_QUANTIZERS
from mochi_core import load_text_encoder, load_transformer, load_vae
from mochi_core.__main__ import main
from mochi_core.checkpoints import (
    describe,
    from_state_dict,
    open_checkpoint,
    to_canonical,
    to_diffusers,
    transformer_rules,
)
from mochi_core.checkpoints.names.notes import note_tensor
from mochi_core.checkpoints.names.quantized import gather_quantized, unknown_formats
from mochi_core.checkpoints.tensors import QUANTIZATION, Checkpoint, quantized_weight
from mochi_core.quantization.weights import QUANTIZERS, QuantizedLinear, quantize_fp8_rowwise
from tests.harness import quantized_files, trained
from tests.harness.formats import FORMATS, T5_FORMS, VAE_FORMS, WIDE, file_name, passes, quantized_layers, shallow_t5
from tests.harness.numbers import relative_error
from tests.harness.quantized_files import BITSANDBYTES, SAFETENSORS, TORCHAO, gguf_file, is_block_matrix
from tests.harness.random_inputs import velocity
from tests.harness.tiny_models import DIT, random_dit, random_vae

# Relative error of one forward of the wide model; most K types hold random weights.
LARGEST_ERROR = {
    "fp8_e5m2": 0.08,
    "fp8": 0.05,
    "int8": 0.02,
    "Q4": 0.15,
    "Q5": 0.08,
    "Q6": 0.04,
    "Q8": 0.01,
    "MXFP4": 0.25,
    "nf4": 0.15,
    "nvfp4": 0.2,
    "F": 0.01,
    "BF16": 0.01,
}


PLAIN = ("F32 gguf", "F16 gguf", "BF16 gguf")


@pytest.fixture(scope="module")
def dit():
    return random_dit(WIDE)


@pytest.mark.parametrize("form", FORMATS)
def test_transformer(dit, tmp_path, form):
    tensors = dit.state_dict()
    expected = FORMATS[form](tensors, tmp_path / file_name(form))
    save_file(expected, tmp_path / "meaning.safetensors")
    loaded = load_transformer(tmp_path / file_name(form), torch.float32)
    assert loaded.config == WIDE
    large = {name.removesuffix(".weight") for name, tensor in tensors.items() if is_block_matrix(name, tensor)}
    assert quantized_layers(loaded) == (set() if form in PLAIN else large)
    result = velocity(loaded)
    assert torch.equal(result, velocity(load_transformer(tmp_path / "meaning.safetensors", torch.float32)))
    if not re.match(r"Q._K|IQ", form) or form.removesuffix(" gguf") in K_QUANTIZERS:
        bound = next(bound for key, bound in LARGEST_ERROR.items() if key in form)
        assert relative_error(result, velocity(dit)) < bound


@pytest.mark.parametrize("form", ["plain fp8_e4m3fn", "scaled fp8", "int8", "Q4_0 in safetensors"])
def test_diffusers_layout_stays_quantised(dit, tmp_path, form):
    """Rows of q, k and v, with a scale each, are merged, and halves are swapped."""
    rules = transformer_rules(WIDE.depth)
    foreign = {name: t.read().clone() for name, t in to_diffusers(from_state_dict(dit.state_dict()), rules).items()}
    expected = SAFETENSORS[form](foreign, tmp_path / "x.safetensors")
    save_file(expected, tmp_path / "meaning.safetensors")
    loaded = load_transformer(tmp_path / "x.safetensors", torch.float32)
    assert torch.equal(velocity(loaded), velocity(load_transformer(tmp_path / "meaning.safetensors", torch.float32)))
    assert {n + ".weight" for n in quantized_layers(loaded)} == {
        n for n, t in dit.state_dict().items() if is_block_matrix(n, t)
    }


def test_swapped_halves_keep_what_a_layer_says_of_products(dit, tmp_path):
    foreign = to_diffusers(from_state_dict(dit.state_dict()), transformer_rules(WIDE.depth))
    file = Checkpoint("x", tmp_path, {name: quantized_with_notes(t) for name, t in foreign.items() if t.shape[1:]})
    tensors = to_canonical(file.tensors, transformer_rules(WIDE.depth))
    swapped, merged = (tensors[f"blocks.0.{layer}.weight"].quantized() for layer in ("mlp_x.w1", "attn.qkv_x"))
    assert (swapped.input_scale, swapped.exact_product, swapped.fp8_product) == (torch.tensor(3.0), False, True)
    assert (merged.input_scale, merged.exact_product, merged.fp8_product) == (None, False, True)


def quantized_with_notes(tensor):
    def read():
        return replace(quantize_fp8_rowwise(tensor.read().flatten(1)), input_scale=torch.tensor(3.0))

    return quantized_weight(tensor.shape, tensor.dtype, read)


def test_each_shard_notes_its_own_layers(dit, tmp_path):
    """A shard's metadata must not hide another's."""
    expected = quantized_files.metadata_scaled_fp8(dit.state_dict(), tmp_path / "whole.safetensors")
    save_file(expected, tmp_path / "meaning.safetensors")
    with safe_open(tmp_path / "whole.safetensors", framework="pt") as whole:
        notes = json.loads(whole.metadata()[QUANTIZATION])["layers"]
        shards = {f"{i}.safetensors": {n: whole.get_tensor(n) for n in sorted(whole.keys())[i::2]} for i in range(2)}
    for shard, tensors in shards.items():
        own = {layer: note for layer, note in notes.items() if f"{layer}.weight" in tensors}
        save_file(tensors, tmp_path / shard, {QUANTIZATION: json.dumps({"layers": own})})
    index = {"weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_transformer(tmp_path / "x.safetensors.index.json", torch.float32)
    assert torch.equal(velocity(loaded), velocity(load_transformer(tmp_path / "meaning.safetensors", torch.float32)))
    save_file(shards["1.safetensors"], tmp_path / "1.safetensors", {QUANTIZATION: "{"})
    with pytest.raises(ValueError, match=r"x.safetensors.index.json has a shard with an unreadable _quantization"):
        load_transformer(tmp_path / "x.safetensors.index.json", torch.float32)


@pytest.mark.parametrize("form", ["scaled fp8", "int8", "Q4_0 gguf"])
def test_quantised_transformer_computes_in_bf16(dit, tmp_path, form):
    FORMATS[form](dit.state_dict(), tmp_path / file_name(form))
    exact, half = (load_transformer(tmp_path / file_name(form), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert relative_error(velocity(half), velocity(exact)) < 0.02


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantise_while_loading(dit, tmp_path, kind):
    save_file(dit.state_dict(), tmp_path / "dit.safetensors")
    loaded = load_transformer(tmp_path / "dit.safetensors", torch.float32, quantize=kind)
    assert quantized_layers(loaded) == {
        n.removesuffix(".weight")
        for n, t in dit.state_dict().items()
        if is_block_matrix(n, t) and not (kind == "fp8_rowwise" and ".mod_" in n)
    }
    bounds = {"fp8": 0.05, "fp8_rowwise": 0.06, "int8": 0.02, "q4_0": 0.15}
    assert 0 < relative_error(velocity(loaded), velocity(dit)) < bounds[kind]


def test_quantising_leaves_what_the_file_has_quantised(dit, tmp_path):
    FORMATS["Q8_0 gguf"](dit.state_dict(), tmp_path / "dit.gguf")
    loaded = load_transformer(tmp_path / "dit.gguf", quantize="q4_0")
    assert {layer.block_type for layer in loaded.modules() if isinstance(layer, QuantizedLinear)} == {"Q8_0"}


@pytest.mark.parametrize("kind", quantized_files.HALVES)
def test_blocks_that_are_no_numbers(dit, tmp_path, kind):
    name = "blocks.1.mlp_x.w2"
    blocks = torch.from_numpy(quantized_files.random_blocks(kind, *dit.get_parameter(f"{name}.weight").shape))
    tensors = {n: t for n, t in dit.state_dict().items() if n != f"{name}.weight"}
    for start in quantized_files.HALVES[kind]:
        for value in (torch.inf, torch.nan):
            broken = blocks.clone()
            broken[5, start : start + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
            save_file({**tensors, f"{name}.{kind}_qweight": broken}, tmp_path / "x.safetensors")
            with pytest.raises(ValueError, match=rf"x.safetensors has NaN or infinite values in {name}.weight"):
                load_transformer(tmp_path / "x.safetensors")
    save_file({**tensors, f"{name}.{kind}_qweight": blocks}, tmp_path / "x.safetensors")
    load_transformer(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_what_is_no_number_is_not_hidden_by_quantising(dit, tmp_path, kind):
    broken = {**dit.state_dict(), "blocks.1.mod_x.weight": dit.state_dict()["blocks.1.mod_x.weight"].clone()}
    broken["blocks.1.mod_x.weight"][3, 7] = torch.nan
    save_file(broken, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors has NaN or infinite values in blocks.1.mod_x.weight"):
        load_transformer(tmp_path / "x.safetensors", quantize=kind)


@pytest.mark.parametrize(
    ("stored_format", "known"), [("blocks_Q8_0", True), ("ggml_Q8_0", True), ("blocks_Q9_0", False), ("Q8_0", False)]
)
def test_what_comfyui_saves_in_blocks(stored_format, known):
    blocks = torch.from_numpy(quantized_files.random_blocks("Q8_0", 32, 64))
    tensors = from_state_dict({"a.weight": blocks, "a.comfy_quant": note_tensor({"format": stored_format})})
    gathered = gather_quantized(Checkpoint("a", Path("a"), tensors))
    assert gathered["a.weight"].block_type == ("Q8_0" if known else None)
    assert unknown_formats(gathered) == (set() if known else {stored_format})


def test_unknown_quantisation_is_refused(dit, tmp_path):
    save_file(dit.state_dict(), tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="no quantisation 'q9'; use fp8, fp8_rowwise, int8, q4_0"):
        load_transformer(tmp_path / "dit.safetensors", quantize="q9")


@pytest.mark.parametrize("path", [BITSANDBYTES, TORCHAO, TORCHAO.with_suffix(".pt")], ids=lambda path: path.name)
def test_what_other_tools_wrote(path):
    """Equals the tool's own result bit for bit; bitsandbytes rounds int8 twice."""
    file, expected = open_checkpoint(path), load_file(path.with_suffix(".safetensors"))
    tensors = gather_quantized(file)
    names = {name.removeprefix("expected.") for name in expected if name.startswith("expected.")} - {"int8_group"}
    assert len(names) >= 6
    for name in names:
        weight, meaning = tensors[f"{name}.weight"], expected[f"expected.{name}"]
        assert (weight.shape, weight.is_float) == (meaning.shape, True)
        assert (weight.quantized is None) == (name in ("nf4_64_96", "nf4_32_96")), name  # blocks that cross row ends
        if name == "int8" and path == BITSANDBYTES:
            torch.testing.assert_close(weight.read(), meaning, rtol=2e-7, atol=0)
        else:
            assert torch.equal(weight.read(), meaning), name
    groups = {"torchao Int8Tensor with (16, 2) scales"} if path != BITSANDBYTES else set()
    assert unknown_formats(tensors) == groups


BREAK = {
    "nf4 by bitsandbytes": ("bitsandbytes 4 bits", "weight.absmax", lambda t: t[1:]),
    "int8 by bitsandbytes": ("bitsandbytes int8 in tiles", "weight_format", lambda t: t + 1),
    "int8 by torchao": ("torchao Int8Tensor with", "_weight_scale", lambda t: t[1:]),
    "mxfp8": ("mxfp8", "weight_scale", lambda t: t[:1]),
    "nvfp4": ("nvfp4", "weight_scale_2", lambda t: t.expand(2).clone()),
}


@pytest.mark.parametrize("form", BREAK)
def test_forms_that_cannot_be_read_are_named(dit, tmp_path, form):
    phrase, part, change = BREAK[form]
    FORMATS[form](dit.state_dict(), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = f"blocks.1.mod_x.{part}"
    save_file({**tensors, name: change(tensors[name])}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match=rf"x.safetensors has weights in a form that cannot be read: {phrase}"):
        load_transformer(tmp_path / "x.safetensors")


@pytest.mark.parametrize("form", ["mxfp8", "nvfp4"])
@pytest.mark.parametrize("note", [{"convrot": True}, {"params": {"convrot": True}}])
def test_rotated_weights_are_not_read_as_if_they_were_not(dit, tmp_path, form, note):
    FORMATS[form](dit.state_dict(), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    name = "blocks.1.mod_x.comfy_quant"
    tensors[name] = torch.tensor(list(json.dumps({"format": form, **note}).encode()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"x.safetensors has weights in a form that cannot be read: {form}"):
        load_transformer(tmp_path / "x.safetensors")


def test_layers_of_a_scaled_file_may_stay_in_high_precision(dit, tmp_path):
    """Only the marker and the scales tell what is quantised."""
    SAFETENSORS["scaled fp8, older"](dit.state_dict(), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    layer = "model.diffusion_model.blocks.1.mlp_x.w1"
    for leaf in ("scale_weight", "scale_input"):
        del tensors[f"{layer}.{leaf}"]
    tensors[f"{layer}.weight"] = dit.state_dict()["blocks.1.mlp_x.w1.weight"].clone()
    save_file(tensors, tmp_path / "x.safetensors")
    loaded = load_transformer(tmp_path / "x.safetensors", torch.float32)
    assert torch.equal(loaded.get_submodule("blocks.1.mlp_x.w1").weight, dit.get_submodule("blocks.1.mlp_x.w1").weight)
    assert "blocks.0.mlp_x.w1" in quantized_layers(loaded)


def test_scaled_all_in_one_file(dit, tmp_path):
    parts = {"model.diffusion_model.": dit.state_dict(), "text_encoders.t5xxl.transformer.": shallow_t5()}
    tensors, meaning = {}, {}
    for prefix, part in parts.items():
        meaning[prefix] = SAFETENSORS["scaled fp8, older"](part, tmp_path / "part.safetensors")
        stored = load_file(tmp_path / "part.safetensors")
        tensors |= {prefix + name.removeprefix(prefix): t for name, t in stored.items()}
        save_file(meaning[prefix], tmp_path / f"{prefix}safetensors")
    save_file(tensors, tmp_path / "all.safetensors")
    loaded, expected = (
        velocity(load_transformer(tmp_path / name, torch.float32))
        for name in ("all.safetensors", "model.diffusion_model.safetensors")
    )
    assert torch.equal(loaded, expected)
    tokenizer = trained.TOKENIZER
    loaded, expected = (
        load_text_encoder(tmp_path / name, tokenizer).encode("a red kite")[0]
        for name in ("all.safetensors", "text_encoders.t5xxl.transformer.safetensors")
    )
    assert torch.equal(loaded, expected)


@pytest.mark.parametrize("leaf", ["weight_scale", "Q4_0_qweight"])
def test_parts_that_do_not_fit_are_named(dit, tmp_path, leaf):
    """Five scales for more rows, and rows that are not a multiple of the block size."""
    name = "blocks.0.mod_x"
    tensors = {**dit.state_dict(), f"{name}.weight": dit.state_dict()[f"{name}.weight"].to(torch.float8_e4m3fn)}
    part = torch.ones(5) if leaf == "weight_scale" else torch.zeros(1024, 19, dtype=torch.uint8)
    save_file({**tensors, f"{name}.{leaf}": part}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors .*(mod_x.weight_scale|cannot be read: Q4_0)"):
        load_transformer(tmp_path / "x.safetensors")


def test_changing_the_dtype_of_a_model_keeps_its_meaning(dit, tmp_path):
    SAFETENSORS["scaled fp8"](dit.state_dict(), tmp_path / "x.safetensors")
    loaded = load_transformer(tmp_path / "x.safetensors", torch.float32)
    before = velocity(loaded)
    loaded.to(torch.float32)
    assert torch.equal(velocity(loaded), before)
    assert torch.equal(velocity(loaded), before)


# Relative errors of both halves, which have many layers.
VAE_ERROR = {"bf16": 0.02, "e5m2": 0.4, "fp8": 0.2, "int8": 0.08, "gguf": 0.05}


@pytest.mark.parametrize("form", VAE_FORMS)
def test_autoencoder(tmp_path, form):
    """Linear layers stay quantised where they are; convolutions are dequantised."""
    vae, path = random_vae(), tmp_path / file_name(form)
    save_file(VAE_FORMS[form](vae.state_dict(), path), tmp_path / "meaning.safetensors")
    loaded, meaning = load_vae(path), load_vae(tmp_path / "meaning.safetensors")
    assert bool(quantized_layers(loaded)) == (form not in ("bf16", "gguf"))
    bound = next(bound for key, bound in VAE_ERROR.items() if key in form)
    for result, same, exact in zip(passes(loaded), passes(meaning), passes(vae), strict=True):
        assert torch.equal(result, same)
        assert 0 < relative_error(result, exact) < bound
    video = torch.rand(1, 3, 7, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        plain, streamed = loaded(video), loaded.decode(loaded.encode(video).mean)
    assert relative_error(plain, streamed) < 1e-5


@pytest.fixture(scope="module")
def t5():
    return shallow_t5()


@pytest.mark.parametrize("form", T5_FORMS)
def test_text_encoder(t5, tmp_path, form):
    tokenizer = trained.TOKENIZER
    path = tmp_path / file_name(form)
    save_file(T5_FORMS[form](t5, path), tmp_path / "meaning.safetensors")
    loaded = load_text_encoder(path, tokenizer)
    meaning = load_text_encoder(tmp_path / "meaning.safetensors", tokenizer)
    assert torch.equal(loaded.encode("a red kite")[0], meaning.encode("a red kite")[0])
    has_quantised_matrices = any(word in form for word in ("fp8", "int8", "Q4", "Q8"))
    assert bool(quantized_layers(loaded.model)) == has_quantised_matrices


def test_inspect_tells_block_types_and_their_bytes(dit, tmp_path, capsys):
    FORMATS["Q4_0 gguf"](dit.state_dict(), tmp_path / "dit.gguf")
    assert main(["inspect", str(tmp_path / "dit.gguf")]) == 0
    large = [tensor.numel() * 18 / 32 for name, tensor in dit.state_dict().items() if is_block_matrix(name, tensor)]
    text = capsys.readouterr().out
    assert "a Mochi transformer, 2 blocks, Q4_0 and float16 and float32" in text
    assert f"Q4_0: {len(large)} tensors, {sum(large) / 1e9:.3f} GB" in text


def broken_gguf(path: Path, tensors, kind):
    gguf_file("Q8_0")(tensors, path)
    content = bytearray(path.read_bytes())
    if kind == "web page":
        content = bytearray(b"<!doctype html>")
    elif kind == "empty":
        content = bytearray()
    elif kind == "version":
        content[4] = 9
    elif kind == "count":
        content[8:16] = b"\xff" * 8
    elif kind == "keys":
        content[16:24] = b"\xff" * 7 + b"\x00"
    elif kind == "type":
        place = content.index(b"blocks.0.mod_x.weight") + len("blocks.0.mod_x.weight") + 4 + 16
        content[place] = 19
    elif kind == "no type":
        content[content.index(b"blocks.0.mod_x.weight") + len("blocks.0.mod_x.weight") + 4 + 16] = 99
    elif kind == "shape":
        place = content.index(b"blocks.0.mod_x.weight") + len("blocks.0.mod_x.weight") + 4
        content[place + 5] = 1
    elif kind == "overlap":
        place = content.index(b"blocks.0.mod_x.weight") + len("blocks.0.mod_x.weight") + 4 + 16 + 4
        content[place : place + 8] = bytes(8)
    elif kind == "truncated":
        content = content[:-1]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("web page", "is not a GGUF file"),
        ("empty", "is not a GGUF file"),
        ("version", "its GGUF version is 9"),
        ("count", "it claims 18,446,744,073,709,551,615 tensors"),
        ("keys", "it claims"),
        ("type", "x.gguf has blocks.0.mod_x.weight of type IQ1_S, which is not supported; use a file in F32"),
        ("no type", "blocks.0.mod_x.weight has type 99, which no version of the format defines; download it again"),
        ("shape", "blocks.0.mod_x.weight is at offset"),
        ("overlap", r"blocks\.0\.mod_x\.weight.* overlap"),
        ("truncated", "is at offset"),
    ],
)
def test_lying_gguf_headers(dit, tmp_path, kind, message):
    broken_gguf(tmp_path / "x.gguf", dit.state_dict(), kind)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path / "x.gguf")
    assert "x.gguf" in str(error.value)


@pytest.mark.parametrize(("kind", "code"), [(6, "f"), (12, "d"), (7, "?")], ids=["f32", "f64", "bool"])
def test_a_gguf_alignment_is_a_whole_number(tmp_path, kind, code):
    name = b"general.alignment"
    key = struct.pack(f"<Q{len(name)}sI{code}", len(name), name, kind, 32)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    with pytest.raises(ValueError, match=r"its alignment is (32\.0|True), but must be a power of two"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    gguf_file("Q8_0")(random_dit(replace(DIT, depth=1)).state_dict(), path)
    return path.read_bytes()


def test_gguf_cut_anywhere_is_refused(small_gguf, tmp_path):
    for end in [*range(0, 400, 7), *range(400, len(small_gguf), len(small_gguf) // 60)]:
        (tmp_path / "cut.gguf").write_bytes(small_gguf[:end])
        with pytest.raises(ValueError, match=r"cut.gguf"):
            open_checkpoint(tmp_path / "cut.gguf")


def test_gguf_with_any_wrong_bytes_in_its_header_opens_or_is_refused(small_gguf, tmp_path):
    generator, outcomes = random.Random(0), []
    for _ in range(500):
        content, place = bytearray(small_gguf), generator.randrange(4, 4000)
        content[place : place + 8] = generator.choice([b"\xff" * 8, b"\x00" * 8, generator.randbytes(1)])
        (tmp_path / "odd.gguf").write_bytes(content)
        try:
            file = open_checkpoint(tmp_path / "odd.gguf")
            outcomes.append("opens")
            describe(file)
        except ValueError as error:
            assert "odd.gguf" in str(error)
            outcomes.append("is refused")
    assert set(outcomes) == {"opens", "is refused"}
