"""Files to models: open a file, select a part of it, build an empty model of its sizes, check that all fits, fill it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..autoencoder.model import AsymmVAE
from ..autoencoder.tiny import TinyDecoder
from ..config import AsymmDiTConfig, AsymmVAEConfig, T5EncoderConfig, TinyVAEConfig
from ..devices import check_device
from ..mapped_files import copy_mapped, is_much_mapped, remember
from ..quantization.weights import QuantizedLinear, QuantizedWeight
from ..shown import shown, shown_names
from ..transformer.model import AsymmDiT
from .device_map import Place, check_places, place_on_devices
from .formats.reader import open_checkpoint
from .names.detect import PARTS, has_frame_levels, select_part
from .names.quantized import quantize_block_matrices
from .names.sizes import dit_config, halves, vae_config
from .names.t5 import t5_config, t5_shapes
from .tensors import Checkpoint, LazyStateDict, LazyTensor, merge

NOT_FLOATING = "not floating-point"
# The first bit pattern, without its sign, that is no finite number.
FP8_INFINITY = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
SIGN_BIT = 0x80

V = TypeVar("V", Tensor, QuantizedWeight)


def load_transformer(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    *,
    mmap: bool = True,
    frame_levels: bool | None = None,
    device_map: str | Mapping[str, Place] | None = None,
    max_memory: Mapping[Place, int | str] | None = None,
) -> AsymmDiT:
    """Load a denoiser from a file or folder in any known layout, ready for inference.

    `pos_frequencies` and the q/k norm weights stay float32 whatever `dtype` is. Linear layers whose weights the file
    stores quantised (scaled or plain fp8, int8, GGML blocks) keep them so and compute in the dtype of their input;
    `quantize` ("fp8", "int8" or "q4_0") does the same to the other matrices of the blocks; with "fp8_rowwise" all of them but
    `mod_x` and `mod_y` get fp8 with a scale per row, and their inputs, too: products are then in fp8 where the device can.

    On the CPU, weights that keep their dtype stay in the mapped file (`mapped_files.mapped_weights` names them): they take no
    memory until they are used, and the file must stay as it is. That is looked at before each run. With `mmap=False`, or where
    most weights are converted, all are copies.

    `frame_levels` says whether the weights were trained with a noise level of each latent frame, as Pusa's are; None leaves it to
    the file's metadata and name. It changes nothing but how videos are made from images.

    `device_map` and `max_memory` put the blocks on several devices instead of `device`, see `device_map.place_on_devices`.

    Raises:
        ValueError: the file is not a whole Mochi transformer, it cannot be quantised so, it does not fit on the devices, or one
            of them is not there.
        FileNotFoundError: there is no such file.
    """
    check_places("auto" if device_map is None else device_map)
    check_device(device)
    checkpoint = quantize_block_matrices(open_part(path, "transformer"), quantize)
    dit = empty_transformer(checkpoint, dtype)
    load_into(dit, checkpoint, device if device_map is None else "cpu", mmap=mmap and quantize is None)
    dit.has_frame_levels = has_frame_levels(checkpoint) if frame_levels is None else frame_levels
    dit.eval()
    return dit if device_map is None else place_on_devices(dit, device_map, max_memory)


def load_vae(
    path: str | Path | Sequence[str | Path],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    mmap: bool = True,
) -> AsymmVAE:
    """Load an autoencoder from one file or folder, or from separate encoder and decoder files.

    `mmap` is as for `load_transformer`.

    Raises:
        ValueError: the files are not a Mochi autoencoder or halves of one, or bring the same half twice; there are none, or
            there is no such device.
        FileNotFoundError: there is no such file.
    """
    check_device(device)
    paths = [path] if isinstance(path, str | Path) else path
    if not paths:
        raise ValueError("There is no file to load an autoencoder from; give at least one.")
    checkpoint = merge([open_part(file, "vae") for file in paths])
    vae = empty_vae(checkpoint, dtype)
    load_into(vae, checkpoint, device, mmap=mmap)
    return vae.eval()


def load_tiny_vae(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TinyDecoder:
    """Load the decoder of TAEM1, a tiny autoencoder for previews, from its .pth or what `convert` made of it.

    Raises:
        ValueError: the file is no TAEM1, or there is no such device.
        FileNotFoundError: there is no such file.
    """
    check_device(device)
    checkpoint = open_part(path, "tiny_vae")
    decoder = TinyDecoder(device="meta", dtype=dtype)
    load_into(decoder, checkpoint, device)
    return decoder.eval()


def open_part(path: str | Path, part: str) -> Checkpoint:
    """`select_part` of a file, of a folder, or of the subfolder of a diffusers pipeline that has it.

    Raises:
        FileNotFoundError, ValueError: see `open_checkpoint` and `select_part`.
    """
    subfolder = Path(path) / PARTS[part].subfolder
    return select_part(open_checkpoint(subfolder if subfolder.is_dir() else path), part)


def empty_transformer(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> AsymmDiT:
    """A denoiser of the sizes of canonical tensors, on the meta device; ValueError if they do not tell its sizes."""
    with checkpoint.named_errors():
        return AsymmDiT(dit_config(checkpoint.tensors), device="meta", dtype=dtype)


def empty_vae(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> AsymmVAE:
    """An autoencoder of the sizes of canonical tensors, with the halves that are there, on the meta device.

    Raises:
        ValueError: the tensors do not tell its sizes.
    """
    tensors = checkpoint.tensors
    there = halves(tensors)
    with checkpoint.named_errors():
        config = vae_config(tensors)
        return AsymmVAE(config, device="meta", dtype=dtype, encoder=there["encoder"], decoder=there["decoder"])


@dataclass(frozen=True)
class ModelSpec:
    """A model of the sizes of a file's tensors."""

    config: AsymmDiTConfig | AsymmVAEConfig | T5EncoderConfig | TinyVAEConfig
    parameters: dict[str, Tensor]
    """All parameters of the model by name, on the meta device."""


