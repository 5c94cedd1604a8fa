"""A LoRA that was trained here for a new colour, in Python; in a server, see test_in_comfyui.py."""

import torch

from mochi_core import MochiPipeline, VideoSize, load_lora, load_transformer
from mochi_core.train.prepare import read_video
from mochi_core.train.tiny.shapes import OUTLINES
from tests.harness import trained
from tests.harness.semantics import main_color, videos

PROMPTS = [f"a purple {shape} {motion}" for shape in OUTLINES for motion in ("moving left", "rising")]


def test_the_new_color_appears_with_the_lora_and_not_without(pipe, purple_loras):
    assert len(purple_loras) == 2
    without = [main_color(frames) for frames in videos(pipe, PROMPTS)]
    print("without:", without)
    assert without.count("purple") <= 2
    for path in purple_loras:
        dit = load_transformer(trained.TRANSFORMER, torch.float32)
        lora = load_lora(dit, path)
        with_lora = MochiPipeline(dit, pipe.vae, pipe.text_encoder)
        found = [main_color(frames) for frames in videos(with_lora, PROMPTS)]
        print(path.name, found)
        assert found.count("purple") >= 6
        lora.remove()
        again = [main_color(frames) for frames in videos(with_lora, PROMPTS)]
        assert again == without


def test_samples_on_the_way_show_the_new_color(purple_loras):
    video = read_video(purple_loras[0].parent / "samples" / "step_000200-1.mp4", VideoSize(64, 64, 13))
    assert main_color(video / 255) == "purple"
