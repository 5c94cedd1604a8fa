"""The report about a machine: complete, short, never an error, and right about what models need."""

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mochi_core import AsymmDiT, AsymmDiTConfig, AsymmVAE
from mochi_core.__main__ import main
from mochi_core.autoencoder.plan import GIB
from mochi_core.checkpoints import Checkpoint, from_state_dict, load_transformer, open_part
from mochi_core.checkpoints.convert import plan_conversion, write_conversion
from mochi_core.doctor import checks, examine, machine, needs, render, report
from mochi_core.doctor.attempt import compared
from mochi_core.doctor.forecast import denoising_bytes, memory_sentence
from mochi_core.geometry import VideoSize
from mochi_core.quantization.weights import QUANTIZERS
from mochi_core.transformer.attention import BACKENDS
from mochi_core.transformer.memory import modulation_bytes, working_bytes
from tests.harness.tiny_models import random_dit

ROOT = Path(__file__).parents[2]
MODELS = [
    ROOT / "models" / name
    for name in (
        "diffusion_models/mochi_tiny.safetensors",
        "vae/mochi_tiny_vae.safetensors",
        "text_encoders/t5_tiny.safetensors",
    )
]
CPU = torch.device("cpu")
PLAIN = {"chosen": "plain", "reason": None}


@pytest.fixture(scope="module")
def found():
    return examine("cpu", MODELS)


def lines_about(text, start):
    return [line for line in text.splitlines() if line.strip().startswith(start)]


def test_two_screens_name_every_probe_and_every_file(found):
    text = render(found)
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100
    for name in ("mochi-nodes 0.1.0", f"torch {torch.__version__}", "Python 3", "triton", "driver: ", "device cpu: "):
        assert name in text
    first_words = {line.split()[0].rstrip(":") for line in lines}
    assert first_words >= {"kernels", "denoiser", "decoder", "auto", *BACKENDS, *QUANTIZERS}
    for model in MODELS:
        assert len(lines_about(text, f"file {model.name}: a ")) == 1


def test_what_works_on_a_cpu_and_why_the_rest_does_not(found):
    assert {name for name, one in found["attention"].items() if one.get("works")} == {"flash", "math"}
    assert found["attention"]["auto"] == {"chosen": "sdpa", "reason": "PyTorch's own on cpu"}
    assert found["attention"]["cudnn"]["reason"] == "it runs on cuda, not on cpu"
    assert found["attention"]["sage"]["reason"] == "the package sageattention is not installed"
    ran = [*found["networks"].values(), *found["products"].values(), found["attention"]["math"]]
    assert all(one["ok"] and 1e-4 < one["error"] < 0.05 for one in ran)
    assert found["kernels"]["chosen"] == "plain"
    assert found["kernels"]["reason"]


def test_the_last_line_is_the_verdict(found):
    assert render(found).splitlines()[-1] == 'Nothing failed; "no" marks alternatives that are not available here.'
    wrong = {**found["networks"], "denoiser": {"works": True, "ok": False, "error": 0.5}}
    assert render({**found, "networks": wrong}).endswith("\n1 check has FAILED: networks denoiser")


