"""Load models: open a file, select a part, build an empty model of matching sizes, check that it fits, fill it."""

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
# The smallest bit pattern, without the sign, that is not a finite number.
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

    `pos_frequencies` and the q/k norm weights stay float32 whatever `dtype` is. Linear layers whose weights are stored
    quantised (scaled or plain fp8, int8, GGML blocks) keep them quantised and compute in the dtype of their input; `quantize`
    ("fp8", "int8" or "q4_0") quantises the blocks' other matrices in the same way. "fp8_rowwise" stores all of these but `mod_x`
    and `mod_y` in fp8 with a scale per row, and quantises their inputs, too: matrix products run in fp8 where the device can.

    On the CPU, weights that keep their dtype stay in the mapped file (listed by `mapped_files.mapped_weights`): they take no
    memory until they are used, and the file must not change, which is checked before each run. With `mmap=False`, or where
    most weights are converted, all are copied.

    `frame_levels` says whether the weights were trained with per-frame noise levels, as Pusa's were; None decides by the file's
    metadata and name. It affects only how videos are made from images.

    `device_map` and `max_memory` put the blocks on several devices instead of `device`; see `device_map.place_on_devices`.

    Raises:
        ValueError: the file is not a complete Mochi transformer, cannot be quantised in that way or does not fit on the devices,
            or a device does not exist.
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
        ValueError: the files are not a Mochi autoencoder or halves of one, or hold the same half twice; no files were given, or
            the device does not exist.
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
    """Load the decoder of TAEM1, a tiny autoencoder for previews, from its .pth or a file written by `convert`.

    Raises:
        ValueError: the file is not TAEM1, or the device does not exist.
        FileNotFoundError: there is no such file.
    """
    check_device(device)
    checkpoint = open_part(path, "tiny_vae")
    decoder = TinyDecoder(device="meta", dtype=dtype)
    load_into(decoder, checkpoint, device)
    return decoder.eval()


def open_part(path: str | Path, part: str) -> Checkpoint:
    """Open a file, a folder, or the part's subfolder of a diffusers pipeline, and select the part.

    Raises:
        FileNotFoundError, ValueError: see `open_checkpoint` and `select_part`.
    """
    subfolder = Path(path) / PARTS[part].subfolder
    return select_part(open_checkpoint(subfolder if subfolder.is_dir() else path), part)


def empty_transformer(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> AsymmDiT:
    """A denoiser on the meta device, sized to canonical tensors; ValueError if they do not determine its sizes."""
    with checkpoint.named_errors():
        return AsymmDiT(dit_config(checkpoint.tensors), device="meta", dtype=dtype)


def empty_vae(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> AsymmVAE:
    """An autoencoder on the meta device, sized to canonical tensors, with the halves that they include.

    Raises:
        ValueError: the tensors do not determine its sizes.
    """
    tensors = checkpoint.tensors
    there = halves(tensors)
    with checkpoint.named_errors():
        config = vae_config(tensors)
        return AsymmVAE(config, device="meta", dtype=dtype, encoder=there["encoder"], decoder=there["decoder"])


@dataclass(frozen=True)
class ModelSpec:
    """The configuration and parameters of a model sized to a file's tensors."""

    config: AsymmDiTConfig | AsymmVAEConfig | T5EncoderConfig | TinyVAEConfig
    parameters: dict[str, Tensor]
    """All parameters of the model by name, on the meta device."""


def model_spec(checkpoint: Checkpoint, part: str, dtype: torch.dtype | None = None) -> ModelSpec:
    """The specification of one of `PARTS`; ValueError if the canonical tensors do not determine its sizes."""
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
    """Load weights into a module built on the meta device, in the dtypes that it was built with.

    A linear layer with a quantised weight becomes a `QuantizedLinear`; any other quantised tensor is dequantised. Tensors
    are read, cast and moved one by one, so there is never a second copy of the model. With `mmap`, weights that need no cast or
    move stay in the mapped file, unless they are less than a quarter of the model: then all are copied.

    Raises:
        ValueError: tensors are missing, unexpected, of the wrong shape or not floating-point, or hold non-finite values.
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
            # This sets a quantised layer's bias, too: `named_parameters` lists a layer's weight before its bias.
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
    """Raise one ValueError that lists all differences between a model's parameters and a file's tensors."""
    differences = state_dict_diff(parameters, checkpoint.tensors)
    if problems := [_listed(kind, names) for kind, names in differences.items() if names]:
        raise checkpoint.error(f"does not fit the model: {'; '.join(problems)}. Download it again or use another file.")


def state_dict_diff(parameters: Mapping[str, Tensor], tensors: LazyStateDict) -> dict[str, list[str]]:
    """Names of tensors that are missing, unexpected, misshapen or not floating-point, by kind."""
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
    """Raise a ValueError if a tensor of the file contains NaN or infinity."""
    floats = value.floats() if isinstance(value, QuantizedWeight) else [value]
    if not all(map(is_finite, floats)):
        raise checkpoint.error(
            f"has NaN or infinite values in {name}, or values too large for this dtype; download it again or use another "
            "dtype."
        )


def checked_when_read(checkpoint: Checkpoint) -> Checkpoint:
    """Apply `check_finite` to every tensor of a file when it is read, plain or quantised."""

    def checked(name: str, tensor: LazyTensor) -> LazyTensor:
        def finite(value: V) -> V:
            check_finite(checkpoint, name, value)
            return value

        return tensor.map(finite, finite)

    return checkpoint.with_tensors({name: checked(name, tensor) for name, tensor in checkpoint.tensors.items()})


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN or infinity, in one pass over its memory, on its device."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.dtype in FP8_INFINITY:
        # fp8 supports no arithmetic, but non-finite values have the largest bit patterns, positive and negative.
        first = FP8_INFINITY[tensor.dtype]
        positive, negative = tensor.view(torch.int8).amax(), tensor.view(torch.uint8).amax()
        return bool((positive < first) & (negative < first + SIGN_BIT))
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())
