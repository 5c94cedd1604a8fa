"""Size of each quantised form of the denoiser, and its effect on one forward.

Full width, depth 2, one latent frame on the 30 x 53 patch grid of 480 x 848 pixels, 77 text tokens, Gaussian weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from torch import Tensor, nn

from benchmarks.k_types import K_QUANTIZERS
from benchmarks.measure import environment, write_report
from benchmarks.peers import DEVICE
from mochi_core import AsymmDiT, AsymmDiTConfig
from mochi_core.checkpoints import Checkpoint, LazyTensor, from_state_dict, is_block_matrix, load_into
from mochi_core.quantization.weights import QUANTIZERS, QuantizedWeight

Quantize = Callable[[Tensor], QuantizedWeight]
ROWWISE = "fp8 e4m3fn, scales per row and token, multiplied in fp8"
TEXT_TOKENS, TOKENS = 77, 256
NOTE = (
    "Errors are those of the velocity, with Gaussian weights (real ones have outliers, which hurt one scale per layer or row "
    "more than blocks). First in bf16, as in practice: relative to the model with bf16 matrices, and to the float32 model; "
    "then all in float32, the error of the quantisation alone. Only the matrices of the blocks are quantised; everything else "
    "is bf16, and if products are in fp8, so are mod_x and mod_y. Results of such products are bfloat16 in all columns. Seconds "
    "are those of a second forward in bf16. Sizes are those of the released model, computed from its shapes; file and memory "
    "are the same, because weights are dequantized only while a layer works. Q6_K and Q4_K are written by the plain quantisers "
    "in `benchmarks/k_types.py`, while llama.cpp searches for better scales; the gguf package cannot write K types, so only "
    "the sizes of the others are given."
)


def by_gguf(block_type: str) -> Quantize:
    """The reference package's quantiser."""

    def quantize(weight: Tensor) -> QuantizedWeight:
        blocks = gguf.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[block_type])
        return QuantizedWeight(torch.from_numpy(blocks), block_type=block_type)

    return quantize


def by_k_type(block_type: str) -> Quantize:
    return lambda weight: QuantizedWeight(K_QUANTIZERS[block_type](weight), block_type=block_type)


FORMS: dict[str, tuple[float, Quantize | None]] = {
    "bf16": (16, None),
    "int8, scale per row": (8, QUANTIZERS["int8"]),
    "fp8 e4m3fn, scale per layer": (8, QUANTIZERS["fp8"]),
    ROWWISE: (8, QUANTIZERS["fp8_rowwise"]),
    "fp8 e4m3fn, plain": (8, lambda weight: QuantizedWeight(weight.to(torch.float8_e4m3fn))),
    "fp8 e5m2, plain": (8, lambda weight: QuantizedWeight(weight.to(torch.float8_e5m2))),
    "Q8_0": (8.5, by_gguf("Q8_0")),
    "Q6_K": (6.5625, by_k_type("Q6_K")),
    "Q5_1": (6, by_gguf("Q5_1")),
    "Q5_0": (5.5, by_gguf("Q5_0")),
    "Q4_1": (5, by_gguf("Q4_1")),
    "Q4_K": (4.5, by_k_type("Q4_K")),
    "Q4_0": (4.5, QUANTIZERS["q4_0"]),
}
NOT_MEASURED = {"Q5_K": 5.5, "Q3_K": 3.4375, "Q2_K": 2.625}
MODULATION = ("int8, scale per row", "fp8 e4m3fn, scale per layer", "Q4_0")


def is_modulation(name: str) -> bool:
    return ".mod_" in name


def random_dit() -> AsymmDiT:
    dit, generator = AsymmDiT(AsymmDiTConfig(depth=2)), torch.Generator().manual_seed(0)
    for name, parameter in dit.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scaled = noise * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1 * noise + ("_norm_" in name)
        parameter.data = scaled * (0.2 if name == "pos_frequencies" else 1)
    return dit.requires_grad_(False).eval()


