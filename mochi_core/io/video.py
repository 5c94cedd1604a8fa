"""Videos as arrays and as mp4 files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..geometry import FPS

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
    with VideoWriter(path, fps) as writer:
        writer.write(frames)


class VideoWriter:
    """Context manager that writes an H.264 mp4 while its frames are made; the file is there when all is well at the end."""

    def __init__(self, path: str | Path, fps: int = FPS) -> None:
        import av  # optional outside ComfyUI, and slow to import

        self.path = Path(path)
        self.partial = self.path.with_stem(f".{self.path.stem}.partial")
        self.container = av.open(str(self.partial), mode="w", format="mp4")
        self.stream = self.container.add_stream("libx264", rate=fps, options={"crf": CRF})
        self.stream.pix_fmt = "yuv420p"

    def write(self, frames: np.ndarray[Any, Any] | Tensor) -> None:
        """Append frames, of the shapes that `save_video` takes."""
        from av import VideoFrame

        images = _as_uint8(frames)
        if not self.stream.codec_context.is_open:
            self.stream.height, self.stream.width = images.shape[1:3]
        for image in images:
            self.container.mux(self.stream.encode(VideoFrame.from_ndarray(image, format="rgb24")))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            if failure is None:
                self.container.mux(self.stream.encode())
        finally:
            self.container.close()
        if failure is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)


def _as_uint8(frames: np.ndarray[Any, Any] | Tensor) -> np.ndarray[Any, Any]:
    images = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if images.ndim == 5 and len(images) == 1:
        images = images[0]
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"frames have shape {tuple(frames.shape)}; one video is (frames, height, width, 3).")
    if images.dtype == np.uint8:
        return images
    return (images.clip(0, 1) * 255).round().astype(np.uint8)
