"""What a file is, and where in it the wanted model lies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...config import AsymmDiTConfig, AsymmVAEConfig
from ..formats.reader import open_tensors
from ..tensors import LazyStateDict
from .diffusers import autoencoder_rules, to_canonical, transformer_rules
from .quantized import resolve, unknown_forms

# What wrappers and whole pipelines put in front of a model's own names, in any combination.
PREFIXES = {
    "transformer": re.compile(r"((module|model|diffusion_model|transformer)\.)*"),
    "vae": re.compile(r"((module|model|vae|first_stage_model)\.)*"),
    "t5": re.compile(r"((module|model|text_encoders?|t5xxl|transformer)\.)*"),
}
# What torch.compile, sharding and activation checkpointing put anywhere in a name; kohya's trainers make dots underscores.
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]")
# Where a diffusers pipeline keeps each part.
SUBFOLDERS = {"transformer": "transformer", "vae": "vae", "t5": "text_encoder"}
SIGNATURES = {
    "transformer": ("t5_yproj.weight", "time_embed.caption_proj.weight"),
    "vae": (
        "decoder.blocks.0.0.weight", "encoder.layers.0.weight", "blocks.0.0.weight", "layers.0.weight",
        "decoder.block_in.resnets.0.conv1.conv.weight", "encoder.block_in.resnets.0.conv1.conv.weight",
    ),
    "t5": ("encoder.block.0.layer.0.SelfAttention.q.weight", "enc.blk.0.attn_q.weight"),
}  # fmt: skip
LLAMA_CPP_T5 = {
    "attn_norm": "0.layer_norm", "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    **{f"attn_{part}": f"0.SelfAttention.{part}" for part in "qkvo"},
    "ffn_norm": "1.layer_norm", "ffn_gate": "1.DenseReluDense.wi_0", "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}  # fmt: skip
NAMES = {
    "transformer": ("a Mochi transformer", "mochi_preview_bf16.safetensors"),
    "vae": ("a Mochi autoencoder", "mochi_vae.safetensors"),
    "t5": ("a T5 text encoder", "t5xxl_fp16.safetensors"),
}
# How other files are known: a phrase, and tensor names (as patterns) that all occur.
STRANGERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA", (r".*(lora_A|lora_B|lora_down|lora_up)(\.weight)?",)),
    ("a HunyuanVideo transformer", (r".*double_blocks\.0\..*", r".*txt_in\.individual_token_refiner.*")),
    ("a FLUX transformer", (r".*double_blocks\.0\.img_attn.*",)),
    ("a Wan transformer", (r".*blocks\.0\.cross_attn\..*", r".*patch_embedding\..*")),
    ("an LTX transformer", (r".*transformer_blocks\.0\.scale_shift_table", r".*caption_projection\..*")),
    ("a CogVideoX transformer", (r".*transformer_blocks\.0\.norm1\.linear.*", r".*patch_embed\.text_proj.*")),
    ("an SD3 transformer", (r".*joint_blocks\.0\..*",)),
    ("a Stable Diffusion UNet", (r".*input_blocks\.0\.0\.weight",)),
    ("a CLIP text encoder", (r".*text_model\.encoder\.layers\.0\..*",)),
    ("an image autoencoder", (r".*decoder\.(mid|mid_block|up_blocks\.0\.resnets\.0\.norm1)\..*",)),
)


def open_part(path: str | Path, part: str) -> LazyStateDict:
    """`find_part` in a file, in a folder, or in the subfolder of a diffusers pipeline that has it.

    Raises:
        FileNotFoundError, ValueError: see `open_tensors` and `find_part`.
    """
    path = Path(path)
    if (path / SUBFOLDERS[part]).is_dir():
        path = path / SUBFOLDERS[part]
    return find_part(open_tensors(path).tensors, part, file_label(path))


def file_label(path: Path) -> str:
    """What messages call a file or folder."""
    return str(path) if path.is_dir() else path.name


@contextmanager
def blaming(file_name: str) -> Iterator[None]:
    """Put the name of the file in front of what is wrong with its tensors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file_name} does not fit Mochi: {error}") from error


def find_part(tensors: LazyStateDict, part: str, file_name: str) -> LazyStateDict:
    """The tensors of "transformer", "vae" or "t5" under their canonical names, whatever the file calls them.

    Prefixes are stripped, diffusers' names converted, tensors of other models left out. Names of the autoencoder always
    begin with `encoder.` or `decoder.`. A quantised weight is one tensor, with its stored form in `quantized`.

    Raises:
        ValueError: the file holds no such model, or holds it in a form that cannot be loaded.
    """
    with blaming(file_name):
        found = _strip(resolve(tensors), part)
    if found is None:
        wanted, example = NAMES[part]
        raise ValueError(f"{file_name} holds {describe(tensors)}, not {wanted}; choose a file such as {example}.")
    if forms := unknown_forms(found):
        raise ValueError(
            f"{file_name} has weights in a form that cannot be read: {', '.join(sorted(forms))}; use another file."
        )
    with blaming(file_name):
        return CONVERT[part](found)