def quantized(dit: AsymmDiT, quantize: Quantize | None, dtype: torch.dtype, chosen: Callable[[str], bool]) -> AsymmDiT:
    """The same model with the chosen matrices quantised, and everything else in `dtype`."""

    def store(name: str, tensor: LazyTensor) -> LazyTensor:
        if quantize is None or not (is_block_matrix(name, tensor) and chosen(name)):
            return tensor
        return LazyTensor(tensor.shape, tensor.dtype, tensor.read, lambda: quantize(tensor.read()))

    tensors = {name: store(name, tensor) for name, tensor in from_state_dict(dit.state_dict()).items()}
    result = AsymmDiT(dit.config, device="meta", dtype=dtype)
    load_into(result, Checkpoint("random weights", Path(), tensors), DEVICE)
    return result.eval()


@torch.inference_mode()
def forward(dit: nn.Module) -> Tensor:
    """The velocity for fixed random inputs."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 12, 1, 60, 106, generator=generator).to(DEVICE)
    embeds = torch.randn(1, TOKENS, 4096, generator=generator).to(DEVICE)
    mask = (torch.arange(TOKENS) < TEXT_TOKENS)[None].to(DEVICE)
    return dit(latents, torch.tensor([0.7375], device=DEVICE), embeds, mask).cpu()


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def gigabytes(bits: float, chosen: Callable[[str], bool]) -> float:
    """Size of the released model, in GB, with `bits` per weight of the `chosen` block matrices and 16 of the rest."""
    released = AsymmDiT(device="meta").named_parameters()
    return sum(p.numel() * (bits if is_block_matrix(name, p) and chosen(name) else 16) for name, p in released) / 8e9


def everything(_: str) -> bool:
    return True


def taking_part(form: str) -> Callable[[str], bool]:
    """Predicate for the block matrices that a form quantises."""
    return (lambda name: not is_modulation(name)) if form == ROWWISE else everything


def form_rows(dit: AsymmDiT, exact: Tensor) -> list[str]:
    title = ("matrices", "bits each", "GB", "error against bf16", "against float32", "all in float32", "seconds")
    rows = ["| " + " | ".join(title) + " |", "|---" * len(title) + "|"]
    plain = forward(quantized(dit, None, torch.bfloat16, everything))
    for form, (bits, quantize) in FORMS.items():
        chosen = taking_part(form)
        model = quantized(dit, quantize, torch.bfloat16, chosen)
        half, seconds = timed(model)
        del model
        errors = " | ".join(f"{relative_error(half, expected):.2%}" for expected in (plain, exact))
        alone = "" if quantize is None else f"{_error(dit, exact, quantize, chosen):.2%}"
        rows.append(f"| {form} | {bits:g} | {gigabytes(bits, chosen):.2f} | {errors} | {alone} | {seconds:.1f} |")
        print(rows[-1], flush=True)
    sizes = [(form, f"{bits:g}", f"{gigabytes(bits, everything):.2f}") for form, bits in NOT_MEASURED.items()]
    return rows + ["| " + " | ".join(size) + " | | | | |" for size in sizes]


def timed(dit: nn.Module) -> tuple[Tensor, float]:
    """The velocity, and the seconds of a second forward."""
    forward(dit)
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    velocity = forward(dit)
    return velocity, time.perf_counter() - start


def modulation_rows(dit: AsymmDiT, exact: Tensor) -> list[str]:
    rows = ["| quantised, float32 | all | all but mod_x, mod_y | GB more without |", "|---|---|---|---|"]
    for form in MODULATION:
        bits, quantize = FORMS[form]
        assert quantize is not None
        errors = [_error(dit, exact, quantize, chosen) for chosen in (everything, lambda name: not is_modulation(name))]
        more = gigabytes(bits, lambda name: not is_modulation(name)) - gigabytes(bits, everything)
        rows.append(f"| {form} | {errors[0]:.2%} | {errors[1]:.2%} | {more:.2f} |")
        print(rows[-1], flush=True)
    return rows


def _error(dit: AsymmDiT, exact: Tensor, quantize: Quantize, chosen: Callable[[str], bool]) -> float:
    return relative_error(forward(quantized(dit, quantize, torch.float32, chosen)), exact)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    dit = random_dit()
    exact = forward(dit.to(DEVICE))
    page = ["# Quantised denoiser", "", environment(), "", NOTE, "", *form_rows(dit, exact), ""]
    page += ["## The modulation layers", "", *modulation_rows(dit, exact)]
    write_report("quantization", "\n".join(page) + "\n")


if __name__ == "__main__":
    main()
