"""Files in every layout load to the same model; everything else is refused with one sentence."""

import json
import resource
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import AsymmDiT, AsymmVAEConfig, load_transformer, load_vae
from mochi_core.checkpoints import (
    Checkpoint,
    autoencoder_rules,
    describe,
    dit_config,
    from_state_dict,
    merge,
    open_checkpoint,
    open_part,
    to_canonical,
    to_diffusers,
    transformer_rules,
    vae_config,
)
from mochi_core.checkpoints.inspect import inspect, render
from mochi_core.checkpoints.tensors import quantized_weight
from mochi_core.quantization.weights import QuantizedWeight
from tests.harness.tiny_models import DIT, VAE, random_dit, random_t5, random_vae

DIT_RULES = transformer_rules(DIT.depth)
VAE_RULES = autoencoder_rules(VAE.encoder_blocks, VAE.decoder_blocks)


@pytest.fixture(scope="module")
def dit():
    return random_dit()


@pytest.fixture(scope="module")
def vae():
    return random_vae()


def save(path, tensors, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path, metadata or None)
    return path


def read(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


def as_diffusers(module, rules):
    return read(to_diffusers(from_state_dict(module.state_dict()), rules))


def assert_same(module, expected):
    state, wanted = module.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "module."])
def test_original_layout_with_any_prefix(dit, tmp_path, prefix):
    path = save(tmp_path / "dit.safetensors", {prefix + name: t for name, t in dit.state_dict().items()})
    loaded = load_transformer(path, torch.float32)
    assert loaded.config == DIT
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_same(loaded, dit)


def test_diffusers_layout_single_file_and_shards(dit, tmp_path):
    tensors = as_diffusers(dit, DIT_RULES)
    assert_same(load_transformer(save(tmp_path / "one.safetensors", tensors), torch.float32), dit)
    folder, names = tmp_path / "sharded", list(tensors)
    shards = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save(folder / shard, {name: tensors[name] for name in part})
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "a.safetensors.index.json").write_text(json.dumps(index))
    assert_same(load_transformer(folder, torch.float32), dit)


def test_torch_file(dit, tmp_path):
    torch.save({"state_dict": dit.state_dict()}, tmp_path / "dit.pt")
    assert_same(load_transformer(tmp_path / "dit.pt", torch.float32), dit)


def test_autoencoder_in_all_its_forms(vae, tmp_path):
    whole = vae.state_dict()
    halves = {
        half: {n.removeprefix(half + "."): t for n, t in whole.items() if n.startswith(half)}
        for half in ("encoder", "decoder")
    }
    both = save(tmp_path / "both.safetensors", whole)
    encoder = save(tmp_path / "encoder.safetensors", halves["encoder"])
    decoder = save(tmp_path / "decoder.safetensors", halves["decoder"])
    diffusers = save(tmp_path / "diffusers.safetensors", as_diffusers(vae, VAE_RULES))
    for paths in (both, [encoder, decoder], diffusers):
        loaded = load_vae(paths)
        assert loaded.config == VAE
        assert_same(loaded, vae)
    assert load_vae(decoder).encoder is None
    assert load_vae(encoder).decoder is None
    with pytest.raises(ValueError, match="both hold"):
        load_vae([both, decoder])


def test_all_in_one_file_yields_each_part(dit, vae, tmp_path):
    tensors = {f"model.diffusion_model.{n}": t for n, t in dit.state_dict().items()}
    tensors |= {f"vae.{n}": t for n, t in vae.state_dict().items()}
    tensors |= {f"text_encoders.t5xxl.transformer.{n}": t for n, t in random_t5().items()}
    path = save(tmp_path / "all.safetensors", tensors)
    assert_same(load_transformer(path, torch.float32), dit)
    assert_same(load_vae(path), vae)
    text = describe(open_checkpoint(path))
    assert "Mochi transformer, 3 blocks" in text
    assert "T5" in text


@pytest.mark.parametrize("module, rules", [(random_dit(), DIT_RULES), (random_vae(), VAE_RULES)])
def test_conversion_there_and_back_is_the_identity(module, rules):
    there = to_diffusers(from_state_dict(module.state_dict()), rules)
    back = read(to_canonical(there, rules))
    assert back.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(back[name], tensor), name


def test_released_key_set_equals_diffusers():
    from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

    from mochi_core import AsymmVAE

    released = AsymmVAEConfig()
    vae_rules = autoencoder_rules(released.encoder_blocks, released.decoder_blocks)
    with torch.device("meta"):
        peers = (MochiTransformer3DModel(num_layers=48), transformer_rules(48)), (AutoencoderKLMochi(), vae_rules)
        for ours, (peer, rules) in zip((AsymmDiT(), AsymmVAE()), peers, strict=True):
            converted = to_canonical(from_state_dict(peer.state_dict()), rules)
            assert {n: t.shape for n, t in converted.items()} == {
                n: tuple(t.shape) for n, t in ours.state_dict().items()
            }