def parts_of(tensors: LazyStateDict) -> list[str]:
    """Which of "transformer", "vae" and "t5" are there."""
    resolved = resolve(tensors)
    return [part for part in PREFIXES if _strip(resolved, part) is not None]


def describe(tensors: LazyStateDict) -> str:
    """One phrase for what a file holds."""
    tensors = resolve(tensors)
    parts = [_describe_part(part, found) for part in PREFIXES if (found := _strip(tensors, part)) is not None]
    if parts:
        return " and ".join(parts)
    if not tensors:
        return "no tensors"
    for phrase, patterns in STRANGERS:
        if all(any(re.fullmatch(pattern, name) for name in tensors) for pattern in patterns):
            return phrase
    return f"an unknown model of {len(tensors)} tensors (e.g. {', '.join(list(tensors)[:3])})"


def _describe_part(part: str, tensors: LazyStateDict) -> str:
    layout = " in diffusers layout" if any("resnets." in n or n.startswith("time_embed.") for n in tensors) else ""
    blocks = {
        m[2]
        for name in tensors
        if (m := re.match(r"(transformer_blocks|blocks|encoder\.block|enc\.blk)\.(\d+)\.", name))
    }
    depth = f", {len(blocks)} blocks" if part != "vae" else ""
    forms = sorted({tensor.form for tensor in tensors.values()})
    return f"{NAMES[part][0]}{layout}{depth}, {' and '.join(forms)}"


def _strip(tensors: LazyStateDict, part: str) -> LazyStateDict | None:
    unwrapped = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if len(unwrapped) < len(tensors):
        raise ValueError("it holds tensors twice, under names with and without wrappers; use another file.")
    prefixes = {name.removesuffix(end) for name in unwrapped for end in SIGNATURES[part] if name.endswith(end)}
    for prefix in sorted(filter(PREFIXES[part].fullmatch, prefixes), key=len):
        found = {name.removeprefix(prefix): t for name, t in unwrapped.items() if name.startswith(prefix)}
        return found if part != "vae" or _is_mochi_vae(found) else None
    return None


def _is_mochi_vae(tensors: LazyStateDict) -> bool:
    marks = (r"(decoder\.)?blocks\.0\.1\.stack\.2\.weight", r"(encoder\.)?layers\.1\.stack\.2\.weight")
    peers = (
        r"decoder\.block_in\.resnets\.0\.conv1\.conv\.weight",
        r"encoder\.block_in\.resnets\.0\.conv1\.conv\.weight",
    )
    return any(re.fullmatch(mark, name) for mark in marks + peers for name in tensors)


def _canonical_transformer(tensors: LazyStateDict) -> LazyStateDict:
    if "t5_yproj.weight" in tensors:
        return tensors
    return to_canonical(tensors, transformer_rules(_count(tensors, r"transformer_blocks\.(\d+)\..*")))