def test_convolutions_that_pytorch_takes_from_cudnn_are_named(monkeypatch, found):
    assert lines_about(render(found), "convolutions: in three dimensions")
    monkeypatch.setattr(checks, "unfolds_conv3d", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    text = " ".join(render({**found, "convolutions": checks.convolutions(CPU)}).split())
    said = f"for 3D convolutions, PyTorch {torch.__version__} copies every value 27 times instead of using cuDNN 91002"
    assert f"convolutions: frame by frame, because {said}" in text


def test_the_command_prints_the_report_and_json_of_it(capsys, found, monkeypatch):
    # Free memory changes from moment to moment.
    monkeypatch.setattr("mochi_core.commands.examine", lambda device, files: examined.append((device, files)) or found)
    examined = []
    assert main(["doctor", "--device", "cpu", *map(str, MODELS)]) == 0
    assert capsys.readouterr().out == render(found) + "\n"
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert examined == [("cpu", MODELS), ("cpu", [])]
    found = {**found, "system": {"problem": "it hides"}}
    assert main(["doctor", "--device", "cpu"]) == 1, "a check has failed"


def test_tiny_models_are_recognised_with_their_needs(found):
    transformer, vae, t5 = found["files"]
    assert transformer["is"].startswith("a Mochi transformer, 6 blocks")
    held = sum(p.nbytes for p in load_transformer(MODELS[0]).parameters())
    assert held == pytest.approx(transformer["transformer"]["weights"]["resident"], rel=0.001)
    assert list(transformer["transformer"]["frames"]) == ["25", "85", "163"]
    assert {one["plan"] for one in transformer["transformer"]["frames"].values()} == {"resident"}
    assert vae["vae"]["video_bytes"]["163"] == 3 * 163 * 480 * 848 * 2
    assert vae["vae"]["decode"]["caches_on"] == "cpu"
    assert vae["vae"]["decode"]["least_bytes"] < vae["vae"]["decode"]["working_bytes"]
    assert t5["t5"]["weights_fp32"] == 2 * t5["t5"]["weights"]


def released(dtype=torch.bfloat16):
    tensors = dict(AsymmDiT(AsymmDiTConfig(), device="meta", dtype=dtype).named_parameters())
    return Checkpoint("released.safetensors", Path(), from_state_dict(tensors))


def test_bytes_of_the_released_transformer_are_those_of_the_documentation():
    weights = needs.offload_bytes(released().tensors)
    assert weights == needs.offload_bytes(released(torch.float32).tensors)  # loaded in bf16 in any case
    gigabytes = {name: round(count / 1e9, 2) for name, count in weights.items()}
    assert gigabytes == {"resident": 20.06, "offload=True": 14.65, 'offload="stream"': 0.8}


def test_bytes_of_weights_that_are_quantised_while_they_are_loaded():
    """The documentation's figures, plus the scales."""
    file = released()
    gigabytes = {kind: round(needs.loaded_bytes(file, 2, kind) / 1e9, 2) for kind in QUANTIZERS}
    assert gigabytes == {"fp8": 10.13, "fp8_rowwise": 12.84, "int8": 10.14, "q4_0": 5.78}


@pytest.mark.parametrize("kind", [None, *QUANTIZERS])
def test_loaded_bytes_are_those_that_are_loaded(kind):
    dit = load_transformer(MODELS[0], torch.bfloat16, quantize=kind)
    held = sum(tensor.nbytes for tensor in (*dit.parameters(), *dit.buffers()))
    assert needs.loaded_bytes(open_part(MODELS[0], "transformer"), 2, kind) == pytest.approx(held, rel=0.01)


def test_a_run_is_forecast_in_one_sentence():
    size, config = VideoSize(), AsymmDiTConfig()
    working = denoising_bytes(config, size, 1, None, 2)
    assert working == working_bytes(config, 44_520, 2, 1) + modulation_bytes(config, 64, 2)
    assert denoising_bytes(config, size, 1, 16, 2) == denoising_bytes(config, VideoSize(num_frames=91), 1, None, 2)
    assert denoising_bytes(config, size, 2, None, 2) > 1.8 * working
    weights = 20_055_467_768
    on_24 = memory_sentence(working, weights, 24 * GIB, "cuda:0")
    assert on_24 == "about 2.1 GiB to sample, plus 18.7 GiB of weights; cuda:0 has 24.0 GiB"
    on_12 = memory_sentence(working, weights, 12 * GIB, "cuda:0")
    assert on_12.endswith("cuda:0 has 12.0 GiB: weights that do not fit are transferred at every step")
    too_little = "not enough; make the video smaller or shorter"
    assert memory_sentence(working, weights, 2 * GIB, "cuda:0").endswith(too_little)
    assert memory_sentence(working, weights, 12 * GIB, "cpu").endswith(too_little)
    unknown = memory_sentence(10 * 2**20, None, 2 * GIB, "cpu")
    assert unknown == "about 10 MiB to sample, plus the weights; cpu has 2.0 GiB"


PLANS = [(48, "resident"), (20, "offload=True"), (16.5, "offload=True"), (15, 'offload="stream"'), (2.5, None)]


@pytest.mark.parametrize(("free", "plan"), PLANS)
def test_the_first_way_that_fits_is_the_plan(monkeypatch, free, plan):
    monkeypatch.setattr(needs, "free_memory", lambda _: int(free * GIB))
    found = needs.transformer_needs(released(), torch.device("cuda"))
    assert found["frames"]["163"]["plan"] == plan
    on_cpu = needs.transformer_needs(released(), CPU)
    assert on_cpu["frames"]["163"]["plan"] == ("resident" if plan == "resident" else None)


def test_a_decode_is_planned_for_the_device(monkeypatch):
    vae = AsymmVAE(device="meta", dtype=torch.bfloat16)
    whole = Checkpoint("vae", Path(), from_state_dict(dict(vae.named_parameters())))
    cuda, plans = torch.device("cuda"), {}
    for free in (24, 3):
        monkeypatch.setattr(needs, "free_memory", lambda _, free=free: free * GIB)
        plans[free] = needs.vae_needs(whole, cuda)["decode"]
    assert (plans[24]["caches_on"], plans[3]["caches_on"]) == ("cuda", "cpu")
    assert plans[24]["working_bytes"] < 24 * GIB
    assert plans[3]["working_bytes"] <= 3 * GIB
    encoder = whole.with_tensors({n: t for n, t in whole.tensors.items() if n.startswith("encoder.")})
    assert "decode" not in needs.vae_needs(encoder, cuda)


def test_quantised_weights_are_counted_as_they_are_held(tmp_path):
    save_file(random_dit(dtype=torch.bfloat16).state_dict(), tmp_path / "dit.safetensors")
    scaled = tmp_path / "scaled.safetensors"
    write_conversion(plan_conversion([tmp_path / "dit.safetensors"], "canonical", "fp8_scaled"), scaled)
    loaded = load_transformer(scaled)
    held = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    counted = needs.offload_bytes(open_part(scaled, "transformer").tensors)["resident"]
    assert counted == pytest.approx(held, rel=0.005)


def measured():
    """(frames, tokens, MiB of one forward, MiB of a guided pair) from the committed results."""
    page = (ROOT / "benchmarks" / "results" / "memory_cpu.md").read_text(encoding="utf-8")
    return [tuple(map(int, row)) for row in re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", page, re.M)]


@pytest.mark.parametrize(("frames", "tokens", "one", "pair"), measured())
def test_working_memory_is_that_of_the_committed_measurement_or_a_little_more(frames, tokens, one, pair):
    assert VideoSize(num_frames=frames).num_tokens == tokens
    for conditions, mebibytes in ((1, one), (2, pair)):
        counted = working_bytes(AsymmDiTConfig(), tokens, 2, conditions) / 2**20
        assert mebibytes <= counted < 1.15 * mebibytes


def test_prepared_modulation_is_counted_as_it_is():
    dit = random_dit()
    modulation = dit.schedule_modulation(torch.rand(5), torch.zeros(1, dit.config.hidden_size_x)).levels
    tensors = [modulation.final, *(tensor for pair in modulation.blocks for tensor in pair)]
    assert modulation_bytes(dit.config, 5, 4, conditions=1) == sum(tensor.nbytes for tensor in tensors)
    assert modulation_bytes(dit.config, 5, 4) == 2 * sum(tensor.nbytes for tensor in tensors)


def broken(*_):
    raise RuntimeError("no such\n  thing")


@pytest.mark.parametrize("name", [*report.MACHINE, *report.CHECKS])
def test_a_broken_probe_becomes_a_line_and_the_rest_stays(monkeypatch, name):
    quiet = {probe: lambda *_: {} for probe in (*report.MACHINE, *report.CHECKS)}
    chosen = dict.fromkeys(("kernels", "convolutions"), lambda *_: PLAIN)
    quiet |= {"devices": lambda *_: [], **chosen, name: broken}
    for table in ("MACHINE", "CHECKS"):
        monkeypatch.setattr(report, table, {probe: quiet[probe] for probe in getattr(report, table)})
    report_of_it = examine("cpu", [ROOT / "none.safetensors"])
    assert report_of_it[name] == {"problem": "RuntimeError: no such thing"}
    text = render(report_of_it)
    assert lines_about(text, f"{name}: could not be determined: RuntimeError: no such thing")
    assert lines_about(text, "file none.safetensors: There is no file none.safetensors; check the name.")
    assert text.count("could not be determined") == 1
    assert text.endswith(f"\n2 checks have FAILED: {name}, file none.safetensors")


def test_a_part_of_a_probe_that_breaks_is_a_line_of_its_own(monkeypatch):
    monkeypatch.setattr(machine, "_describe", broken)
    monkeypatch.setattr(checks, "_backend", broken)
    monkeypatch.setattr(checks, "_decoder", broken)
    monkeypatch.setattr(machine, "_own_version", broken)
    text = render(examine("cpu"))
    assert "device cpu: could not be determined: RuntimeError: no such thing" in text
    assert text.count("FAILED: RuntimeError: no such thing") == len(BACKENDS) + 1
    assert lines_about(text, "denoiser     ok, ")
    assert lines_about(text, f"{len(BACKENDS) + 2} checks have FAILED: device cpu, networks decoder, attention ")
    assert lines_about(text, "versions: mochi-nodes unknown (RuntimeError: no such thing)")
    assert f"torch {torch.__version__}" in " ".join(text.split())


def test_folders_with_names_of_people_are_not_told(monkeypatch):
    def told(*_):
        raise PermissionError(f"[Errno 13] Permission denied: '{Path.home()}/.triton/cache'; see {ROOT}/dev.py")

    monkeypatch.setattr(report, "CHECKS", {"kernels": told})
    found = examine("cpu", ["/somebody/secret/m.safetensors"])
    assert str(Path.home()) not in (said := json.dumps(found))
    assert "somebody" not in said
    assert found["kernels"]["problem"] == "[Errno 13] Permission denied: '~/.triton/cache'; see <pack>/dev.py"


def test_a_home_that_is_everything_is_no_name_of_a_person(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(report, "CHECKS", {"kernels": lambda _: {"problem": "see https://example.org/a/b"}})
    assert examine("cpu")["kernels"]["problem"] == "see https://example.org/a/b"


def test_a_device_that_does_not_exist_leaves_the_machine_to_be_told():
    text = render(examine("nonsense", MODELS[:1]))
    assert lines_about(text, "versions: mochi-nodes 0.1.0")
    assert lines_about(text, "attention: could not be determined: RuntimeError: ")
    assert lines_about(text, "file mochi_tiny.safetensors: RuntimeError: ")


@pytest.fixture
def only_files(monkeypatch):
    """Make the report inspect only the files."""
    for table in ("MACHINE", "CHECKS"):
        monkeypatch.setattr(report, table, {})


@pytest.mark.usefixtures("only_files")
def test_bad_and_foreign_files_get_their_sentence(tmp_path):
    (tmp_path / "page.safetensors").write_text("<html>")
    save_file({"double_blocks.0.img_attn.q": torch.zeros(1)}, tmp_path / "flux.safetensors")
    state = random_dit().state_dict()
    del state["blocks.1.attn.qkv_x.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    names = ("page", "flux", "cut")
    lines = render({**EMPTY, "files": examine("cpu", [tmp_path / f"{name}.safetensors" for name in names])["files"]})
    assert "file page.safetensors: page.safetensors is not a safetensors file but a web page; download" in lines
    assert "file flux.safetensors: a FLUX transformer; not a Mochi model" in lines
    assert "  transformer: cut.safetensors does not fit the model: 1 missing" in lines


EMPTY = {
    "device": "cpu", "versions": {}, "system": "", "driver": "", "devices": [], "networks": {}, "attention": {},
    "products": {}, "kernels": PLAIN, "convolutions": PLAIN, "files": [],
}  # fmt: skip


@pytest.mark.usefixtures("only_files")
def test_names_are_fit_to_be_shown_and_folders_are_not():
    name = "a\x1b[2J\nb\u202ec\udc80.safetensors"
    found = examine("cpu", [f"/home/somebody/{name}"])["files"]
    assert found[0]["file"] == name
    text = render({**EMPTY, "files": [{"file": name, "is": "a Mochi transformer"}]})
    assert r"file a\x1b[2J\nb\u202ec\udc80.safetensors: a Mochi transformer" in text
    assert "somebody" not in text
    json.dumps(found).encode("ascii")


def test_long_findings_are_cut_in_text_and_many_devices_counted():
    reason = "because " * 100
    device = {"device": "cuda:0", "name": "a GPU, sm_90", "total_bytes": 80 * GIB, "free_bytes": 79.5 * GIB}
    found = {**EMPTY, "attention": {"fa3": {"works": False, "reason": reason}}, "devices": [device] * 11}
    lines = render(found).splitlines()
    assert len(lines_about("\n".join(lines), "device cuda:0: a GPU, sm_90, 80.0 GiB, 79.5 free")) == 8
    assert "and 3 more devices" in lines
    told = [line for line in lines if "because" in line]
    assert len(told) == 2
    assert told[-1].endswith(" ...")


def test_errors_are_largest_ones_and_a_wrong_result_fails():
    exact = torch.tensor([4.0, -8.0, 0.5])
    assert compared(exact + torch.tensor([0.0, 0.4, -0.2]), exact, 0.06)["error"] == pytest.approx(0.05)
    assert compared(exact * 1.01, exact, 0.02)["ok"]
    assert not compared(exact * 1.01, exact, 0.005)["ok"]
    assert not compared(exact * torch.nan, exact, 0.5)["ok"]
    text = render({**EMPTY, "attention": {"flash": compared(exact * 1.5, exact, 0.02)}})
    assert "flash        FAILED, largest error 50.00%" in text


def test_wrong_arithmetic_is_noticed(monkeypatch):
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: plain(q, k, v * 1.2))
    monkeypatch.setattr(checks, "sdpa", plain)
    found = checks.attention(CPU)
    assert not found["flash"]["ok"]
    assert not found["math"]["ok"]
    monkeypatch.setattr("mochi_core.quantization.weights.QuantizedLinear.forward", lambda _, x: x @ x.mT)
    assert all("problem" in one or not one["ok"] for one in checks.products(CPU).values())


def test_products_in_fp8_that_a_device_refuses_come_with_the_reason(monkeypatch):
    monkeypatch.setattr(checks, "fp8_unsupported_reason", lambda device: f"{device} is too old")
    found = checks.products(CPU)
    assert found["fp8_rowwise"] == {"works": False, "reason": "weights are dequantized instead: cpu is too old"}
    assert found["int8"]["ok"]


def test_versions_of_the_host_and_of_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfyui_version", type("Host", (), {"__version__": "9.8.7"}))
    monkeypatch.setattr(machine.importlib.metadata, "packages_distributions", lambda: {"triton": ["torch"]})
    found = machine.versions()
    assert found["ComfyUI"] == "9.8.7"
    assert found["triton"] == importlib.metadata.version("torch")
    assert found["sageattention"] == "not installed"
    assert "not installed: flash_attn, flash_attn_interface, sageattention" in render({**EMPTY, "versions": found})


def test_drivers_version_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(machine, "_answer", lambda *command: asked.append(command) or "570.1\n570.1")
    assert machine.driver() == "NVIDIA 570.1"
    assert asked[0][0] == "nvidia-smi"


@pytest.mark.parametrize(("chosen", "asked"), [("cuda", [1]), ("cuda:0", [0]), ("cpu", [])])
def test_only_the_chosen_card_is_asked_what_is_free(monkeypatch, chosen, asked):
    """Each of the others would get a CUDA context of hundreds of MiB."""
    properties = SimpleNamespace(name="Card", major=9, minor=0, total_memory=80 * GIB)
    questions = []
    simulated = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 1,
        "get_device_properties": lambda _: properties,
        "memory_reserved": lambda _: 0,
        "memory_allocated": lambda _: 0,
        "mem_get_info": lambda device: questions.append(device.index) or (70 * GIB, 80 * GIB),
    }
    for name, function in simulated.items():
        monkeypatch.setattr(torch.cuda, name, function)
    cards = machine.devices(torch.device(chosen))[:2]
    assert questions == asked
    assert [card["free_bytes"] is not None for card in cards] == [i in asked for i in range(2)]
