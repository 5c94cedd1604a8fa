"""Read frames from files: images, and videos at Mochi's frame rate."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..geometry import FPS

if TYPE_CHECKING:
    from av import VideoFrame
    from av.filter import Graph

# FFmpeg filters by a video's rotation metadata in degrees, counterclockwise: phones store frames sideways and leave rotating
# them to the player.
UPRIGHT = {
    90: [("transpose", "cclock")],
    -90: [("transpose", "clock")],
    180: [("hflip", ""), ("vflip", "")],
    -180: [("hflip", ""), ("vflip", "")],
}


def read_image(path: str | Path) -> np.ndarray[Any, Any]:
    """An image as one frame (1, H, W, 3) uint8, rotated upright according to its EXIF orientation.

    Raises:
        ValueError: it is not a readable image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError  # optional outside ComfyUI

    _check_file(Path(path))
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image) or image
            return np.asarray(upright.convert("RGB"))[None]
    except UnidentifiedImageError as error:
        raise ValueError("it is not an image, or an unsupported type; save it as PNG or JPEG.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read ({error}); save the image again, as PNG or JPEG.") from error


def read_frames(path: str | Path, height: int, width: int, most: int | None = None) -> np.ndarray[Any, Any]:
    """The first frames of a video at 30 frames per second, resized and centre-cropped, (F, height, width, 3) uint8.

    `most` is the maximum number of frames, None for all.

    Raises:
        ValueError: it is not a readable video, or it has no frames.
    """
    import av  # optional outside ComfyUI, and slow to import
    from av.error import FFmpegError

    _check_file(Path(path))
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream; choose a video.")
            frames = islice(_resampled(container.decode(video=0), height, width), most)
            images = [frame.to_ndarray(format="rgb24") for frame in frames]
    except (FFmpegError, OSError) as error:
        raise ValueError(
            f"it cannot be read ({error.strerror or error}); choose a video, or convert it to mp4."
        ) from error
    if not images:
        raise ValueError("it has no frames; choose another video.")
    return np.stack(images)


def _check_file(path: Path) -> None:
    """Raise a ValueError unless `path` is a regular file: reading a pipe may block forever, and a device may never end."""
    if path.is_dir():
        raise ValueError("it is a folder; choose a file.")
    if not path.exists():
        raise ValueError("there is no such file; check the name.")
    if not path.is_file():
        raise ValueError("it is a pipe or a device; save its output to a file, and choose that.")


def _resampled(frames: Iterator[VideoFrame], height: int, width: int) -> Iterator[VideoFrame]:
    """Upright frames of that size, 30 per second, from FFmpeg's filters."""
    first = next(frames, None)
    if first is None:
        return
    graph = _filters(first, height, width)
    for frame in chain([first], frames, [None]):  # None flushes the graph
        graph.vpush(frame)
        while True:
            try:
                yield graph.vpull()
            except (BlockingIOError, EOFError):  # it needs another frame, or is done
                break


def _filters(frame: VideoFrame, height: int, width: int) -> Graph:
    from av.filter import Graph

    shape = f"{width}:{height}"
    steps = [
        ("fps", str(FPS)),
        *UPRIGHT.get(frame.rotation, ()),
        ("scale", f"{shape}:force_original_aspect_ratio=increase:flags=bicubic+accurate_rnd+full_chroma_int"),
        ("crop", shape),
        ("format", "rgb24"),
        ("buffersink", ""),
    ]
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, *(graph.add(name, options) for name, options in steps)).configure()
    return graph