def _canonical_vae(tensors: LazyStateDict) -> LazyStateDict:
    if "blocks.0.0.weight" in tensors:
        return {f"decoder.{name}": tensor for name, tensor in tensors.items()}
    if "layers.0.weight" in tensors:
        return {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    halves = {name: tensor for name, tensor in tensors.items() if name.startswith(("encoder.", "decoder."))}
    if not any(".resnets." in name for name in halves):
        return halves
    rules = autoencoder_rules(_resnets(halves, "encoder.down_blocks"), _resnets(halves, "decoder.up_blocks"))
    return to_canonical(halves, rules)


def _resnets(tensors: LazyStateDict, stages: str) -> tuple[int, ...]:
    """How many residual blocks one half of a diffusers autoencoder has before, in and after its stages."""
    half = stages.partition(".")[0]
    numbered = [f"{stages}.{i}" for i in range(_count(tensors, re.escape(stages) + r"\.(\d+)\..*"))]
    places = [f"{half}.block_in", *numbered, f"{half}.block_out"]
    return tuple(_count(tensors, re.escape(place) + r"\.resnets\.(\d+)\..*") for place in places)


def _canonical_t5(tensors: LazyStateDict) -> LazyStateDict:
    """Files hold the token embedding under one of two names, or under both; GGUF files have names of their own."""
    tensors = {_from_llama_cpp(name): tensor for name, tensor in tensors.items()}
    canonical = {name: tensor for name, tensor in tensors.items() if name != "encoder.embed_tokens.weight"}
    if "encoder.embed_tokens.weight" in tensors:
        canonical.setdefault("shared.weight", tensors["encoder.embed_tokens.weight"])
    return canonical


def _from_llama_cpp(name: str) -> str:
    names = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
    if (match := re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", name)) and match[2] in LLAMA_CPP_T5:
        return f"encoder.block.{match[1]}.layer.{LLAMA_CPP_T5[match[2]]}.weight"
    return names.get(name, name)


CONVERT: dict[str, Callable[[LazyStateDict], LazyStateDict]] = {
    "transformer": _canonical_transformer,
    "vae": _canonical_vae,
    "t5": _canonical_t5,
}


def dit_config(tensors: LazyStateDict) -> AsymmDiTConfig:
    """Read the sizes of a denoiser from its canonical tensors."""
    dx, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    dy, text_width = shape_of(tensors, "t5_yproj.weight")
    last_y = shape_of(tensors, "blocks.0.mlp_y.w2.weight")[1] if "blocks.0.mlp_y.w2.weight" in tensors else 0
    return AsymmDiTConfig(
        depth=_count(tensors, r"blocks\.(\d+)\..*"),
        hidden_size_x=dx,
        hidden_size_y=dy,
        num_heads=shape_of(tensors, "pos_frequencies", 3)[1],
        in_channels=channels,
        patch_size=patch,
        text_width=text_width,
        mlp_size_x=shape_of(tensors, "blocks.0.mlp_x.w2.weight")[1],
        mlp_size_y=last_y,
        timestep_features=shape_of(tensors, "t_embedder.mlp.0.weight")[1],
    )


def vae_config(tensors: LazyStateDict) -> AsymmVAEConfig:
    """Read the sizes of an autoencoder from its canonical tensors; a half that is not there keeps the defaults."""
    sizes = _encoder_sizes(tensors) if has_encoder(tensors) else {}
    return AsymmVAEConfig(**sizes, **(_decoder_sizes(tensors) if has_decoder(tensors) else {}))


def has_encoder(tensors: LazyStateDict) -> bool:
    return any(name.startswith("encoder.") for name in tensors)


def has_decoder(tensors: LazyStateDict) -> bool:
    return any(name.startswith("decoder.") for name in tensors)


def _decoder_sizes(tensors: LazyStateDict) -> dict[str, Any]:
    """Every stage doubles height and width; what is left of a projection's rows is its temporal expansion."""
    stages = _count(tensors, r"decoder\.blocks\.(\d+)\.proj\.weight")
    projections = [shape_of(tensors, f"decoder.blocks.{i + 1}.proj.weight") for i in range(stages)]
    widths = (*(columns for _, columns in projections), shape_of(tensors, "decoder.output_proj.weight")[1])
    counts = [_count(tensors, rf"decoder\.blocks\.{i + 1}\.blocks\.(\d+)\..*") for i in range(stages)]
    head = _count(tensors, r"decoder\.blocks\.0\.(\d+)\..*") - 1
    tail = _count(tensors, rf"decoder\.blocks\.{stages + 1}\.(\d+)\..*")
    return {
        "decoder_channels": widths,
        "decoder_blocks": (head, *counts, tail),
        "temporal_expansions": tuple(rows // (4 * w) for (rows, _), w in zip(projections, widths[1:], strict=True)),
        "spatial_expansions": (2,) * stages,
    }


def _encoder_sizes(tensors: LazyStateDict) -> dict[str, Any]:
    stage_of = re.compile(r"encoder\.layers\.(\d+)\.layers\.0\.weight")
    stages = sorted(int(m[1]) for name in tensors if (m := stage_of.fullmatch(name)))
    total = _count(tensors, r"encoder\.layers\.(\d+)\..*")
    convs = [shape_of(tensors, f"encoder.layers.{i}.layers.0.weight", 5) for i in stages]
    inside = [_count(tensors, rf"encoder\.layers\.{i}\.layers\.(\d+)\..*") - 1 for i in stages]
    head, tail = (stages[0] - 1, total - stages[-1] - 1) if stages else (total - 1, 0)
    places = ["1", *(f"{i}.layers.1" for i in stages), str(total - 1)]
    return {
        "encoder_channels": (shape_of(tensors, "encoder.layers.0.weight")[0], *(conv[0] for conv in convs)),
        "encoder_blocks": (head, *inside, tail),
        "encoder_attention": tuple(f"encoder.layers.{p}.attn_block.norm.weight" in tensors for p in places),
        "temporal_reductions": tuple(conv[2] for conv in convs),
        "spatial_reductions": tuple(conv[3] for conv in convs),
    }


def shape_of(tensors: LazyStateDict, name: str, axes: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that the file must have, with so many axes of at least 1; ValueError otherwise."""
    if name not in tensors:
        raise ValueError(f"it lacks {name}, which is needed to tell its size; download it again.")
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise ValueError(f"{name} is {shape}, but needs {axes} axes of at least 1; download it again.")
    return shape


def _count(tensors: LazyStateDict, pattern: str) -> int:
    """How many different numbers stand where the pattern's group is."""
    return len({match[1] for name in tensors if (match := re.fullmatch(pattern, name))})
