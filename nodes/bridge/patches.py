"""Patches that other nodes set on a MODEL's transformer: which ones Mochi's blocks call, and with what.

The host's own Mochi class calls only the patches that replace a block. In addition, blocks here call two that the host's
joint-attention transformers (Flux, Qwen-Image) call: `attn1_output_patch`, with the output of attention for both streams
(normalised attention guidance), and `double_block`, with both streams after the block. Patches that change the inputs of
attention are not called: the host's transformers have several calling conventions for them, and other kinds of position tables.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ...mochi_core.transformer.block import BlockCall, BlockContext, RunBlock, joint_attention, run_block

INPUT_PATCH = "attn1_patch"
OUTPUT_PATCH = "attn1_output_patch"
BLOCK_PATCH = "double_block"


def host_run_block(transformer_options: dict, depth: int, latents: torch.Tensor) -> RunBlock:
    """How to call a block: its index is recorded in the host's options, and the host's patches replace or follow it.

    `latents` (B, 12, T, H, W) are the forward's input.
    """
    replacements = transformer_options.get("patches_replace", {}).get("dit", {})
    patches = transformer_options.get("patches", {}).get(BLOCK_PATCH, ())

    def run(call: BlockCall) -> tuple[torch.Tensor, torch.Tensor]:
        transformer_options.update(block_index=call.index, total_blocks=depth, block_type="double")
        call = _with_output_patches(call, transformer_options)
        x, y = _run_or_replace(call, replacements.get(("double_block", call.index)), transformer_options)
        for patch in patches:
            about = {"x": latents, "block_index": call.index, "transformer_options": transformer_options}
            out = patch({"img": x, "txt": y, **about})
            x, y = out["img"], out.get("txt", y)
        return x, y

    return run


def _run_or_replace(call: BlockCall, replacement, transformer_options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    if replacement is None:
        return run_block(call)

    def original(args):
        img, txt = run_block(replace(call, x=args["img"], y=args["txt"], modulation=args["vec"]))
        return {"img": img, "txt": txt}

    args = {"img": call.x, "txt": call.y, "vec": call.modulation, "transformer_options": transformer_options}
    out = replacement(args, {"original_block": original})
    return out["img"], out["txt"]


def _with_output_patches(call: BlockCall, transformer_options: dict) -> BlockCall:
    """`call` with the patches applied to attention's output (B, N + L, K * D); `img_slice` marks the visual tokens."""
    patches = _output_patches(transformer_options)
    if not patches:
        return call

    def attend(q, k, v, context: BlockContext):
        out = joint_attention(q, k, v, context)
        options = {**transformer_options, "img_slice": [0, out.shape[1] - max(context.lengths)]}
        for patch in patches:
            out = patch(out, options)
        return out

    return replace(call, context=replace(call.context, joint_attention=attend))


def _output_patches(transformer_options: dict) -> list:
    """The output patches of attention that are called.

    Without those that come with an input patch and would undo something it has not done (token merging, HyperTile).
    """
    patches = transformer_options.get("patches", {})
    pairs = {patch.__module__ for patch in patches.get(INPUT_PATCH, ())}
    return [patch for patch in patches.get(OUTPUT_PATCH, ()) if patch.__module__ not in pairs]


def mixes_samples(transformer_options: dict) -> bool:
    """Whether any patch is called; patches may need all samples of a batch together."""
    return bool(_output_patches(transformer_options) or transformer_options.get("patches", {}).get(BLOCK_PATCH))


def warn_of_patches_left_out(transformer_options: dict) -> None:
    """Log which patches of a MODEL are not called in this run."""
    replaced = transformer_options.get("patches_replace", {}).keys() - {"dit"}
    called = {BLOCK_PATCH, *([OUTPUT_PATCH] if _output_patches(transformer_options) else [])}
    names = {*(transformer_options.get("patches", {}).keys() - called), *replaced}
    if "rope_options" in transformer_options:
        names.add("rope_options")
    if names:
        logging.warning("Mochi patches: %s ignored; the node that sets it has no effect.", ", ".join(sorted(names)))
