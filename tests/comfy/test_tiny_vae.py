"""TAEM1 in ComfyUI: Load Mochi VAE recognises it, the host's decode equals the core's, and previews use it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core.autoencoder.tiny import TinyDecoder
from tests.harness.comfy_process import run_in_comfyui

SCRIPT = """
import logging
from pathlib import Path
import folder_paths
from comfy.cli_args import LatentPreviewMethod
from pack.nodes.bridge import preview
from pack.nodes.bridge.preview import MochiLatents, Previewer, tiny_decoder
from pack.nodes.loaders import LoadVAE

logging.basicConfig(level=logging.INFO, force=True)
folder, inputs, result = arguments
folder_paths.add_model_folder_path("vae", folder)
folder_paths.add_model_folder_path("vae_approx", folder)
latents, out = load_file(inputs)["latents"], {}
(vae,) = LoadVAE.execute("taem1.safetensors", "fp32").result
out["frames"] = vae.decode(latents)
out["tiled"] = vae.decode_tiled(latents)
try:
    vae.encode(torch.zeros(1, 16, 16, 3))
except ValueError as error:
    print("REFUSED", error)
assert tiny_decoder(torch.device("cpu")) is None
args.preview_method = LatentPreviewMethod.TAESD
shown = []
comfy.utils.set_progress_bar_global_hook(lambda value, total, image, **_: shown.append(image))
previewer = Previewer(MochiLatents(), tiny_decoder(torch.device("cpu")))
previewer.show(0, MochiLatents().process_in(latents), 4)
from io import BytesIO
from PIL import Image
image = Image.open(BytesIO(shown[-1][1].content))
print("PREVIEW", image.n_frames, *image.size)
def full(*_):
    raise torch.OutOfMemoryError("Out of memory.")

one, two = (vae.memory_used_decode((batch, 12, 3, 4, 6), None) for batch in (1, 2))
print("ESTIMATE", two - one)
previewer.decoder.last_frames = full
for step in (1, 2):
    previewer.started = 0
    previewer.show(step, MochiLatents().process_in(latents), 4)
    print("SHOWN", len(shown), *Image.open(BytesIO(shown[-1][1].content)).size)
preview.AnimatedPreview = full
for step in (2, 3):
    previewer.started = 0
    previewer.show(step, MochiLatents().process_in(latents), 4)
Path(folder, "taem1.safetensors").write_bytes(b"no file")
assert tiny_decoder(torch.device("cpu")) is None
save_file({name: tensor.contiguous() for name, tensor in out.items()}, result)
"""


@pytest.fixture(scope="module")
def done(comfy_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae_approx")
    torch.manual_seed(0)
    decoder = TinyDecoder()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2)  # otherwise all frames look alike, and WebP merges them
    save_file(decoder.state_dict(), folder / "taem1.safetensors")
    latents = torch.randn(1, 12, 3, 4, 6)
    save_file({"latents": latents}, folder.parent / "in.safetensors")
    run = run_in_comfyui(
        comfy_path, SCRIPT, folder, folder.parent / "in.safetensors", folder.parent / "out.safetensors"
    )
    return run, load_file(folder.parent / "out.safetensors"), decoder.eval().decode(latents)


def test_the_hosts_decode_is_the_cores(done):
    run, out, expected = done
    frames = expected[0].permute(1, 2, 3, 0).clamp(0, 1)
    assert frames.shape == (13, 32, 48, 3)
    for name in ("frames", "tiled"):
        torch.testing.assert_close(out[name].reshape(frames.shape), frames, rtol=1e-4, atol=1e-4)
    assert "TAEM1, whose videos are previews of what Mochi's autoencoder makes" in run.stderr


def test_it_does_not_encode(done):
    assert "REFUSED The tiny autoencoder only decodes; load mochi_vae.safetensors" in done[0].stdout


def test_previews_are_decoded_and_a_broken_file_is_no_end(done):
    assert "PREVIEW 3 120 80" in done[0].stdout
    assert "The linear fit is shown." in done[0].stderr


def test_without_memory_previews_are_simpler_and_then_none(done):
    assert "SHOWN 1 120 80\nSHOWN 2 126 84\n" in done[0].stdout
    said = [line.partition("Mochi preview: ")[2] for line in done[0].stderr.splitlines() if "Out of memory" in line]
    assert said == ["Out of memory. The linear fit is shown.", "Out of memory. There will be no more in this run."]


def test_the_estimate_counts_all_videos_of_a_batch(done):
    assert f"ESTIMATE {4 * 3 * 13 * 32 * 48}\n" in done[0].stdout
