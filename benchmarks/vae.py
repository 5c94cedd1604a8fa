"""Time, memory and exactness of the autoencoder, ours next to diffusers and ComfyUI's own class, and a picture of the seams.

On a CPU: small frames. On a GPU: 480 x 848 with 25, 85 and 163 frames, and larger frames (a peer that runs out of memory is
reported as such).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.measure import MIB, Measurement, compare, environment, write_report
from benchmarks.peers import DEVICE, comfy_vae, diffusers_vae
from benchmarks.random_weights import randomize
from mochi_core import AsymmVAE
from mochi_core.autoencoder.plan import CPU, Plan
from mochi_core.autoencoder.steps import decoder_steps
from mochi_core.autoencoder.streaming import OomRetry, stream

# In latents, for both peers: two tiles fit into the smaller frame.
TILE, OVERLAP = 24, 8
ONE_PIECE = "ours, in one piece"
# Factor of the random output layer, so that its pixels stay in range.
CONTRAST = 0.15
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "seams.png"


def latents(case: dict) -> Tensor:
    """Noise that varies across the frame, so that a tile's statistics differ from the frame's."""
    t, h, w = case["latent"]
    noise = torch.randn(1, 12, t, h, w, generator=torch.Generator().manual_seed(0))
    brightness = torch.linspace(-2, 2, w) + torch.linspace(-1, 1, h)[:, None]
    return (noise * 0.5 + brightness).to(DEVICE, dtype(case))


def video(case: dict) -> Tensor:
    frames, height, width = case["video"]
    noise = torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * 2 - 1).to(DEVICE)


def dtype(case: dict) -> torch.dtype:
    return getattr(torch, case["dtype"])


def our_vae(case: dict) -> AsymmVAE:
    vae = AsymmVAE(dtype=dtype(case))
    randomize(vae, seed=0)
    assert vae.decoder
    vae.decoder.output_proj.weight.mul_(CONTRAST)
    return vae.requires_grad_(False).eval().to(DEVICE)


def kept(case: dict, name: str, decode):
    """Decode, and save the video if differences will be computed from it."""

    def call():
        decoded = decode()
        if "keep" in case:
            save_file({"video": decoded.contiguous()}, Path(case["keep"]) / f"{name}.safetensors")

    return call


def ours(case: dict):
    vae, z = our_vae(case), latents(case)
    return kept(case, "ours", lambda: vae.decode(z, case.get("memory_limit")))


def one_piece(case: dict):
    vae, z = our_vae(case), latents(case)
    everything = Plan(z.device, CPU, 2**60)
    decode = lambda: torch.cat(list(stream(decoder_steps(vae.decoder), [z], OomRetry(everything))), dim=2)  # noqa: E731
    return kept(case, ONE_PIECE, decode)


def same_weights(peer: torch.nn.Module, case: dict) -> torch.nn.Module:
    peer.load_state_dict(our_vae(case).state_dict())
    return peer


def comfyui(case: dict):
    vae, z = same_weights(comfy_vae(dtype(case)), case), latents(case)
    return kept(case, "ComfyUI", lambda: vae.decode(z))


def comfyui_tiled(case: dict):
    vae, z = same_weights(comfy_vae(dtype(case)), case), latents(case)
    import comfy.utils

    size = {"upscale_amount": (lambda t: 6 * t - 5, 8, 8), "index_formulas": (6, 8, 8), "out_channels": 3}
    tiles = {"tile": (999, TILE, TILE), "overlap": (1, OVERLAP, OVERLAP), "output_device": DEVICE, **size}
    return kept(case, "ComfyUI, tiled", lambda: comfy.utils.tiled_scale_multidim(z, vae.decode, **tiles))


def diffusers_tiled(case: dict):
    from mochi_core.checkpoints import autoencoder_rules, from_state_dict, to_diffusers

    vae, source, z = diffusers_vae(dtype(case)), our_vae(case), latents(case)
    rules = autoencoder_rules(source.config.encoder_blocks, source.config.decoder_blocks)
    tensors = to_diffusers(from_state_dict(source.state_dict()), rules)
    vae.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
    size, stride = TILE * 8, (TILE - OVERLAP) * 8
    vae.enable_tiling(size, size, stride, stride)
    return kept(case, "diffusers, tiled", lambda: vae.decode(z, return_dict=False)[0])


def encode(case: dict):
    vae, x = our_vae(case), video(case)
    return lambda: vae.encode(x, case.get("memory_limit"))


def comfyui_encode(case: dict):
    vae, x = comfy_vae(dtype(case)), video(case).to(dtype(case))
    return lambda: vae.encode(x)


def diffusers_encode(case: dict):
    vae, x = diffusers_vae(dtype(case)), video(case).to(dtype(case))
    return lambda: vae.encode(x)


DECODERS = {
    "ours": ours,
    ONE_PIECE: one_piece,
    "ComfyUI": comfyui,
    "ComfyUI, tiled": comfyui_tiled,
    "diffusers, tiled": diffusers_tiled,
}
ENCODERS = {"ours, encode": encode, "ComfyUI, encode": comfyui_encode, "diffusers, encode": diffusers_encode}
CONTENDERS = DECODERS | ENCODERS


def decode_cases() -> list[dict]:
    if DEVICE == "cuda":
        sizes = [(5, 60, 106), (15, 60, 106), (28, 60, 106), (6, 90, 160), (6, 135, 240)]
        return [{"latent": size, "dtype": "bfloat16"} for size in sizes]
    small = {"latent": (7, 16, 16), "dtype": "float32"}
    return [small, {"latent": (5, 32, 32), "dtype": "bfloat16"}, {"latent": (9, 24, 40), "dtype": "bfloat16"}]


def memory_cases() -> list[dict]:
    """Several lengths at one size, then sizes and limits at one length."""
    if DEVICE == "cuda":
        limits = [{"latent": (28, 60, 106), "memory_limit": gib * 2**30} for gib in (4, 2, 1)]
        return [{**case, "dtype": "bfloat16"} for case in limits]
    # With a limit: otherwise a short clip of small frames would not fill the working set, and a longer one would use more of it.
    lengths = [{"latent": (t, 16, 16), "memory_limit": 3 * 2**26} for t in (5, 15, 28)]
    sizes = [{"latent": (2, h, w)} for h, w in ((16, 16), (32, 32), (60, 106))]
    limits = [{"latent": (2, 32, 32), "memory_limit": gib * 2**28} for gib in (3, 2, 1)]
    return [{**case, "dtype": "bfloat16"} for case in lengths + sizes + limits]


def encode_cases() -> list[dict]:
    sizes = [(25, 480, 848), (163, 480, 848)] if DEVICE == "cuda" else [(25, 128, 128), (49, 128, 128)]
    return [{"video": size, "dtype": "bfloat16"} for size in sizes]


def describe(case: dict) -> str:
    frames, height, width = case["video"] if "video" in case else decoded_size(case)
    limit = f", limit {case['memory_limit'] / 2**30:g} GiB" if "memory_limit" in case else ""
    return f"{frames} frames of {width} x {height}, {case['dtype']}{limit}"


def decoded_size(case: dict) -> tuple[int, int, int]:
    t, h, w = case["latent"]
    return 6 * t - 5, 8 * h, 8 * w


def row(case: dict, name: str, measured: Measurement, *more: str) -> str:
    cells = (describe(case), name, f"{measured.median:.1f}", f"{measured.largest('peak_mib'):.0f}", *more)
    return "| " + " | ".join(cells) + " |"


def header(*more: str) -> list[str]:
    names = ("case", "contender", "seconds", "peak memory above the model, MiB", *more)
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def decode_table(folder: Path) -> list[str]:
    """One decode by each contender, and how far its pixels are from those of a decode in one piece."""
    lines = header("time / ours", "frames", "largest pixel difference, of 255")
    for i, case in enumerate(decode_cases()):
        case["keep"] = str(folder / str(i))
        Path(case["keep"]).mkdir()
        (results,) = compare("benchmarks.vae", list(DECODERS), [case], calls=0, rounds=1)
        reference = pixels(case, ONE_PIECE)
        for name, measured in results.items():
            decoded = pixels(case, name)
            same = decoded.shape == reference.shape
            difference = f"{(decoded - reference).abs().max() * 255:.2f}" if same else "other size"
            ratio = f"{measured.median / results['ours'].median:.2f}"
            lines.append(row(case, name, measured, ratio, str(decoded.shape[2]), difference))
    return lines


def pixels(case: dict, name: str) -> Tensor:
    """Pixels in [0, 1], as they would be saved."""
    decoded = load_file(Path(case["keep"]) / f"{name}.safetensors")["video"].float()
    return (decoded / 2 + 0.5).clamp(0, 1)


def memory_table() -> list[str]:
    """Peaks of ours alone, with an allocator that returns freed memory to the system: memory that it keeps would distort them."""
    give_back = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    cases = memory_cases()
    results = compare("benchmarks.vae", ["ours"], cases, calls=0, rounds=1, **give_back)
    lines = ["| case | peak memory above the model, MiB | of this the video |", "|---|---|---|"]
    for case, measured in zip(cases, results, strict=True):
        frames, height, width = decoded_size(case)
        own = 3 * frames * height * width * dtype(case).itemsize / MIB
        lines.append(f"| {describe(case)} | {measured['ours'].largest('peak_mib'):.0f} | {own:.0f} |")
    return lines


def plain_table(cases: list[dict], contenders: list[str]) -> list[str]:
    results = compare("benchmarks.vae", contenders, cases, calls=0, rounds=1)
    return header() + [
        row(case, name, m) for case, measured in zip(cases, results, strict=True) for name, m in measured.items()
    ]


def draw_seams(case: dict) -> None:
    """The last frame untiled, with ComfyUI's tiles and from ours; below, the difference times 8."""
    names = (ONE_PIECE, "ComfyUI, tiled", "ours")
    captions = ("in one piece", f"ComfyUI, tiles of {TILE * 8} pixels", "ours, streamed")
    last = [pixels(case, name)[0, :, -1] for name in names]
    rows = [last, [((frame - last[0]).abs() * 8).clamp(0, 1) for frame in last]]
    _, height, width = decoded_size(case)
    page = Image.new("RGB", (3 * (width + 8), 2 * (height + 22)), "white")
    draw = ImageDraw.Draw(page)
    for y, (frames, what) in enumerate(zip(rows, ("", "difference x 8: "), strict=True)):
        for x, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
            left, top = x * (width + 8) + 4, y * (height + 22) + 4
            draw.text((left, top), what + caption, fill="black")
            image = (frame.permute(1, 2, 0) * 255).round().byte().numpy()
            page.paste(Image.fromarray(image), (left, top + 14))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    page.save(PICTURE)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        decoded = decode_table(Path(folder))
        draw_seams({**decode_cases()[-1], "keep": str(Path(folder) / str(len(decode_cases()) - 1))})
    page = [
        "# Autoencoder", "", environment(), "",
        "Released sizes, random weights, the same for all; one call in a fresh process each. Memory includes the video.", "",
        "## Decode", "",
        f"Tiles of {TILE * 8} pixels that overlap by {OVERLAP * 8}. diffusers also drops surplus frames later than Genmo's "
        "code, so its first frames differ even without tiles.", "", *decoded, "",
        "## Memory of a decode, by length, size and limit", "", *memory_table(), "",
        "## Encode", "", *plain_table(encode_cases(), list(ENCODERS)),
    ]  # fmt: skip
    write_report("vae", "\n".join(page) + "\n")


if __name__ == "__main__":
    main()
