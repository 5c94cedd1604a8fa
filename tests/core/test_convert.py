"""convert and inspect, as users call them; convert's files load in diffusers and in ComfyUI's own class."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mochi_core import AsymmDiT, AsymmDiTConfig, AsymmVAE, load_transformer, load_vae
from mochi_core.__main__ import main
from mochi_core.checkpoints import from_state_dict, to_diffusers, transformer_rules
from mochi_core.checkpoints.convert import plan_conversion, write_conversion
from mochi_core.quantization.weights import quantize_fp8
from tests.harness.command_line import convert, refused
from tests.harness.memory import in_a_process, needs_proc, write_sparse
from tests.harness.tiny_models import DIT, cast, random_dit, random_t5, random_vae

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Weights as stored by Genmo: bf16, with positions in float32."""
    folder = tmp_path_factory.mktemp("sources")
    dit = cast(random_dit().state_dict(), torch.bfloat16)
    dit["pos_frequencies"] = random_dit().pos_frequencies.detach()
    vae = cast(random_vae().state_dict(), torch.bfloat16)
    save_file(dit, folder / "transformer.safetensors", {"author": "somebody"})
    save_file(vae, folder / "vae.safetensors")
    for half in ("encoder", "decoder"):
        part = {name.removeprefix(half + "."): t for name, t in vae.items() if name.startswith(half)}
        save_file(part, folder / f"{half}.safetensors")
    everything = {f"model.diffusion_model.{n}": t for n, t in dit.items()} | {f"vae.{n}": t for n, t in vae.items()}
    save_file(everything | random_t5(), folder / "all.safetensors")
    return folder


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_there_and_back_is_the_identity(sources, tmp_path, part):
    source = sources / f"{part}.safetensors"
    convert(source, tmp_path / "ours.safetensors", "--to", "canonical")
    convert(source, tmp_path / "folder", "--to", "diffusers")
    convert(source, tmp_path / "file.safetensors", "--to", "diffusers")
    assert load_file(tmp_path / "ours.safetensors").keys() == load_file(source).keys()
    for name, tensor in load_file(source).items():
        assert torch.equal(load_file(tmp_path / "ours.safetensors")[name], tensor), name
    for there in ("folder", "file.safetensors"):
        back = tmp_path / f"back from {there}.safetensors"
        convert(tmp_path / there, back, "--to", "canonical")
        assert back.read_bytes() == (tmp_path / "ours.safetensors").read_bytes()
    assert not list(tmp_path.rglob(".*"))


def test_metadata_is_kept(sources, tmp_path):
    convert(sources / "transformer.safetensors", tmp_path / "x.safetensors", "--to", "diffusers")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"author": "somebody", "format": "pt"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_dtypes(sources, tmp_path, dtype):
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    convert(sources / "transformer.safetensors", tmp_path / "x.safetensors", "--to", "canonical", "--dtype", dtype)
    source = load_file(sources / "transformer.safetensors")
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        exact = name == "pos_frequencies" or "_norm_" in name
        assert tensor.dtype == (source[name].dtype if exact and dtype != "fp32" else torch_dtype), name
        assert torch.equal(tensor, source[name].to(tensor.dtype)), name


def test_halves_are_joined_and_parts_are_taken_out(sources, tmp_path):
    convert(sources / "encoder.safetensors", sources / "decoder.safetensors", tmp_path / "vae", "--to", "diffusers")
    convert(sources / "all.safetensors", tmp_path / "v.safetensors", "--to", "canonical", "--part", "vae")
    assert load_vae(tmp_path / "vae").state_dict().keys() == load_file(tmp_path / "v.safetensors").keys()
    convert(sources / "all.safetensors", tmp_path / "t.safetensors", "--to", "canonical", "--part", "transformer")
    assert load_transformer(tmp_path / "t.safetensors").config == DIT


def test_diffusers_loads_what_convert_writes(sources, tmp_path):
    from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

    for part, peer in (("transformer", MochiTransformer3DModel), ("vae", AutoencoderKLMochi)):
        folder = tmp_path / part
        convert(sources / f"{part}.safetensors", folder, "--to", "diffusers")
        loaded, info = peer.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        stored = load_file(folder / "diffusion_pytorch_model.safetensors")
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, stored[name].to(tensor.dtype)), name


