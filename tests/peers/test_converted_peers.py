"""Files written by `convert`, in ComfyUI's own class (which only accepts the released width)."""

import torch
from safetensors.torch import load_file, save_file

from mochi_core import AsymmDiTConfig, load_transformer
from mochi_core.__main__ import main
from tests.harness.numbers import relative_error
from tests.harness.peers import comfy_class, from_comfyui, inputs, prefix_mask
from tests.harness.tiny_models import cast, random_dit

CONFIG = AsymmDiTConfig(depth=1)


def test_comfyuis_class_computes_the_same_from_converted_files(comfyui, tmp_path):  # noqa: ARG001
    import comfy.ops

    plain, fp8 = tmp_path / "plain.safetensors", tmp_path / "fp8.safetensors"
    save_file(cast(random_dit(CONFIG).state_dict(), torch.bfloat16), tmp_path / "source.safetensors")
    for source, destination, *options in (
        (tmp_path / "source.safetensors", tmp_path / "folder", "--to", "diffusers"),
        (tmp_path / "folder", plain, "--to", "canonical"),
        (tmp_path / "folder", fp8, "--to", "canonical", "--dtype", "fp8_scaled"),
    ):
        assert main(["convert", str(source), str(destination), *options]) == 0
    latents, sigma, embeds = inputs(CONFIG.text_width, latent=(2, 8, 8))
    mask = prefix_mask(20)
    operations = {
        plain: comfy.ops.disable_weight_init,
        fp8: comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True),
    }
    results = {}
    for path in (plain, fp8):
        peer = comfy_class(CONFIG, operations[path], torch.float32).eval()
        peer.load_state_dict(load_file(path), strict=True)
        results[path] = from_comfyui(peer, latents, sigma, embeds, mask)
        ours = load_transformer(path, torch.float32)
        assert relative_error(ours(latents, sigma, embeds, mask), results[path]) <= 1e-5
    assert 0.001 < relative_error(results[fp8], results[plain]) < 0.05
