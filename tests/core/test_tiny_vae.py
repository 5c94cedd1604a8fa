"""TAEM1, the tiny autoencoder for previews, against its published code, reimplemented here; its files and related models'."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mochi_core import denormalize_latents, load_vae
from mochi_core.__main__ import main
from mochi_core.autoencoder.tiny import TinyDecoder
from mochi_core.checkpoints import load_tiny_vae

WIDTHS, GROWTHS = (256, 128, 64, 64), (1, 2, 3)


def published_names():
    """Names and shapes of madebyollin/taem1's state_dict, as built by taem1.py."""
    shapes = {}

    def conv(name, into, out, size=3, bias=True):
        shapes[f"{name}.weight"] = (out, into, size, size)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def block(name, width):
        for i in (0, 2, 4):
            conv(f"{name}.conv.{i}", 2 * width if i == 0 else width, width)

    conv("encoder.0", 3, 64)
    at = 2
    for stride in (3, 2, 1):
        conv(f"encoder.{at}.conv", 64 * stride, 64, 1, bias=False)
        conv(f"encoder.{at + 1}", 64, 64, bias=False)
        for i in range(2, 5):
            block(f"encoder.{at + i}", 64)
        at += 5
    conv(f"encoder.{at}", 64, 12)
    conv("decoder.1", 12, WIDTHS[0])
    at = 3
    for width, following, growth in zip(WIDTHS, WIDTHS[1:], GROWTHS, strict=False):
        for i in range(3):
            block(f"decoder.{at + i}", width)
        conv(f"decoder.{at + 4}.conv", width, growth * width, 1, bias=False)
        conv(f"decoder.{at + 5}", width, following, bias=False)
        at += 6
    conv(f"decoder.{at + 1}", WIDTHS[-1], 3)
    return shapes


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (1.5 / max(1, torch.Size(shape[1:]).numel())) ** 0.5
        for name, shape in published_names().items()
    }


@pytest.fixture(scope="module")
def pth(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("taem1") / "taem1.pth"
    torch.save(weights, path)
    return path


def published_decode(weights, latents):
    """DiT-space latents (1, 12, T, H, W) in float64 to (1, 3, F, 8 H, 8 W): all frames at once, every block over a shift."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = torch.tanh(latents[0].double().transpose(0, 1) / 3) * 3  # (T, 12, H, W)
    x = F.relu(F.conv2d(x, w["decoder.1.weight"], w["decoder.1.bias"], padding=1))
    at = 3
    for growth in GROWTHS:
        for i in range(at, at + 3):
            shifted = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[: len(x)]
            y = torch.cat((x, shifted), dim=1)
            for j in (0, 2, 4):
                y = F.conv2d(y, w[f"decoder.{i}.conv.{j}.weight"], w[f"decoder.{i}.conv.{j}.bias"], padding=1)
                y = F.relu(y) if j < 4 else y
            x = F.relu(x + y)
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        grown = F.conv2d(x, w[f"decoder.{at + 4}.conv.weight"])
        x = torch.stack(grown.chunk(growth, dim=1), dim=1).flatten(0, 1)
        x = F.conv2d(x, w[f"decoder.{at + 5}.weight"], padding=1)
        at += 6
    x = F.conv2d(F.relu(x), w[f"decoder.{at + 1}.weight"], w[f"decoder.{at + 1}.bias"], padding=1)
    return x[5:].transpose(0, 1)[None]


@pytest.mark.parametrize("num_latents", [1, 2, 4])
def test_decodes_as_published(weights, pth, num_latents):
    latents = 2 * torch.randn(2, 12, num_latents, 3, 5, generator=torch.Generator().manual_seed(1))
    decoder, seen = load_tiny_vae(pth), []
    video = decoder.decode(denormalize_latents(latents), lambda *done: seen.append(done))
    assert video.shape == decoder.decoded_shape(latents.shape) == (2, 3, 6 * num_latents - 5, 24, 40)
    for one, given in zip(video.split(1), latents.split(1), strict=True):
        expected = published_decode(weights, given)
        assert ((one - expected).norm() / expected.norm()).item() < 1e-5
    assert seen == [(i + 1, 2 * num_latents) for i in range(2 * num_latents)]


def test_last_frames_are_those_of_the_decode_made_one_by_one(pth):
    latents, decoder, seen = (
        torch.randn(1, 12, 3, 3, 5, generator=torch.Generator().manual_seed(3)),
        load_tiny_vae(pth),
        [],
    )
    video = decoder.decode(denormalize_latents(latents))
    decoder.decoder[-1].register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    for count, frame in enumerate(decoder.last_frames(latents[0]), 1):
        torch.testing.assert_close(frame, video[0, :, 6 * (count - 1)], rtol=1e-4, atol=1e-4)
        assert seen == [1] * count
    assert count == 3


def test_counts_are_the_published_ones(weights):
    count = sum(weight.numel() for name, weight in weights.items() if name.startswith("decoder."))
    assert count == sum(parameter.numel() for parameter in TinyDecoder().parameters())
    assert round(count / 1e6, 2) == 9.84


def test_the_shell_converts_and_names_it(pth, weights, tmp_path, capsys):
    out = tmp_path / "taem1.safetensors"
    assert main(["convert", str(pth), str(out), "--to", "canonical", "--dtype", "fp16"]) == 0
    assert load_file(out).keys() == {name for name in weights if name.startswith("decoder.")}
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is"] == "Mochi's tiny autoencoder TAEM1, float16"
    assert report["parts"]["tiny_vae"]["released_sizes"]
    latents = torch.randn(1, 12, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    half, full = (load_tiny_vae(path).decode(latents) for path in (out, pth))
    assert (half - full).norm() / full.norm() < 0.01
    assert main(["convert", str(out), str(tmp_path / "folder"), "--to", "diffusers"]) == 2
    assert "diffusers has no tiny autoencoder" in capsys.readouterr().err


def test_relatives_and_other_autoencoders_are_refused(pth, weights, tmp_path):
    taehv = weights | {"decoder.19.conv.weight": torch.zeros(128, 64, 1, 1)}
    save_file(taehv, tmp_path / "taehv.safetensors")
    with pytest.raises(
        ValueError, match=r"not Mochi's tiny autoencoder TAEM1; choose a file such as taem1\.safetensors"
    ):
        load_tiny_vae(tmp_path / "taehv.safetensors")
    with pytest.raises(ValueError, match=r"holds Mochi's tiny autoencoder TAEM1.*, not a Mochi autoencoder"):
        load_vae(pth)
    lacking = {name: weight for name, weight in weights.items() if name != "decoder.22.bias"}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.22\.bias"):
        load_tiny_vae(tmp_path / "lacking.safetensors")
    with pytest.raises(ValueError, match="Mochi's are"):
        load_tiny_vae(pth).decode(torch.zeros(1, 16, 1, 2, 2))
