"""The same weights in every quantised file format, and their values in float32.

Every writer takes a model's tensors and a path, and returns the tensors that a reader must find.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.k_types import K_QUANTIZERS

Tensors = dict[str, Tensor]
BITSANDBYTES = Path(__file__).parents[1] / "data" / "bitsandbytes_0.50.2.safetensors"
TORCHAO = BITSANDBYTES.with_name("torchao_0.18.0.safetensors")
"""Small matrices as written by these tools and, under `expected.`, as dequantised by them."""
LARGE = re.compile(r"(blocks|transformer_blocks|encoder\.block)\..*\.weight")
AUTOENCODER = re.compile(r"(encoder\.layers|decoder\.blocks)\..*\.weight")
# Positions of the float16 numbers in a block of each type.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def is_block_matrix(name: str, tensor: Tensor) -> bool:
    """Whether real files quantise this tensor: matrices of the blocks and, in autoencoders, convolutions."""
    if AUTOENCODER.fullmatch(name):
        return tensor.ndim in (2, 5)
    return bool(LARGE.fullmatch(name)) and tensor.ndim == 2 and "relative" not in name


def plain_fp8(tensors: Tensors, path: Path, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensors:
    """Matrices cast to fp8, everything else in bf16."""
    stored = {name: t.to(dtype if is_block_matrix(name, t) else torch.bfloat16) for name, t in tensors.items()}
    save_file(stored, path)
    return {name: t.float() for name, t in stored.items()}


def plain_fp8_e5m2(tensors: Tensors, path: Path) -> Tensors:
    return plain_fp8(tensors, path, torch.float8_e5m2)


def legacy_scaled_fp8(tensors: Tensors, path: Path) -> Tensors:
    """The older generation, under a prefix: a marker, scale_weight and scale_input."""
    stored, expected = _scaled(tensors, torch.float8_e4m3fn, "scale_weight")
    inputs = {
        name[: -len("weight")] + "scale_input": torch.ones(())
        for name, t in tensors.items()
        if is_block_matrix(name, t)
    }
    marker = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    prefix = "model.diffusion_model." if "pos_frequencies" in tensors else ""
    save_file({prefix + name: t for name, t in {**stored, **inputs, **marker}.items()}, path)
    return expected


def scaled_fp8(tensors: Tensors, path: Path) -> Tensors:
    """The newer generation: weight_scale, and a JSON note with every layer."""
    stored, expected = _scaled(tensors, torch.float8_e4m3fn, "weight_scale")
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    notes = {
        name[: -len("weight")] + "comfy_quant": note.clone() for name, t in tensors.items() if is_block_matrix(name, t)
    }
    save_file({**stored, **notes}, path)
    return expected


def metadata_scaled_fp8(tensors: Tensors, path: Path) -> Tensors:
    """The newer generation, with the notes in the file's metadata."""
    stored, expected = _scaled(tensors, torch.float8_e4m3fn, "weight_scale")
    layers = {
        name[: -len(".weight")]: {"format": "float8_e4m3fn"} for name, t in tensors.items() if is_block_matrix(name, t)
    }
    save_file(stored, path, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})})
    return expected


def int8(tensors: Tensors, path: Path) -> Tensors:
    """int8 with a scale per row."""
    stored, expected = _scaled(tensors, torch.int8, "weight_scale")
    note = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
    notes = {
        name[: -len("weight")] + "comfy_quant": note.clone() for name, t in tensors.items() if is_block_matrix(name, t)
    }
    save_file({**stored, **notes}, path)
    return expected


def _scaled(tensors: Tensors, dtype: torch.dtype, scale_name: str) -> tuple[Tensors, Tensors]:
    stored, expected = {}, {}
    for name, tensor in tensors.items():
        if is_block_matrix(name, tensor):
            rows = tuple(range(1, tensor.ndim))
            magnitude = tensor.abs().amax(rows, keepdim=True) if dtype == torch.int8 else tensor.abs().max()
            scale = magnitude.float() / (127 if dtype == torch.int8 else torch.finfo(dtype).max)
            scaled = tensor.float() / scale
            stored[name] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
            stored[name[: -len("weight")] + scale_name] = scale
            expected[name] = stored[name].float() * scale
        else:
            stored[name] = tensor.to(torch.bfloat16)
            expected[name] = stored[name].float()
    return stored, expected


def bitsandbytes_int8(tensors: Tensors, path: Path) -> Tensors:
    """int8 with each row's largest magnitude, and a tensor stating that rows are not tiled."""
    stored, expected = _scaled(tensors, torch.int8, "SCB")
    for name in [name for name in stored if name.endswith("SCB")]:
        stored[name] = stored[name].flatten() * 127
        stored[name[: -len("SCB")] + "weight_format"] = torch.tensor(0, dtype=torch.uint8)
    save_file(stored, path)
    return expected


