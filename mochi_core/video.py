"""Videos as arrays and as mp4 files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FPS = 30
"""Mochi's frame rate."""
CRF = "17"


def to_unit_range(video: Tensor) -> Tensor:
    """Decoder output, nominally [-1, 1], to float32 in [0, 1]."""
    return (video.float() * 0.5 + 0.5).clamp(0, 1)


def save_video(frames: np.ndarray[Any, Any] | Tensor, path: str | Path, fps: int = FPS) -> None:
    """Write one video as H.264 mp4.

    Args:
        frames: (F, H, W, 3) or (1, F, H, W, 3); floats in [0, 1] or uint8; even H and W.
        path: where to; the folder must exist.
        fps: frames per second.

    Raises:
        ValueError: another shape.
    """
    import av  # optional outside ComfyUI, and slow to import

    images = _as_uint8(frames)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": CRF})
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _as_uint8(frames: np.ndarray[Any, Any] | Tensor) -> np.ndarray[Any, Any]:
    images = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if images.ndim == 5 and len(images) == 1:
        images = images[0]
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"frames have shape {tuple(frames.shape)}; one video is (frames, height, width, 3).")
    if images.dtype == np.uint8:
        return images
    return (images.clip(0, 1) * 255).round().astype(np.uint8)
