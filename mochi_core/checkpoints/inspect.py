"""Report what a file contains without reading its weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import AsymmDiTConfig, AsymmVAEConfig, T5EncoderConfig, TinyVAEConfig
from ..shown import sentence, shown, shown_names
from .formats.reader import open_checkpoint
from .loading import NOT_FLOATING, model_spec, state_dict_diff
from .names.detect import describe, find_parts, has_frame_levels, select_part
from .tensors import Checkpoint, LazyStateDict

SHOWN_NAMES = 20


def inspect(path: Path) -> dict[str, Any]:
    """Report what a file or folder contains; `render` formats it as text.

    Raises:
        FileNotFoundError, ValueError: see `open_checkpoint`.
    """
    file = open_checkpoint(path)
    return {
        "file": str(file.path),
        "is": describe(file),
        "parts": {part: _inspect_part(file, part) for part in find_parts(file)},
        "stored": _stored(file.tensors),
        "metadata": file.metadata,
    }


def _inspect_part(file: Checkpoint, part: str) -> dict[str, Any]:
    """The configuration and the tensors that do not fit it, or the reason why there is none."""
    try:
        found = select_part(file, part)
        model = model_spec(found, part)
    except ValueError as error:
        return {"problem": str(error)}
    released = model.config in (AsymmDiTConfig(), AsymmVAEConfig(), T5EncoderConfig(), TinyVAEConfig())
    differences = state_dict_diff(model.parameters, found.tensors)
    report = {"released_sizes": released, "config": asdict(model.config), **differences}
    return report | ({"frame_levels": has_frame_levels(found)} if part == "transformer" else {})


def _stored(tensors: LazyStateDict) -> dict[str, dict[str, int]]:
    """Number of tensors and bytes for each dtype or block type."""
    counts, sizes = Counter[str](), Counter[str]()
    for tensor in (tensor for tensor in tensors.values() if tensor.numel):  # empty ones are marks
        counts[tensor.stored_dtype] += 1
        sizes[tensor.stored_dtype] += tensor.num_bytes
    return {dtype: {"tensors": count, "bytes": sizes[dtype]} for dtype, count in counts.most_common()}


def render(report: dict[str, Any]) -> str:
    """Format the report of `inspect` as text."""
    lines = [f"{sentence(report['file'])}: {report['is']}"]
    for part, found in report["parts"].items():
        lines += ["", *_render_part(part, found)]
    lines += ["", "stored"]
    for dtype, found in report["stored"].items():
        lines.append(f"  {dtype}: {found['tensors']} tensors, {found['bytes'] / 1e9:.3f} GB")
    if report["metadata"]:
        lines += ["", "metadata", *(f"  {shown(key)}: {shown(value)}" for key, value in report["metadata"].items())]
    return "\n".join(lines)


def _render_part(part: str, found: dict[str, Any]) -> list[str]:
    if "problem" in found:
        return [part, f"  {found['problem']}"]
    lines = [part + (", sizes of the released model" if found["released_sizes"] else "")]
    lines += [f"  {key} = {value}" for key, value in found["config"].items()]
    lines += ["  trained with per-frame noise levels"] if found.get("frame_levels") else []
    kinds = ("missing", "unexpected", "misshapen", NOT_FLOATING)
    complete = not any(found[kind] for kind in kinds)
    lines += ["  complete: no tensor is missing or unknown"] if complete else []
    for kind in kinds:
        names = found[kind]
        lines += [f"  {len(names)} {kind}: {shown_names(names, SHOWN_NAMES)}"] if names else []
    return lines
