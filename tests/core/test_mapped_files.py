"""Files that change after a model was loaded: an error if its weights are mapped, otherwise no effect."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mochi_core import load_transformer, load_vae
from mochi_core.mapped_files import mapped_weights
from mochi_core.text_encoder import load_text_encoder
from tests.harness.bad_files import DIT
from tests.harness.formats import FORMATS
from tests.harness.quantized_files import nvfp4
from tests.harness.tiny_models import random_dit, random_t5, random_vae

VAE = random_vae().state_dict()
TOKENIZER = Path(__file__).parents[2] / "models" / "text_encoders"


def run_transformer(dit):
    return dit(torch.ones(1, 12, 1, 4, 4), torch.ones(1), torch.ones(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))


def run_vae(vae):
    return vae.decode(torch.ones(1, 12, 1, 2, 2))


def run_encoder(vae):
    return vae.encode(torch.ones(1, 3, 1, 16, 16)).mean


MODELS = {
    "transformer": (load_transformer, DIT, run_transformer),
    "decoder": (load_vae, VAE, run_vae),
    "encoder": (load_vae, VAE, run_encoder),
}


@pytest.fixture
def stored(tmp_path):
    def write(weights):
        save_file(weights, tmp_path / "m.safetensors")
        os.utime(tmp_path / "m.safetensors", (1, 1))
        return tmp_path / "m.safetensors"

    return write


def overwrite(path):
    content = bytearray(path.read_bytes())
    content[-8:] = bytes(8)
    path.write_bytes(content)


def cut(path):
    os.truncate(path, 100)


def put_another_in_its_place(path):
    path.with_suffix(".new").write_bytes(b"new")
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [overwrite, cut])
@pytest.mark.parametrize("kind", MODELS)
def test_a_mapped_file_that_changes_is_an_error_before_the_next_run(stored, kind, change):
    load, weights, run = MODELS[kind]
    model = load(path := stored(weights), torch.float32)
    assert set(mapped_weights(model)) == weights.keys()
    run(model)
    change(path)
    with pytest.raises(
        ValueError, match=r"^m.safetensors changed after it was loaded.* load it again, with mmap=False"
    ):
        run(model)


@pytest.mark.parametrize("kind", MODELS)
def test_copies_do_not_care(stored, kind):
    load, weights, run = MODELS[kind]
    model = load(path := stored(weights), torch.float32, mmap=False)
    assert mapped_weights(model) == []
    before = run(model)
    cut(path)  # would crash the process if anything were still mapped
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_stays_mapped_where_the_dtype_is_converted(stored, dtype):
    """`pos_frequencies` and the norms of q and k keep their dtype."""
    dit = load_transformer(path := stored(DIT), dtype)
    assert mapped_weights(dit) == []
    cut(path)
    assert all(parameter.sum().isfinite() for parameter in dit.parameters())


def test_nothing_stays_mapped_where_weights_are_quantised(stored):
    dit = load_transformer(path := stored(DIT), torch.float32, quantize="int8")
    assert mapped_weights(dit) == []
    cut(path)
    run_transformer(dit)


def test_a_file_that_is_gone_or_replaced_stays_until_nobody_maps_it(stored):
    for change in (put_another_in_its_place, Path.unlink):
        dit = load_transformer(path := stored(DIT), torch.float32)
        before = run_transformer(dit)
        change(path)
        assert torch.equal(run_transformer(dit), before)


def test_what_has_been_copied_since_is_no_longer_mapped(stored):
    dit = load_transformer(path := stored(DIT), torch.float32).double()
    assert len(mapped_weights(dit)) == sum(parameter.dtype == torch.float32 for parameter in dit.parameters())
    for parameter in dit.parameters():
        parameter.data = parameter.data.clone()
    cut(path)
    assert mapped_weights(dit) == []


def test_all_files_of_a_model_count(tmp_path):
    halves = {half: getattr(random_vae(), half).state_dict() for half in ("encoder", "decoder")}
    for half, weights in halves.items():
        save_file(weights, tmp_path / f"{half}.safetensors")
    vae = load_vae([tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"])
    cut(tmp_path / "encoder.safetensors")
    with pytest.raises(ValueError, match=r"^encoder.safetensors changed"):
        run_vae(vae)


def test_quantised_weights_are_mapped_too(stored):
    name = "blocks.0.attn.proj_x.weight"
    weights = {**DIT, name: DIT[name].to(torch.float8_e4m3fn)}
    dit = load_transformer(path := stored(weights), torch.float32)
    assert len(mapped_weights(dit)) == len(weights)
    copied = load_transformer(path, torch.float32, mmap=False)
    assert mapped_weights(copied) == []
    before = run_transformer(copied)
    cut(path)
    assert torch.equal(run_transformer(copied), before)
    with pytest.raises(ValueError, match=r"^m.safetensors changed"):
        run_transformer(dit)


def test_quantised_weights_that_are_put_together_are_copies(stored):
    name = "blocks.0.attn.proj_x"
    scale = torch.full((len(DIT[f"{name}.weight"]), 1), 0.5, dtype=torch.float16)
    scaled = {f"{name}.weight": DIT[f"{name}.weight"].to(torch.float8_e4m3fn), f"{name}.scale_weight": scale}
    dit = load_transformer(stored({**DIT, **scaled, "scaled_fp8": torch.zeros(0)}), torch.float32)
    assert (
        {f"{name}.values", "pos_frequencies"} < set(mapped_weights(dit)) == dit.state_dict().keys() - {f"{name}.scale"}
    )


def test_nothing_stays_mapped_where_blocks_are_put_together(tmp_path):
    """Files store nvfp4's values and scales separately; only a scale for the whole matrix could stay mapped."""
    nvfp4(random_dit().state_dict(), path := tmp_path / "m.safetensors")
    dit = load_transformer(path, torch.float32)
    assert mapped_weights(dit) == []
    cut(path)
    assert all(tensor.float().sum().isfinite() for tensor in (*dit.parameters(), *dit.buffers()))


@pytest.mark.parametrize("kind", ["Q8_0 gguf", "pt"])
def test_files_of_every_kind_are_mapped(tmp_path, kind):
    weights = random_dit().state_dict()
    path = tmp_path / ("m.pt" if kind == "pt" else "m.gguf")
    torch.save(weights, path) if kind == "pt" else FORMATS[kind](weights, path)
    dit = load_transformer(path, torch.float32)
    quantized = {name for name in dit.state_dict() if name.endswith(".values")}
    assert set(mapped_weights(dit)) >= (quantized or weights.keys())
    cut(path)
    with pytest.raises(ValueError, match=r"^m\.\w+ changed"):
        dit.prepare_text(torch.ones(1, 3, 64), torch.ones(1, 3, dtype=torch.bool))


def test_the_text_encoder(stored):
    encoder = load_text_encoder(path := stored(random_t5()), TOKENIZER)
    assert mapped_weights(encoder.model)
    cut(path)
    with pytest.raises(ValueError, match=r"^m.safetensors changed"):
        encoder.encode("a kite")
