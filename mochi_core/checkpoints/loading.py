"""Put tensors into models: everything fits, or one error says what does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..autoencoder.model import AsymmVAE
from ..config import AsymmDiTConfig, AsymmVAEConfig, T5EncoderConfig
from ..quantization.weights import QuantizedLinear, QuantizedWeight
from ..transformer.model import AsymmDiT
from .names.detect import blaming, dit_config, file_label, has_decoder, has_encoder, open_part, vae_config
from .names.quantized import quantize_large
from .names.t5 import t5_config, t5_shapes
from .tensors import LazyStateDict

EXAMPLES = 6
# The first bit pattern, without its sign, that is no finite number.
FP8_INFINITY = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
SIGN_BIT = 0x80


def load_transformer(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> AsymmDiT:
    """Load a denoiser from a file or folder in any known layout, ready for inference.

    `pos_frequencies` and the q/k norm weights stay float32 whatever `dtype` is. Linear layers whose weights the file
    stores quantised (scaled or plain fp8, int8, GGML blocks) keep them so and compute in the dtype of their input;
    `quantize` ("fp8", "int8" or "q4_0") does the same to the other matrices of the blocks; with "fp8_rowwise" all of them but
    `mod_x` and `mod_y` get fp8 with a scale per row, and their inputs, too: products are then in fp8 where the device can.

    Raises:
        ValueError: the file is not a whole Mochi transformer, or it cannot be quantised so.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    tensors, label = quantize_large(open_part(path, "transformer"), quantize), file_label(path)
    with blaming(label):
        dit = empty_transformer(tensors, dtype)
    load_into(dit, tensors, label, device)
    return dit.eval()


def load_vae(
    path: str | Path | Sequence[str | Path], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> AsymmVAE:
    """Load an autoencoder from one file or folder, or from separate encoder and decoder files.

    Raises:
        ValueError: the files are not a Mochi autoencoder or halves of one, or bring the same half twice.
        FileNotFoundError: there is no such file.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(p) for p in path]
    label = " and ".join(map(file_label, paths))
    tensors = joined([open_part(file, "vae") for file in paths], label)
    with blaming(label):
        vae = empty_vae(tensors, dtype)
    load_into(vae, tensors, label, device)
    return vae.eval()


def empty_transformer(tensors: LazyStateDict, dtype: torch.dtype | None = None) -> AsymmDiT:
    """A denoiser of the sizes of canonical tensors, on the meta device; ValueError if they do not tell its sizes."""
    return AsymmDiT(dit_config(tensors), device="meta", dtype=dtype)


def empty_vae(tensors: LazyStateDict, dtype: torch.dtype | None = None) -> AsymmVAE:
    """The same of an autoencoder, with the halves that are there."""
    encoder, decoder = has_encoder(tensors), has_decoder(tensors)
    return AsymmVAE(vae_config(tensors), device="meta", dtype=dtype, encoder=encoder, decoder=decoder)


EMPTY: dict[str, Callable[..., AsymmDiT | AsymmVAE]] = {"transformer": empty_transformer, "vae": empty_vae}


@dataclass(frozen=True)
class Blueprint:
    """A model of the sizes of a file's tensors."""

    config: AsymmDiTConfig | AsymmVAEConfig | T5EncoderConfig
    parameters: dict[str, Tensor]
    """All that it consists of, on the meta device."""


def blueprint(part: str, tensors: LazyStateDict, dtype: torch.dtype | None = None) -> Blueprint:
    """Of "transformer", "vae" or "t5"; ValueError if the canonical tensors do not tell its sizes."""
    if part == "t5":
        config = t5_config(tensors)
        shapes = t5_shapes(config)
        return Blueprint(config, {n: torch.empty(shapes[n], dtype=dtype, device="meta") for n in shapes})
    module = EMPTY[part](tensors, dtype)
    return Blueprint(module.config, dict(module.named_parameters()))


def joined(parts: Sequence[LazyStateDict], file_name: str) -> LazyStateDict:
    """The tensors of several files together; ValueError if two bring the same."""
    tensors: LazyStateDict = {}
    for part in parts:
        if twice := sorted(set(tensors) & set(part)):
            raise ValueError(f"{file_name} bring {twice[0]} a second time; give each half of the autoencoder once.")
        tensors |= part
    return tensors


def load_into(module: nn.Module, tensors: LazyStateDict, file_name: str, device: torch.device | str) -> None:
    """Give a module built on the meta device its weights, in the dtypes that it was built with.

    A linear layer with a quantised weight becomes a `QuantizedLinear`; any other quantised tensor is widened. Tensors are
    read, cast and moved one by one, so a second copy of the model never exists.

    Raises:
        ValueError: tensors are missing, unexpected or of the wrong shape, or have values that are no numbers.
    """
    check_tensors(module, tensors, file_name)
    for name, parameter in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        layer, read_quantized = module.get_submodule(owner), tensors[name].quantized
        if read_quantized is not None and isinstance(layer, nn.Linear):
            quantized = QuantizedLinear(read_quantized()).to(device)
            module.set_submodule(owner, quantized)
            value = quantized.weight
        else:
            value = tensors[name].read().to(device, parameter.dtype)
            setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
        check_finite(value, name, file_name)


def check_tensors(module: nn.Module, tensors: LazyStateDict, file_name: str) -> None:
    """Raise one ValueError that names every kind of misfit between the parameters of `module` and `tensors`."""
    check_parameters(dict(module.named_parameters()), tensors, file_name)


def check_parameters(parameters: Mapping[str, Tensor], tensors: LazyStateDict, file_name: str) -> None:
    """The same of parameters by name."""
    problems = [_listed(kind, names) for kind, names in misfits(parameters, tensors).items() if names]
    if problems:
        raise ValueError(
            f"{file_name} does not fit the model: {'; '.join(problems)}. Download it again or use another file."
        )


def misfits(parameters: Mapping[str, Tensor], tensors: LazyStateDict) -> dict[str, list[str]]:
    """Names of tensors that are missing, unexpected or misshapen."""
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return {
        "missing": sorted(name for name in expected if name not in tensors),
        "unexpected": sorted(name for name in tensors if name not in expected),
        "misshapen": sorted(
            f"{name} is {tensors[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ),
    }


def _listed(kind: str, names: list[str]) -> str:
    more = ", ..." if len(names) > EXAMPLES else ""
    return f"{len(names)} {kind} ({', '.join(names[:EXAMPLES])}{more})"


def check_finite(value: Tensor | QuantizedWeight, name: str, file_name: str) -> None:
    """Raise a ValueError if there is a NaN or an infinity."""
    floats = value.floats() if isinstance(value, QuantizedWeight) else [value]
    if not all(map(is_finite, floats)):
        raise ValueError(
            f"{file_name} holds NaN or infinite values in {name}, or values too large for this dtype; download it again or "
            "use another dtype."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity, in one pass over the memory, on the tensor's device."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.dtype in FP8_INFINITY:
        # No arithmetic on these; but what is not finite has the largest bit patterns, positive or negative.
        first = FP8_INFINITY[tensor.dtype]
        positive, negative = tensor.view(torch.int8).amax(), tensor.view(torch.uint8).amax()
        return bool((positive < first) & (negative < first + SIGN_BIT))
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())