def test_configuration_comes_from_the_shapes(dit, vae):
    assert dit_config(from_state_dict(dit.state_dict())) == DIT
    assert vae_config(from_state_dict(vae.state_dict())) == VAE
    other = replace(DIT, depth=2, hidden_size_x=64, num_heads=2, mlp_size_x=96, text_width=32, in_channels=5)
    assert dit_config(from_state_dict(AsymmDiT(other, device="meta").state_dict())) == other
    assert vae_config(from_state_dict(random_vae().decoder.state_dict(prefix="decoder."))).decoder_blocks == (1,) * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_policy(dit, tmp_path, dtype):
    path = save(tmp_path / "dit.safetensors", {n: t.bfloat16() for n, t in dit.state_dict().items()})
    loaded = load_transformer(path, dtype)
    for name, parameter in loaded.named_parameters():
        exact = name == "pos_frequencies" or "_norm_" in name
        assert parameter.dtype == (torch.float32 if exact else dtype), name


def test_differences_are_named_together(dit, tmp_path):
    tensors = dict(dit.state_dict())
    del tensors["blocks.1.attn.proj_x.weight"]
    tensors["blocks.0.surprise"] = torch.zeros(1)
    tensors["final_layer.linear.weight"] = torch.zeros(3, 3)
    path = save(tmp_path / "odd.safetensors", tensors)
    with pytest.raises(ValueError, match=r"odd.safetensors") as error:
        load_transformer(path)
    for part in ("1 missing (blocks.1.attn.proj_x.weight)", "1 unexpected (blocks.0.surprise)", "instead of (48, 96)"):
        assert part in str(error.value)


