"""Draw docs/images/image_to_video.png with the tiny model: `python -m tests.harness.contact_sheet`.

A row for each way to make a video from images; given frames have a border. "Held in time" works as with weights that take a
single noise level for all frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from mochi_core import MochiPipeline, load_transformer
from mochi_core.io.video import as_images
from mochi_core.rounds import in_rounds
from mochi_core.train.tiny.shapes import COLORS, Scene, Sprite, draw
from tests.harness import trained
from tests.harness.server import ROOT

PATH = ROOT / "docs" / "images" / "image_to_video.png"
PROMPT = "a yellow star moving to the right"
SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 32}
COLUMNS, SIDE, GAP, TEXT = 9, 112, 6, 22


def main() -> None:
    torch.set_num_threads(1)
    sprite = Sprite("star", COLORS["yellow"], "right", 0.17, (0.18, -0.25), 0.45)
    clip = draw(Scene((sprite,), ((0.03, 0.03, 0.03),) * 2), 25, 64, 64)
    whole = trained.pipeline()
    dit = load_transformer(trained.TRANSFORMER, torch.float32, frame_levels=False)
    pipe = MochiPipeline(dit, whole.vae, whole.text_encoder)  # holds them in time
    first, last = clip[0], clip[-1]
    rows = [
        ("the clip that the images are from", clip, range(25)),
        ("the prompt alone", pipe(PROMPT, num_frames=25, **SIZE)[0], ()),
        ("from the first image, held in time", pipe(PROMPT, num_frames=25, image=first, **SIZE)[0], (0,)),
        (
            "from the first image, with noise levels by frame",
            whole(PROMPT, num_frames=25, image=first, **SIZE)[0],
            (0,),
        ),
        (
            "between the first image and the last one, with noise levels by frame",
            whole(PROMPT, num_frames=25, image=first, last_image=last, **SIZE)[0],
            (0, *range(19, 25)),
        ),
        (
            "two rounds, with noise levels by frame: from the first image, then from the last 7 frames",
            in_rounds(whole, 37, 25, prompt=PROMPT, keep=7, image=first, **SIZE),
            (0,),
        ),
    ]
    write_sheet([(f"{title} ({len(frames)} frames)", as_images(frames), given) for title, frames, given in rows], PATH)


def write_sheet(rows: list[tuple[str, list[Image.Image], Any]], path: Path) -> None:
    """Each row has a title, frames, and the indices of those that get a border."""
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, len(rows) * (SIDE + TEXT + GAP) + GAP), "white")
    for number, row in enumerate(rows):
        add_row(sheet, GAP + number * (SIDE + TEXT + GAP), *row)
    sheet.quantize(128).save(path, optimize=True)
    print(path.relative_to(ROOT), path.stat().st_size)


def add_row(sheet: Image.Image, top: int, title: str, images: list[Image.Image], given: Any) -> None:
    """Nine evenly spaced frames under the title."""
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, top + 2), title, "black", ImageFont.load_default(14))
    for column in range(COLUMNS):
        index = round(column * (len(images) - 1) / (COLUMNS - 1))
        left, upper = GAP + column * (SIDE + GAP), top + TEXT
        sheet.paste(images[index].resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, upper))
        if index in given:
            pen.rectangle((left - 3, upper - 3, left + SIDE + 2, upper + SIDE + 2), outline="#d97706", width=3)


if __name__ == "__main__":
    main()