def torchao_int8(tensors: Tensors, path: Path) -> Tensors:
    """Parts of the weights, with their classes in the metadata."""
    stored, expected = _scaled(tensors, torch.int8, "_weight_scale")
    metadata = {}
    for layer in [name[: -len("_weight_scale")] for name in stored if name.endswith("_weight_scale")]:
        stored[f"{layer}_weight_qdata"] = stored.pop(f"{layer}weight")
        stored[f"{layer}_weight_zero_point"] = torch.zeros_like(stored[f"{layer}_weight_scale"], dtype=torch.int8)
        metadata[f"{layer}weight"] = json.dumps({"_type": "Int8Tensor", "_data": {}})
    save_file(stored, path, metadata)
    return expected


def bitsandbytes_nf4(tensors: Tensors, path: Path) -> Tensors:
    """The table is from a file written by bitsandbytes 0.50.2."""
    table = load_file(BITSANDBYTES)["nf4_64_128.weight.quant_map"]
    stored, expected = {}, {}
    for name, tensor in tensors.items():
        if not is_block_matrix(name, tensor):
            stored[name] = tensor.to(torch.bfloat16)
            expected[name] = stored[name].float()
            continue
        blocks = tensor.float().reshape(-1, 64)
        scales = blocks.abs().amax(1)
        places = (blocks / scales[:, None]).sub(table[:, None, None]).abs().argmin(0).to(torch.uint8)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(tensor.shape)}
        stored |= {
            name: (places[:, ::2] << 4 | places[:, 1::2]).reshape(-1, 1),
            f"{name}.absmax": scales,
            f"{name}.quant_map": table.clone(),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
        expected[name] = (table[places.int()] * scales[:, None]).reshape(tensor.shape)
    save_file(stored, path)
    return expected


def mxfp8(tensors: Tensors, path: Path) -> Tensors:
    """fp8 with a power-of-two scale for each 32 weights, stored as bytes."""

    def quantize(weight: Tensor) -> tuple[Tensors, Tensor]:
        blocks = weight.float().reshape(len(weight), -1, 32)
        exponents = blocks.abs().amax(2).log2().floor() - 8
        values = (blocks / 2 ** exponents[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        meaning = (values.float() * 2 ** exponents[..., None]).reshape(weight.shape)
        return {
            "weight": values.reshape(weight.shape),
            "weight_scale": in_tiles((exponents + 127).to(torch.uint8)),
        }, meaning

    return _with_notes(tensors, path, "mxfp8", quantize)


def nvfp4(tensors: Tensors, path: Path) -> Tensors:
    """fp4 with an fp8 scale for each 16 weights, and one scale for all."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat((table, -table))

    def quantize(weight: Tensor) -> tuple[Tensors, Tensor]:
        blocks = weight.float().reshape(len(weight), -1, 16)
        whole = blocks.abs().max() / (448 * 6)
        scales = (blocks.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
        each = whole * scales.float()[..., None]
        places = (blocks / each).sub(table[:, None, None, None]).abs().argmin(0).to(torch.uint8).flatten(1)
        parts = {
            "weight": places[:, ::2] << 4 | places[:, 1::2],
            "weight_scale": in_tiles(scales),
            "weight_scale_2": whole,
        }
        return parts, (table[places.int()].reshape(blocks.shape) * scales.float()[..., None] * whole).reshape(
            weight.shape
        )

    return _with_notes(tensors, path, "nvfp4", quantize)


def in_tiles(scales: Tensor) -> Tensor:
    """Scales (rows, columns) rearranged into the tiles that GPUs expect: 128 rows by 4 columns."""
    rows, columns = scales.shape
    height, width = -(-rows // 128) * 128, -(-columns // 4) * 4
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = r // 128 * (width // 4) + c // 4
    places = 512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4
    tiled = torch.zeros(height * width, dtype=torch.uint8)
    tiled[places.flatten()] = scales.contiguous().view(torch.uint8).flatten()
    return tiled.view(scales.dtype).reshape(height, width)


def _with_notes(
    tensors: Tensors, path: Path, format: str, quantize: Callable[[Tensor], tuple[Tensors, Tensor]]
) -> Tensors:
    stored, expected = {}, {}
    for name, tensor in tensors.items():
        if is_block_matrix(name, tensor):
            parts, expected[name] = quantize(tensor)
            note = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
            stored |= {name[: -len("weight")] + part: value for part, value in (parts | {"comfy_quant": note}).items()}
        else:
            stored[name] = tensor.to(torch.bfloat16)
            expected[name] = stored[name].float()
    save_file(stored, path)
    return expected


def ggml_safetensors(block_type: str) -> Callable[[Tensors, Path], Tensors]:
    """GGML blocks under the names of the modules, in a safetensors file."""

    def write(tensors: Tensors, path: Path) -> Tensors:
        stored, expected = {}, {}
        for name, tensor in tensors.items():
            if is_block_matrix(name, tensor):
                blocks, expected[name] = to_blocks(tensor, block_type)
                stored[name[: -len("weight")] + f"{block_type}_qweight"] = torch.from_numpy(blocks)
            else:
                stored[name] = tensor.to(torch.bfloat16)
                expected[name] = stored[name].float()
        save_file(stored, path)
        return expected

    return write


def gguf_file(
    block_type: str, architecture: str | None = "mochi", rename: Callable[[str], str] = str, small: str = "F16"
) -> Callable[[Tensors, Path], Tensors]:
    """A GGUF container; `small` is the dtype of the tensors that are not quantised."""

    def write(tensors: Tensors, path: Path) -> Tensors:
        writer = gguf.GGUFWriter(path, architecture or "none")
        if architecture is None:
            del writer.kv_data[0]["general.architecture"]
        expected = {}
        for name, tensor in tensors.items():
            kind = "F32" if tensor.ndim == 1 else block_type if is_block_matrix(name, tensor) else small
            kind = kind if tensor.shape[-1] % 32 == 0 else "F16"
            data, expected[name] = to_blocks(tensor, kind)
            writer.add_tensor(rename(name), data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return expected

    return write


def to_blocks(tensor: Tensor, kind: str) -> tuple[numpy.ndarray, Tensor]:
    """A weight as stored in a GGUF file, and its values; for some types, random blocks."""
    type_ = gguf.GGMLQuantizationType[kind]
    if kind in K_QUANTIZERS:
        data = K_QUANTIZERS[kind](tensor).numpy()
    elif kind.endswith("_K") or kind.startswith("IQ"):
        data = random_blocks(kind, *tensor.shape)
    else:
        data = gguf.quantize(tensor.float().numpy(), type_)
    return data, torch.from_numpy(gguf.dequantize(data, type_).copy()).reshape(tensor.shape)


def random_blocks(kind: str, rows: int, columns: int) -> numpy.ndarray:
    """Random bytes (rows, bytes per row) with scales for weights of variance 1 / columns."""
    type_ = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = numpy.random.default_rng(rows).integers(0, 256, (rows, columns // weights, size), dtype=numpy.uint8)
    if kind == "MXFP4":
        blocks[:, :, 0] = blocks[:, :, 0] % 7 + 116  # exponents
        return blocks.reshape(rows, -1)

    def with_scale(scale: float) -> numpy.ndarray:
        for start in HALVES[kind]:
            blocks[:, :, start : start + 2] = numpy.array([scale], numpy.float16).view(numpy.uint8)
        return blocks.reshape(rows, -1)

    return with_scale(columns**-0.5 / gguf.dequantize(with_scale(1.0), type_).std())


def llama_cpp_name(name: str) -> str:
    """llama.cpp's names for the tensors of a T5 encoder."""
    fixed = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}
    parts = {
        "0.layer_norm": "attn_norm", "1.layer_norm": "ffn_norm", "0.SelfAttention.relative_attention_bias": "attn_rel_b",
        "1.DenseReluDense.wi_0": "ffn_gate", "1.DenseReluDense.wi_1": "ffn_up", "1.DenseReluDense.wo": "ffn_down",
        **{f"0.SelfAttention.{p}": f"attn_{p}" for p in "qkvo"},
    }  # fmt: skip
    match = re.fullmatch(r"encoder\.block\.(\d+)\.layer\.(.*)\.weight", name)
    return f"enc.blk.{match[1]}.{parts[match[2]]}.weight" if match else fixed[name]


BLOCK_TYPES = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
SAFETENSORS: dict[str, Callable[[Tensors, Path], Tensors]] = {
    "plain fp8_e4m3fn": plain_fp8,
    "plain fp8_e5m2": plain_fp8_e5m2,
    "scaled fp8, older": legacy_scaled_fp8,
    "scaled fp8": scaled_fp8,
    "scaled fp8 by metadata": metadata_scaled_fp8,
    "int8": int8,
    "Q4_0 in safetensors": ggml_safetensors("Q4_0"),
    "Q8_0 in safetensors": ggml_safetensors("Q8_0"),
}
OTHER_TOOLS: dict[str, Callable[[Tensors, Path], Tensors]] = {
    "nf4 by bitsandbytes": bitsandbytes_nf4,
    "int8 by bitsandbytes": bitsandbytes_int8,
    "int8 by torchao": torchao_int8,
    "mxfp8": mxfp8,
    "nvfp4": nvfp4,
}
GGUF: dict[str, Callable[[Tensors, Path], Tensors]] = {
    **{f"{kind} gguf": gguf_file(kind) for kind in (*BLOCK_TYPES, "F16", "BF16", "F32")},
    "Q8_0 gguf, pig": gguf_file("Q8_0", "pig", small="F32"),
    "Q5_1 gguf, no architecture": gguf_file("Q5_1", None, small="BF16"),
}