def test_diffusers_loads_a_canonical_single_file(tmp_path):
    """diffusers' single-file loader only supports 48 blocks."""
    from diffusers import MochiTransformer3DModel

    config = AsymmDiTConfig(
        depth=48, hidden_size_x=96, hidden_size_y=96, num_heads=3, text_width=64, mlp_size_x=256, mlp_size_y=256
    )
    save_file(random_dit(config).state_dict(), tmp_path / "dit.safetensors")
    convert(tmp_path / "dit.safetensors", tmp_path / "folder", "--to", "diffusers")
    convert(tmp_path / "folder", tmp_path / "canonical.safetensors", "--to", "canonical")
    single = MochiTransformer3DModel.from_single_file(
        tmp_path / "canonical.safetensors", config=str(tmp_path / "folder"), local_files_only=True
    )
    expected = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert single.state_dict().keys() == expected.keys()
    for name, tensor in single.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_fp8_scaled(sources, tmp_path):
    path = tmp_path / "fp8.safetensors"
    convert(sources / "transformer.safetensors", path, "--to", "canonical", "--dtype", "fp8_scaled")
    source, stored = load_file(sources / "transformer.safetensors"), load_file(path)
    for name, tensor in source.items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            values, scale = quantize_fp8(tensor)
            layer = name.removesuffix("weight")
            assert torch.equal(stored[name].view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(stored[layer + "weight_scale"], scale)
            assert json.loads(bytes(stored[layer + "comfy_quant"].tolist())) == {"format": "float8_e4m3fn"}
        else:
            assert torch.equal(stored[name], tensor), name
    inputs = torch.randn(1, 12, 2, 4, 4), torch.tensor([0.5]), torch.randn(1, 3, DIT.text_width), torch.ones(1, 3) > 0
    convert(path, tmp_path / "wide.safetensors", "--to", "canonical", "--dtype", "fp32")
    ours, upcast = (load_transformer(p, torch.float32)(*inputs) for p in (path, tmp_path / "wide.safetensors"))
    torch.testing.assert_close(ours, upcast, rtol=1e-4, atol=1e-4)


def test_refusals(sources, tmp_path, capsys):
    source, destination = sources / "transformer.safetensors", tmp_path / "x.safetensors"
    destination.write_text("mine")
    run = ("convert", source, destination, "--to", "canonical")
    assert "already exists" in refused(capsys, *run)
    assert destination.read_text() == "mine"
    assert "must end in .safetensors" in refused(capsys, "convert", source, tmp_path / "new", "--to", "canonical")
    for to in ("diffusers", "canonical"):
        message = refused(
            capsys,
            "convert",
            sources / "vae.safetensors",
            tmp_path / "v.safetensors",
            "--to",
            to,
            "--dtype",
            "fp8_scaled",
        )
        assert "Scaled fp8 is for a transformer" in message
    assert "--part" in refused(
        capsys, "convert", sources / "all.safetensors", tmp_path / "y.safetensors", "--to", "diffusers"
    )
    assert "both halves" in refused(
        capsys, "convert", sources / "decoder.safetensors", tmp_path / "d", "--to", "diffusers"
    )
    assert "There is no file" in refused(capsys, "convert", "gone.safetensors", tmp_path / "g", "--to", "diffusers")
    convert(*run[1:], "--dtype", "fp8_scaled", "--force")
    assert "with --dtype" in refused(capsys, "convert", destination, tmp_path / "k.safetensors", "--to", "canonical")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_half_given_twice_is_refused(sources, tmp_path, capsys):
    half = sources / "decoder.safetensors"
    assert "both hold" in refused(capsys, "convert", half, half, tmp_path / "x.safetensors", "--to", "canonical")


def test_folders_are_made_and_never_taken_for_files(sources, tmp_path, capsys):
    source, folder, text = sources / "transformer.safetensors", tmp_path / "x.safetensors", tmp_path / "text"
    folder.mkdir()
    text.write_text("mine")
    assert "is not a file" in refused(capsys, "convert", source, folder, "--to", "canonical", "--force")
    assert "is not a folder" in refused(capsys, "convert", source, text, "--to", "diffusers", "--force")
    convert(source, tmp_path / "new" / "one" / "x.safetensors", "--to", "canonical")
    assert load_transformer(tmp_path / "new" / "one").config == DIT


def test_a_conversion_that_fails_leaves_nothing(sources, tmp_path, capsys):
    tensors = load_file(sources / "transformer.safetensors")
    tensors["blocks.2.attn.proj_x.bias"][3] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    for destination in ("x.safetensors", "folder", "new/folder"):
        run = ("convert", tmp_path / "nan.safetensors", tmp_path / destination, "--to", "diffusers")
        assert "nan.safetensors has NaN or infinite values in blocks.2.attn.proj_x.bias" in refused(capsys, *run)
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


@pytest.mark.parametrize("name", ["x.safetensors", "folder"])
def test_of_two_conversions_to_one_place_the_first_stays(sources, tmp_path, name):
    source, destination = sources / "vae.safetensors", tmp_path / "new" / name
    slow = plan_conversion([source], "diffusers", "fp32")

    def overtake():
        if not destination.exists() or not list(destination.parent.rglob("*.safetensors")):
            convert(source, destination, "--to", "diffusers", "--force")

    with pytest.raises(
        FileExistsError, match=r"has meanwhile been written by another program, and is kept; choose another name\.$"
    ):
        write_conversion(slow, destination, overtake, overwrite=False)
    convert(source, tmp_path / "alone" / name, "--to", "diffusers")
    alone = {path.name: path.read_bytes() for path in (tmp_path / "alone").rglob("*") if path.is_file()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()} == alone


def test_inspect(sources, tmp_path, capsys):
    assert main(["inspect", str(sources / "transformer.safetensors")]) == 0
    text = capsys.readouterr().out
    for line in (
        "a Mochi transformer, 3 blocks",
        "depth = 3",
        "complete",
        "float32: 1 tensors",
        "author: somebody",
    ):
        assert line in text
    tensors = load_file(sources / "transformer.safetensors")
    del tensors["blocks.1.mod_x.bias"]
    tensors |= {"surprise": torch.zeros(1), "t5_yproj.bias": torch.zeros(3)}
    save_file(tensors, tmp_path / "odd.safetensors")
    assert main(["inspect", "--json", str(tmp_path / "odd.safetensors")]) == 0
    part = json.loads(capsys.readouterr().out)["parts"]["transformer"]
    assert part["missing"] == ["blocks.1.mod_x.bias"]
    assert part["unexpected"] == ["surprise"]
    assert part["misshapen"] == ["t5_yproj.bias is (3,) instead of (96,)"]
    del tensors["pos_frequencies"]
    save_file(tensors, tmp_path / "odd.safetensors")
    assert main(["inspect", str(tmp_path / "odd.safetensors")]) == 0
    assert "it lacks pos_frequencies" in capsys.readouterr().out


def test_inspect_released_sizes(tmp_path, capsys):
    for name, module in (("dit", AsymmDiT(device="meta")), ("vae", AsymmVAE(device="meta"))):
        write_sparse(tmp_path / f"{name}.safetensors", module.bfloat16().state_dict())
        assert main(["inspect", str(tmp_path / f"{name}.safetensors")]) == 0
        text = capsys.readouterr().out
        assert "sizes of the released model" in text
        assert "complete" in text


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("layout", ["canonical", "diffusers"])
def test_a_full_size_file_opens_at_once_and_takes_no_memory(tmp_path, layout):
    with torch.device("meta"):
        tensors = AsymmDiT().state_dict()
    if layout == "diffusers":
        tensors = {
            n: torch.empty(t.shape, device="meta")
            for n, t in to_diffusers(from_state_dict(tensors), transformer_rules(48)).items()
        }
    path = write_sparse(tmp_path / "full.safetensors", tensors)
    assert path.stat().st_size > 20e9
    code = """
tensors, peak, seconds = peak_of(lambda: open_whole(sys.argv[1]))
largest = tensors["blocks.47.mlp_x.w1.weight"]
value, read_peak, _ = peak_of(lambda: tensors["blocks.47.mlp_x.w1.weight"].read())
print(f'{{"peak": {peak}, "seconds": {seconds}, "read": {read_peak}, "size": {value.nbytes}}}')
"""
    found = in_a_process(code, path)
    assert found["peak"] < 200e6
    # A mapped tensor takes no memory, a converted one only its own size.
    assert found["read"] < (50e6 if layout == "canonical" else found["size"] + 50e6)


# A real layout of many equal blocks: 310 MB in bf16, the largest tensor 13 MB.
MANY = AsymmDiTConfig(
    depth=12, hidden_size_x=768, hidden_size_y=384, num_heads=6, text_width=512, mlp_size_x=2048, mlp_size_y=1024
)


@pytest.mark.slow
@needs_proc
def test_loading_and_converting_never_hold_a_second_copy(tmp_path):
    dit = AsymmDiT(MANY, dtype=torch.bfloat16).requires_grad_(False)
    dit.pos_frequencies.zero_()
    state, size = dit.state_dict(), sum(p.nbytes for p in dit.parameters())
    save_file(state, tmp_path / "canonical.safetensors")
    convert(tmp_path / "canonical.safetensors", tmp_path / "diffusers.safetensors", "--to", "diffusers")
    code = """
load_transformer(sys.argv[1]), load_transformer(sys.argv[2])  # libraries and threads are there
result = {}
for path in sys.argv[1:]:
    model, result["load " + path], _ = peak_of(lambda: load_transformer(path))
    del model
    model, result["cast " + path], _ = peak_of(lambda: load_transformer(path, torch.float32))
    del model
    plan = plan_conversion([Path(path)], "canonical", "fp8_scaled")
    _, result["convert " + path], _ = peak_of(lambda: write_conversion(plan, Path(path).with_name("out.safetensors")))
print(json.dumps(result))
"""
    paths = [str(tmp_path / f"{layout}.safetensors") for layout in ("canonical", "diffusers")]
    found, few_tensors = in_a_process(code, *paths), 40e6
    for path in paths:
        # In its own dtype, the original layout stays memory-mapped; from diffusers' layout, half of the weights are merged.
        assert found[f"load {path}"] < (1e6 if path == paths[0] else 0.6 * size)
        # To another dtype, as to a device: the new tensors, plus a few at a time.
        assert 2 * size <= found[f"cast {path}"] < 2 * size + few_tensors
        assert found[f"convert {path}"] < few_tensors