def model_spec(checkpoint: Checkpoint, part: str, dtype: torch.dtype | None = None) -> ModelSpec:
    """The specification of one of `PARTS`; ValueError if the canonical tensors do not tell its sizes."""
    if part == "t5":
        config = t5_config(checkpoint)
        shapes = t5_shapes(config)
        return ModelSpec(config, {n: torch.empty(shapes[n], dtype=dtype, device="meta") for n in shapes})
    if part == "tiny_vae":
        tiny = TinyDecoder(device="meta", dtype=dtype)
        return ModelSpec(tiny.config, dict(tiny.named_parameters()))
    module = empty_transformer(checkpoint, dtype) if part == "transformer" else empty_vae(checkpoint, dtype)
    return ModelSpec(module.config, dict(module.named_parameters()))


def load_into(module: nn.Module, checkpoint: Checkpoint, device: torch.device | str, *, mmap: bool = True) -> None:
    """Give a module built on the meta device its weights, in the dtypes that it was built with.

    A linear layer with a quantised weight becomes a `QuantizedLinear`; any other quantised tensor is dequantised. Tensors
    are read, cast and moved one by one, so a second copy of the model never exists. With `mmap`, weights that need neither
    stay in the mapped file, unless they are less than a quarter of the model: then all are copies.

    Raises:
        ValueError: tensors are missing, unexpected or of the wrong shape, or have values that are no numbers.
    """
    parameters, tensors = dict(module.named_parameters()), checkpoint.tensors
    check_fit(parameters, checkpoint)
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        layer, read_quantized = module.get_submodule(owner), tensors[name].quantized
        if read_quantized is not None and isinstance(layer, nn.Linear):
            layer = QuantizedLinear(read_quantized()).to(device)
            module.set_submodule(owner, layer)
        else:
            value = tensors[name].read().to(device, parameter.dtype)
            # A quantised layer gets its bias here, too: `named_parameters` lists a layer's weight before its bias.
            setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
        if not mmap:
            copy_mapped(layer)
        check_finite(checkpoint, name, getattr(layer, leaf))
    if is_much_mapped(module):
        remember(module, checkpoint.files)
        return
    for file in checkpoint.files:
        file.check_while_loading()
    copy_mapped(module)


def check_fit(parameters: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Raise one ValueError that names every difference between the parameters of a model and the tensors of a file."""
    differences = state_dict_diff(parameters, checkpoint.tensors)
    if problems := [_listed(kind, names) for kind, names in differences.items() if names]:
        raise checkpoint.error(f"does not fit the model: {'; '.join(problems)}. Download it again or use another file.")


def state_dict_diff(parameters: Mapping[str, Tensor], tensors: LazyStateDict) -> dict[str, list[str]]:
    """Tensors that are missing, unexpected, of the wrong shape, or no floating-point numbers, by these kinds."""
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return {
        "missing": sorted(name for name in expected if name not in tensors),
        "unexpected": sorted(name for name in tensors if name not in expected),
        "misshapen": sorted(
            f"{shown(name)} is {tensors[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ),
        NOT_FLOATING: sorted(
            f"{name} is {tensors[name].stored_dtype}"
            for name in expected
            if name in tensors and not tensors[name].is_float
        ),
    }


def _listed(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind} ({shown_names(names)})"


def check_finite(checkpoint: Checkpoint, name: str, value: Tensor | QuantizedWeight) -> None:
    """Raise a ValueError if the value of a tensor of the file holds a NaN or an infinity."""
    floats = value.floats() if isinstance(value, QuantizedWeight) else [value]
    if not all(map(is_finite, floats)):
        raise checkpoint.error(
            f"holds NaN or infinite values in {name}, or values too large for this dtype; download it again or use another "
            "dtype."
        )


def checked_when_read(checkpoint: Checkpoint) -> Checkpoint:
    """Have every tensor of a file checked by `check_finite` when it is read, in whichever form."""

    def checked(name: str, tensor: LazyTensor) -> LazyTensor:
        def finite(value: V) -> V:
            check_finite(checkpoint, name, value)
            return value

        return tensor.map(finite, finite)

    return checkpoint.with_tensors({name: checked(name, tensor) for name, tensor in checkpoint.tensors.items()})


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
