"""The frames of a video file."""

from __future__ import annotations

import io

import av
import numpy as np


def read_frames(video: bytes) -> np.ndarray:
    """The frames, (F, H, W, 3) uint8."""
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
