"""Videos as arrays and as mp4 files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..geometry import FPS
from ..output_files import replacing

if TYPE_CHECKING:
    from av.container import OutputContainer
    from PIL.Image import Image

ENCODING = {"crf": "18", "mbtree": "0", "threads": "4"}
"""The same frames give the same file, whatever the number of cores; tested on one machine, with one core and with two.

The macroblock tree is off: with it, two encodings of the same frames can differ. A rate factor of 18 without it gives about the
size and quality of 17 with it (noisy drawn clips of 64 x 64 to 848 x 480). The number of threads is fixed, as each encodes a
slice of the frame."""
BT709 = 1
"""Primaries, transfer function and matrix of HD video; the code is the same for all three (ITU-T H.273, tables 2 to 4)."""
LIMITED_RANGE = 1
"""Black is 16 and white 235 out of 255, as players expect (AVCOL_RANGE_MPEG in FFmpeg's libavutil/pixfmt.h)."""


def to_unit_range(video: Tensor) -> Tensor:
    """Decoder output, nominally [-1, 1], to float32 in [0, 1]."""
    return (video.float() * 0.5 + 0.5).clamp(0, 1)


def save_video(frames: np.ndarray[Any, Any] | Tensor, path: str | Path, fps: int = FPS) -> None:
    """Write one video as H.264 mp4 in BT.709 colour; the same frames give the same file.

    Args:
        frames: (F, H, W, 3) or (1, F, H, W, 3); floats in [0, 1] or uint8; even H and W.
        path: where to write it; the folder must exist.
        fps: frames per second.

    Raises:
        ValueError: the shape is wrong, or the height or width is odd.
        OSError: it cannot be written.
    """
    with video_file(path, fps) as writer:
        writer.write(frames)


@contextmanager
def video_file(path: str | Path, fps: int = FPS) -> Iterator[VideoWriter]:
    """Write an H.264 mp4 while its frames are made; the file appears only if all goes well.

    Raises:
        OSError: it cannot be written.
    """
    import av  # optional outside ComfyUI, and slow to import

    with replacing(Path(path)) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        writer = VideoWriter(container, fps)
        yield writer
        container.mux(writer.stream.encode())


class VideoWriter:
    """Writes the frames of a `video_file`, converted to limited-range BT.709 and tagged so that players need not guess."""

    def __init__(self, container: OutputContainer, fps: int) -> None:
        self.container = container
        self.stream = container.add_stream("libx264", rate=fps, options=ENCODING)
        self.stream.pix_fmt = "yuv420p"
        codec = self.stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED_RANGE

    def write(self, frames: np.ndarray[Any, Any] | Tensor) -> None:
        """Append frames in any shape that `save_video` accepts."""
        from av import VideoFrame

        images = _as_uint8(frames)
        if not self.stream.codec_context.is_open:
            height, width = images.shape[1:3]
            if height % 2 or width % 2:
                raise ValueError(f"frames are {width} x {height} pixels; H.264 needs even sizes.")
            self.stream.height, self.stream.width = height, width
        for image in images:
            frame = VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format=self.stream.pix_fmt, dst_colorspace=BT709, dst_color_range=LIMITED_RANGE
            )
            self.container.mux(self.stream.encode(frame))


def as_images(frames: np.ndarray[Any, Any] | Tensor) -> list[Image]:
    """Frames of one video, in any shape that `save_video` accepts, as PIL images."""
    from PIL.Image import fromarray  # optional outside ComfyUI

    return [fromarray(frame) for frame in _as_uint8(frames)]


def as_frames(frames: Any) -> Tensor:
    """Frames (F, H, W, 3) in [0, 1], float32 on the CPU, from an image or a video.

    Args:
        frames: an array or tensor (H, W, 3), (F, H, W, 3) or (1, F, H, W, 3), floats in [0, 1] or uint8; or one or several PIL
            images.

    Raises:
        ValueError: the shape or values are wrong.
    """
    try:
        array = _as_array(frames)
    except ValueError as error:
        raise ValueError("Images of a clip have different sizes; make them the same size.") from error
    if array.ndim == 5 and len(array) == 1:
        array = array[0]
    if array.ndim not in (3, 4) or array.shape[-1] not in (3, 4) or 0 in array.shape:
        raise ValueError(f"An image has shape {array.shape}; give (height, width, 3), or (frames, height, width, 3).")
    scaled = torch.from_numpy(array[..., :3].astype(np.float32) / (255 if array.dtype == np.uint8 else 1))
    if not (scaled.min() >= 0 and scaled.max() <= 1):
        raise ValueError(f"An image has values from {scaled.min():.3g} to {scaled.max():.3g}; use 0 to 1, or uint8.")
    return scaled if scaled.ndim == 4 else scaled[None]


def _as_array(frames: Any) -> np.ndarray[Any, Any]:
    if not isinstance(frames, Tensor):
        return np.asarray(frames)
    there = frames.detach().cpu()
    return (there.float() if there.is_floating_point() else there).numpy()  # NumPy has no bfloat16


def _as_uint8(frames: np.ndarray[Any, Any] | Tensor) -> np.ndarray[Any, Any]:
    images = _as_array(frames)
    if images.ndim == 5 and len(images) == 1:
        images = images[0]
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"frames have shape {tuple(frames.shape)}; one video is (frames, height, width, 3).")
    if images.dtype == np.uint8:
        return images
    return (images.clip(0, 1) * 255).round().astype(np.uint8)
