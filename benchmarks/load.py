"""Time and memory of loading a transformer in bf16, ours next to diffusers, ComfyUI's own loader and its class.

ComfyUI's class supports only the released width, and diffusers' single-file loader only 48 blocks; so one model is wide and the
other deep. ComfyUI's loader assumes 48 blocks too, and is told the depth here. On a GPU, the released size comes first; the files
are made in the temporary folder, which then needs 26 GB.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.measure import FASTEST, MEDIAN, MIB, RATIO, compare, page, peak, table, write_report
from benchmarks.peers import DEVICE, empty_comfy_dit, our_dit, use_comfyui
from mochi_core import AsymmDiTConfig, load_transformer
from mochi_core.checkpoints.convert import plan_conversion, write_conversion

WIDE = AsymmDiTConfig(depth=4)
DEEP = AsymmDiTConfig(
    hidden_size_x=768, hidden_size_y=384, num_heads=6, text_width=1024, mlp_size_x=2048, mlp_size_y=1024
)
NOTE = (
    "From a file in the page cache to a model with every weight on the device and read once; median over two "
    "processes of one thread each. `wide` is 4 blocks of the released width (1.8 GB), `deep` 48 blocks of a quarter of it "
    "(1.3 GB). Peak memory is resident main memory, including mapped pages of the file, which the system can drop. Ours "
    "compares every name and shape and looks for NaN; it maps the original layout and merges the diffusers layout tensor by "
    "tensor."
)
ON_DEVICE = (
    [("on the device at the peak, MiB", lambda _case, m, _ours: f"{m.largest('device_mib'):.0f}")]
    if DEVICE == "cuda"
    else []
)


def ours(case: dict):
    one_thread()
    return lambda: touched(load_transformer(case["path"], torch.bfloat16, DEVICE))


def from_pretrained(case: dict):
    from diffusers import MochiTransformer3DModel

    one_thread()
    return lambda: touched(MochiTransformer3DModel.from_pretrained(case["path"], torch_dtype=torch.bfloat16).to(DEVICE))


def from_single_file(case: dict):
    from diffusers import MochiTransformer3DModel

    one_thread()
    options = {"config": case["config"], "local_files_only": True, "torch_dtype": torch.bfloat16}
    return lambda: touched(MochiTransformer3DModel.from_single_file(case["path"], **options).to(DEVICE))


def comfyui(case: dict):
    """Only the essential steps: map the file, build the class, copy the weights."""
    one_thread()
    use_comfyui()
    import comfy.utils

    def load():
        model = empty_comfy_dit(case["depth"], torch.bfloat16)
        model.load_state_dict(comfy.utils.load_torch_file(case["path"]))
        return touched(model)

    return load


def comfyui_loader(case: dict):
    """The whole loader, including detection, model and patcher."""
    one_thread()
    use_comfyui()
    import comfy.model_detection
    import comfy.model_management
    import comfy.sd

    detect = comfy.model_detection.detect_unet_config
    comfy.model_detection.detect_unet_config = lambda *a, **k: {**detect(*a, **k), "depth": case["depth"]}

    def load():
        patcher = comfy.sd.load_diffusion_model(case["path"], {"dtype": torch.bfloat16})
        comfy.model_management.load_models_gpu([patcher], force_full_load=True)
        return touched(patcher.model.diffusion_model)

    return load


def one_thread() -> None:
    """Loading moves memory; more threads mostly add noise."""
    torch.set_num_threads(1)


def touched(module: torch.nn.Module) -> torch.nn.Module:
    """Read every weight once, as the first step of a run would."""
    for parameter in module.parameters():
        parameter.detach().view(torch.int16 if parameter.itemsize == 2 else torch.int32).amax()
    return module


CONTENDERS = {
    "ours": ours,
    "ComfyUI's class": comfyui,
    "ComfyUI's loader": comfyui_loader,
    "diffusers from_pretrained": from_pretrained,
    "diffusers from_single_file": from_single_file,
}


def write_original(folder: Path, name: str, config: AsymmDiTConfig) -> str:
    path = folder / f"{name}.safetensors"
    save_file(our_dit(config, torch.bfloat16, home="cpu").state_dict(), path)
    return str(path)


def write_converted(original: str) -> str:
    """Write the same model as a diffusers folder."""
    folder = Path(original).with_suffix("")
    write_conversion(plan_conversion([Path(original)], "diffusers", "keep"), folder)
    return str(folder)


def measure_all(folder: Path, calls: int) -> list[str]:
    """A table: ours first, then the peers that support the layout."""
    wide, deep = write_original(folder, "wide", WIDE), write_original(folder, "deep", DEEP)
    wide_folder, deep_folder = write_converted(wide), write_converted(deep)
    native = ("ComfyUI's class", "ComfyUI's loader")
    cases = {
        "wide, original layout": ({"path": wide, "depth": WIDE.depth}, *native),
        "wide, diffusers layout": ({"path": wide_folder}, "diffusers from_pretrained"),
        "deep, original layout": ({"path": deep, "config": deep_folder}, "diffusers from_single_file"),
        "deep, diffusers layout": ({"path": deep_folder}, "diffusers from_pretrained"),
    }
    if DEVICE == "cuda":
        released = write_original(folder, "released", AsymmDiTConfig())
        cases = {"released, original layout": ({"path": released, "depth": AsymmDiTConfig().depth}, *native), **cases}
    results = [compare("benchmarks.load", ["ours", *peers], [case], calls)[0] for case, *peers in cases.values()]
    named = [{**case, "name": f"{name}, {megabytes(case['path']):,.0f} MiB"} for name, (case, *_) in cases.items()]
    columns = [MEDIAN, FASTEST, RATIO, peak("what was held before", "host_mib"), *ON_DEVICE]
    return table(lambda case: case["name"], named, results, columns)


def megabytes(path: str) -> float:
    """MiB of a file, or of all files in a folder."""
    files = [Path(path)] if Path(path).is_file() else Path(path).iterdir()
    return sum(file.stat().st_size for file in files) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=3, help="timed calls per process (default: %(default)s)")
    calls = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as folder:
        lines = measure_all(Path(folder), calls)
    write_report("load", page("Loading a transformer", NOTE, *lines))


if __name__ == "__main__":
    main()
