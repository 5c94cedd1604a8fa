"""convert and inspect of T5: the written files have Hugging Face's names, and transformers loads them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import load_text_encoder
from mochi_core.__main__ import main
from mochi_core.checkpoints import is_block_matrix
from mochi_core.checkpoints.names.t5 import t5_shapes
from mochi_core.config import T5EncoderConfig
from mochi_core.quantization.weights import quantize_fp8
from tests.harness import trained
from tests.harness.command_line import convert, refused
from tests.harness.formats import T5_FORMS, file_name, shallow_t5
from tests.harness.memory import write_sparse
from tests.harness.tiny_models import TEXT_WIDTH, random_dit

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module")
def t5():
    return shallow_t5()


def assert_equal(path, expected):
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("form", T5_FORMS)
def test_every_form_becomes_what_it_means(t5, tmp_path, form):
    source = tmp_path / file_name(form)
    meaning = T5_FORMS[form](t5, source)
    convert(source, tmp_path / "plain.safetensors", "--to", "canonical", "--dtype", "fp32")
    assert_equal(tmp_path / "plain.safetensors", {name: tensor.float() for name, tensor in meaning.items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_both_layouts(t5, tmp_path, dtype):
    source = tmp_path / "text_encoders.safetensors"
    save_file({f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in t5.items()}, source)
    convert(source, tmp_path / "x.safetensors", "--to", "canonical", "--dtype", dtype)
    convert(source, tmp_path / "folder", "--to", "diffusers", "--dtype", dtype)
    for path in (tmp_path / "x.safetensors", tmp_path / "folder" / "model.safetensors"):
        assert_equal(path, {name: tensor.to(DTYPES[dtype]) for name, tensor in t5.items()})
    convert(tmp_path / "folder", tmp_path / "back.safetensors", "--to", "canonical")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_transformers_loads_the_folder(t5, tmp_path):
    from transformers import T5EncoderModel

    T5_FORMS["sharded"](t5, tmp_path / "sharded")
    convert(tmp_path / "sharded", tmp_path / "text_encoder", "--to", "diffusers")
    loaded, info = T5EncoderModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not any(info.values()), info
    ours = load_text_encoder(tmp_path / "text_encoder", trained.TOKENIZER)
    ids = torch.tensor([ours.tokenize("a red kite")])
    expected = loaded.eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(ours.encode("a red kite")[0][:, : ids.shape[1]], expected)


def test_fp8_scaled(t5, tmp_path):
    save_file(t5, tmp_path / "t5.safetensors")
    convert(tmp_path / "t5.safetensors", tmp_path / "x.safetensors", "--to", "canonical", "--dtype", "fp8_scaled")
    stored = load_file(tmp_path / "x.safetensors")
    large = {name for name, tensor in t5.items() if is_block_matrix(name, tensor)}
    assert len(large) == 2 * 7
    for name, tensor in t5.items():
        if name in large:
            values, scale = quantize_fp8(tensor.bfloat16())
            layer = name.removesuffix("weight")
            assert torch.equal(stored[name].view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(stored[layer + "weight_scale"], scale)
            assert json.loads(bytes(stored[layer + "comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
        else:
            assert torch.equal(stored[name], tensor.bfloat16()), name


def test_refusals(t5, tmp_path, capsys):
    everything = random_dit().state_dict() | {f"text_encoders.t5xxl.transformer.{name}": t for name, t in t5.items()}
    save_file(everything, tmp_path / "all.safetensors")
    save_file(t5, tmp_path / "t5.safetensors")
    run = ("convert", tmp_path / "all.safetensors", tmp_path / "x.safetensors", "--to", "canonical")
    assert "choose one with --part" in refused(capsys, *run)
    options = ("--to", "diffusers", "--dtype", "fp8_scaled")
    message = refused(capsys, "convert", tmp_path / "t5.safetensors", tmp_path / "y.safetensors", *options)
    assert "Scaled fp8 is for a transformer or T5 with canonical names" in message
    convert(*run[1:], "--part", "t5")
    assert_equal(tmp_path / "x.safetensors", t5)


def test_inspect(t5, tmp_path, capsys):
    save_file(t5, tmp_path / "t5.safetensors")
    assert main(["inspect", str(tmp_path / "t5.safetensors")]) == 0
    text = capsys.readouterr().out
    for line in ("a T5 text encoder, 2 blocks, float32", "depth = 2", f"width = {TEXT_WIDTH}", "num_heads = 4",
                 f"mlp_size = {2 * TEXT_WIDTH}", "vocabulary = 32128", "complete"):  # fmt: skip
        assert line in text
    odd = {**t5, "surprise": torch.zeros(1), "encoder.final_layer_norm.weight": torch.zeros(3)}
    del odd["encoder.block.1.layer.0.SelfAttention.o.weight"]
    save_file(odd, tmp_path / "odd.safetensors")
    assert main(["inspect", "--json", str(tmp_path / "odd.safetensors")]) == 0
    part = json.loads(capsys.readouterr().out)["parts"]["t5"]
    assert part["missing"] == ["encoder.block.1.layer.0.SelfAttention.o.weight"]
    assert part["unexpected"] == ["surprise"]
    assert part["misshapen"] == [f"encoder.final_layer_norm.weight is (3,) instead of ({TEXT_WIDTH},)"]


def test_inspect_released_sizes(tmp_path, capsys):
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        peer = T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    shapes = {name: tuple(p.shape) for name, p in peer.named_parameters() if name != "encoder.embed_tokens.weight"}
    assert t5_shapes(T5EncoderConfig()) == shapes
    path = write_sparse(tmp_path / "t5xxl_bf16.safetensors", dict(peer.named_parameters()))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "sizes of the released model" in text
    assert "complete" in text
