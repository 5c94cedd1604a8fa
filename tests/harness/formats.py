"""Every file format for the parts of a model, as functions that write it."""

import json
import re
from dataclasses import replace

import gguf
import torch
from safetensors.torch import save_file

from mochi_core.quantization.weights import QuantizedLinear
from tests.harness import quantized_files
from tests.harness.quantized_files import GGUF, OTHER_TOOLS, SAFETENSORS, gguf_file, llama_cpp_name
from tests.harness.tiny_models import DIT, T5_HEADS, random_t5

# Rows of 256 weights, as the K types require.
WIDE = replace(
    DIT, depth=2, hidden_size_x=256, hidden_size_y=256, num_heads=4, text_width=256, mlp_size_x=256, mlp_size_y=256
)
FORMATS = {**SAFETENSORS, **OTHER_TOOLS, **GGUF}


def file_name(form):
    return f"{form}.{'gguf' if 'gguf' in form else 'safetensors'}"


def quantized_layers(module):
    return {name for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}


def flattened_gguf(tensors, path):
    """GGUF tensors have at most four dimensions, so converters flatten the kernels and note their shape."""
    writer, expected = gguf.GGUFWriter(path, "pig"), {}
    for name, tensor in tensors.items():
        kind = "Q8_0" if tensor.ndim == 5 and tensor.numel() % 32 == 0 else "F32"
        flat = tensor.reshape(-1, 32) if kind == "Q8_0" else tensor
        data, meaning = quantized_files.to_blocks(flat, kind)
        expected[name] = meaning.reshape(tensor.shape)
        writer.add_tensor(name, data.reshape(data.shape[0], -1), raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def everything_in(dtype):
    """Quantise everything except norms and biases."""

    def write(tensors, path):
        stored = {name: t.to(dtype) if t.ndim > 1 else t for name, t in tensors.items()}
        save_file(stored, path)
        return {name: t.float() for name, t in stored.items()}

    return write


VAE_FORMS = {
    "bf16": everything_in(torch.bfloat16),
    "fp8 throughout": everything_in(torch.float8_e4m3fn),
    "gguf": flattened_gguf,
    **{form: write for form, write in SAFETENSORS.items() if "Q" not in form},
}


def passes(vae):
    """A decoded video, and the latents of an encoded one."""
    generator = torch.Generator().manual_seed(0)
    latents, video = (torch.randn(shape, generator=generator) for shape in ((1, 12, 2, 2, 4), (1, 3, 7, 16, 16)))
    return vae.decode(latents), vae.encode(video / 2).mean


def with_duplicate(tensors, path):
    stored = {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}
    save_file({name: t.clone() for name, t in stored.items()}, path)
    return tensors


def embed_tokens_only(tensors, path):
    stored = {"encoder.embed_tokens.weight" if name == "shared.weight" else name: t for name, t in tensors.items()}
    save_file(stored, path)
    return tensors


def in_dtype(dtype):
    def write(tensors, path):
        save_file({name: t.to(dtype) for name, t in tensors.items()}, path)
        return {name: t.to(dtype).float() for name, t in tensors.items()}

    return write


def all_fp8(tensors, path):
    """Everything in fp8, including embedding and norms, as in t5xxl_fp8_e4m3fn."""
    return in_dtype(torch.float8_e4m3fn)(tensors, path)


def sharded(suffix, save):
    def write(tensors, path):
        path.mkdir()
        names = list(tensors)
        shards = {f"model-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
        for shard, part in shards.items():
            save({name: tensors[name].clone() for name in part}, path / shard)
        index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
        (path / f"model.{suffix}.index.json").write_text(json.dumps(index))
        return tensors

    return write


def whole_t5(tensors):
    """A complete T5 of transformers, including decoder and output layer, around an encoder's tensors."""
    from transformers import T5Config, T5ForConditionalGeneration

    vocabulary, width = tensors["shared.weight"].shape
    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=width // T5_HEADS, d_ff=2 * width, num_heads=T5_HEADS, num_layers=2,
        num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    return model


def saved_by_transformers(tensors, path):
    whole_t5(tensors).save_pretrained(path)
    return tensors


def pytorch_model_bin(tensors, path):
    """As in google/t5-v1_1-xxl, with the embedding under all of its names."""
    path.mkdir()
    torch.save(whole_t5(tensors).state_dict(), path / "pytorch_model.bin")
    (path / "config.json").write_text('{"model_type": "t5"}')
    return tensors


def whole_gguf(tensors, path):
    """The names come from llama.cpp's own table."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, 2)
    whole = {name: tensor for name, tensor in whole_t5(tensors).state_dict().items() if "embed_tokens" not in name}

    def name_of(name):
        return names.get_name(name, (".weight",)) or name

    meaning = gguf_file("BF16", "t5", name_of, small="F16")(whole, path)
    return {name: meaning[name] for name in tensors}


def with_what_comfyui_adds(tensors, path):
    """Under SDXL's prefix, with the additional tensors of other text encoders."""
    prefixed = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in tensors.items()}
    extras = {"logit_scale": torch.tensor(4.6), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    extras |= {"text_projection.weight": torch.ones(2, 2), "n_averaged": torch.tensor(3)}
    save_file(prefixed | {f"conditioner.embedders.0.transformer.{name}": t for name, t in extras.items()}, path)
    return tensors


T5_FORMS = {
    **SAFETENSORS,
    **{str(dtype): in_dtype(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)},
    "all fp8": all_fp8,
    "duplicate embedding": with_duplicate,
    "embedding under its other name": embed_tokens_only,
    "sharded": sharded("safetensors", save_file),
    "sharded, by torch.save": sharded("bin", torch.save),
    "Q4_0 gguf": gguf_file("Q4_0", "t5"),
    "Q8_0 gguf, names of llama.cpp": gguf_file("Q8_0", "t5encoder", llama_cpp_name, small="Q8_0"),
    "BF16 gguf, names of llama.cpp": gguf_file("BF16", "t5", llama_cpp_name, small="F16"),
    "whole, by transformers": saved_by_transformers,
    "whole, by torch.save": pytorch_model_bin,
    "whole gguf, names of llama.cpp": whole_gguf,
    "with what belongs to no encoder": with_what_comfyui_adds,
}


def shallow_t5():
    """An encoder with only two blocks."""
    return {name: tensor for name, tensor in random_t5().items() if not re.match(r"encoder\.block\.([2-9]|\d\d)", name)}