def test_unknown_diffusers_names_are_refused(dit, tmp_path):
    tensors = {**as_diffusers(dit, DIT_RULES), "transformer_blocks.0.extra.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"transformer_blocks.0.extra.weight"):
        load_transformer(save(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    ("names", "phrase"),
    [
        (["double_blocks.0.img_attn.qkv.weight"], "a FLUX transformer"),
        (["double_blocks.0.img_attn.qkv.weight", "txt_in.individual_token_refiner.x"], "a HunyuanVideo transformer"),
        (["blocks.0.cross_attn.k.weight", "patch_embedding.weight"], "a Wan transformer"),
        (["transformer_blocks.0.scale_shift_table", "caption_projection.linear_1.weight"], "an LTX transformer"),
        (["blocks.0.attn.qkv_x.lora_A"], "a LoRA"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a Stable Diffusion UNet"),
        (["decoder.mid.block_1.conv1.weight"], "an image autoencoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5 text encoder"),
        (["something"], "an unknown model of 1 tensors"),
        (["something.weight", "scaled_fp8"], r"an unknown model of 1 tensors \(e.g. something.weight\)"),
    ],
)
def test_other_models_are_told_apart(tmp_path, names, phrase):
    path = save(tmp_path / "other.safetensors", {name: torch.zeros(1) for name in names})
    with pytest.raises(ValueError, match=f"other.safetensors holds {phrase}.*not a Mochi transformer"):
        load_transformer(path)


def test_no_file_of_an_autoencoder():
    with pytest.raises(ValueError, match="no file to load an autoencoder from"):
        load_vae([])


def broken(path, kind, dit):
    if kind == "missing":
        return FileNotFoundError, "There is no file"
    if kind == "truncated":
        content = save(path, dit.state_dict()).read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return ValueError, f"incomplete: it has {len(content) // 2:,} of at least {len(content):,} bytes"
    if kind == "truncated header":
        content = save(path, dit.state_dict()).read_bytes()
        path.write_bytes(content[:200])
        return ValueError, "is incomplete"
    path.write_bytes({"web page": b"<!doctype html><html></html>", "empty": b""}[kind])
    return ValueError, "is not a safetensors file"


@pytest.mark.parametrize("kind", ["missing", "truncated", "truncated header", "web page", "empty"])
def test_broken_files(dit, tmp_path, kind):
    path = tmp_path / "x.safetensors"
    error, message = broken(path, kind, dit)
    with pytest.raises(error, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "remedy"), [("x.safetensors", "download the weights again"), ("x.mp4", "choose another one")]
)
def test_a_file_that_was_chosen_by_mistake_is_not_to_be_downloaded_again(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(b"\0\0\0 ftypisom\0\0")
    with pytest.raises(ValueError, match=f"{name} is not a safetensors file but something else; {remedy}"):
        open_checkpoint(tmp_path / name)


def test_an_empty_tensor_says_that_a_transformer_has_frame_levels(dit, tmp_path):
    prefix, marks = "model.diffusion_model.", {}
    weights = {prefix + name: tensor.bfloat16() for name, tensor in dit.state_dict().items()}
    for name, mark in (("plain", {}), ("marked", {f"{prefix}frame_levels": torch.tensor([])})):
        path = save(tmp_path / f"{name}.safetensors", {**weights, **mark})
        loaded = load_transformer(path)
        marks[name] = loaded.has_frame_levels
        assert torch.equal(loaded.t5_yproj.weight, dit.t5_yproj.weight.bfloat16())
        assert describe(open_checkpoint(path)) == "a Mochi transformer, 3 blocks, bfloat16"
        report = inspect(path)
        assert list(report["stored"]) == ["bfloat16"]
        assert ("per-frame noise levels" in render(report)) == bool(mark)
    assert marks == {"plain": False, "marked": True}


def test_a_t5_is_found_beside_another_encoder_that_begins_like_one(tmp_path):
    t5 = random_t5()
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    umt5 = {**t5, bias.format(1): t5[bias.format(0)].clone()}
    path = save(
        tmp_path / "both.safetensors", {**umt5, **{f"text_encoders.t5xxl.transformer.{n}": t for n, t in t5.items()}}
    )
    assert set(open_part(path, "t5").tensors) == set(open_part(save(tmp_path / "t5.safetensors", t5), "t5").tensors)


@pytest.mark.parametrize("begins", [b"<", b" <", b"\n<"])
def test_a_header_may_be_as_long_as_the_first_letters_of_a_web_page(tmp_path, begins):
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    length = int.from_bytes(begins, "little") + (2**16 if begins == b"<" else 0)
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(4))
    assert open_checkpoint(tmp_path / "x.safetensors").tensors["x"].read().tolist() == [0]


def test_pickles_with_code_are_refused(tmp_path):
    import pickle

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": print}))
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        open_checkpoint(tmp_path / "evil.pt")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_shards_outside_the_folder_are_refused(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="outside its folder"):
        open_checkpoint(tmp_path)


def test_missing_shard_and_ambiguous_folder(tmp_path):
    with pytest.raises(ValueError, match="found: none"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a.safetensors, b.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors is missing"):
        open_checkpoint(tmp_path)


def test_opening_reads_nothing(tmp_path):
    size = 3 * 2**30
    header = json.dumps({"big": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensors = open_checkpoint(path).tensors
    assert tensors["big"].shape == (size // 2,)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_metadata_is_kept(dit, tmp_path):
    path = save(tmp_path / "x.safetensors", dit.state_dict(), author="somebody")
    assert open_checkpoint(path).metadata == {"author": "somebody"}
    assert load_file(path).keys() == open_checkpoint(path).tensors.keys()


def test_a_checkpoint_says_its_name(dit, vae, tmp_path):
    save(tmp_path / "folder" / "dit.safetensors", dit.state_dict())
    file, folder = open_checkpoint(tmp_path / "folder" / "dit.safetensors"), open_checkpoint(tmp_path / "folder")
    assert str(file.error("is bad.")) == "dit.safetensors is bad."
    assert str(folder.error("is bad.")) == f"{tmp_path / 'folder'} is bad."
    for half in ("encoder", "decoder"):
        save(tmp_path / f"{half}.safetensors", getattr(vae, half).state_dict())
    merged = merge([open_part(tmp_path / f"{half}.safetensors", "vae") for half in ("encoder", "decoder")])
    assert merged.name == "encoder.safetensors and decoder.safetensors"
    assert merged.tensors.keys() == vae.state_dict().keys()


def test_mapped_tensors_are_changed_when_they_are_read():
    calls = []

    def weight():
        calls.append("read")
        return QuantizedWeight(torch.ones(2, 32, dtype=torch.int8), torch.tensor(3.0))

    def double(values):
        calls.append("changed")
        return 2 * values

    stored = quantized_weight((2, 32), torch.int8, weight).guarded(lambda: calls.append("checked"))
    plain, kept = stored.map(double, shape=(2, 32)), stored.map(double, lambda w: replace(w, scale=2 * w.scale))
    assert (plain.quantized, calls) == (None, [])
    assert torch.equal(plain.read(), torch.full((2, 32), 6.0))
    assert calls == ["checked", "read", "changed"]
    assert torch.equal(kept.quantized().dequantized(), plain.read())
    half = stored.map(lambda values: values.half(), dtype=torch.float16)
    assert (half.stored_dtype, half.num_bytes, half.read().dtype) == ("float16", 128, torch.float16)


def test_the_main_dtype_is_that_of_most_weights():
    state = {"a": torch.zeros(9, dtype=torch.bfloat16), "b": torch.zeros(4), "c": torch.zeros(4)}
    assert Checkpoint("x", Path("x"), from_state_dict(state)).main_dtype() == (torch.bfloat16, None)
