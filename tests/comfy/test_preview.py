"""During sampling, an animated preview of the video is shown."""

import io
import struct

import pytest
from PIL import Image

from tests.harness.client import ComfyClient
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.graphs import SAMPLER, node, upto_sampler

FRAMES = 25
LATENTS = 5


def graph(**inputs):
    return {**upto_sampler(num_frames=FRAMES, **inputs), "see": node("PreviewAny", source=[SAMPLER, 0])}


def images(run):
    for preview in run.previews:
        (length,) = struct.unpack(">I", preview[:4])
        yield Image.open(io.BytesIO(preview[4 + length :]))


def test_preview_is_a_moving_picture_of_all_latent_frames(comfy_client):
    shown = list(images(comfy_client.run(graph())))
    assert shown
    for image in shown:
        assert (image.format, image.size) == ("WEBP", (11 * 96 // 8, 11 * 64 // 8))
        assert image.n_frames == LATENTS


def test_stock_sampler_shows_the_same(comfy_client):
    prompt = graph()
    inputs = prompt[SAMPLER]["inputs"]
    size = {key: inputs[key] for key in ("width", "height")}
    prompt["empty"] = node("EmptyMochiLatentVideo", **size, length=FRAMES, batch_size=1)
    prompt[SAMPLER] = node(
        "KSampler",
        **{key: inputs[key] for key in ("model", "positive", "negative", "seed", "steps", "cfg", "denoise")},
        latent_image=["empty", 0], sampler_name="euler", scheduler="linear_quadratic",
    )  # fmt: skip
    (image, *_) = images(comfy_client.run(prompt))
    assert (image.format, image.n_frames) == ("WEBP", LATENTS)


def test_the_servers_setting_is_followed(comfy_server):
    run = ComfyClient(comfy_server.url, preview_method="none").run(graph())
    assert run.outcome == "execution_success"
    assert not run.previews


@pytest.mark.parametrize("setting", ["auto", "taesd", "latent2rgb"])
def test_every_way_of_previewing_shows_it(comfy_server, setting):
    assert ComfyClient(comfy_server.url, setting).run(graph()).previews


SIZES = """
from pack.nodes.bridge.preview import AnimatedPreview, enlarged
from io import BytesIO
from PIL import Image

for height, width in ((8, 8), (8, 12), (60, 106), (106, 60), (128, 128)):
    frames = torch.randint(256, (2, height, width, 3), dtype=torch.uint8)
    image = Image.open(BytesIO(AnimatedPreview(enlarged(frames)).content))
    factor = image.width // width
    assert torch.equal(enlarged(frames)[:, ::factor, ::factor], frames)
    print(*image.size)
"""


def test_small_previews_are_enlarged(comfy_path):
    """By an integer factor, to about 128 pixels; those of the released model stay as they are."""
    sizes = run_in_comfyui(comfy_path, SIZES).stdout.splitlines()
    assert sizes == ["128 128", "132 88", "106 60", "60 106", "128 128"]


BUDGET = """
import time
from pack.nodes.bridge.preview import MAX_TIME_FRACTION, MochiLatents, Previewer

sent = []
comfy.utils.set_progress_bar_global_hook(lambda *args, **_: sent.append(args))
previewer = Previewer(MochiLatents())
latents = torch.randn(1, 12, 28, 60, 106)
previewer.show(0, latents, 64)
cost = previewer.spent
print(len(sent), cost > 0)
for elapsed in (0.9, 1.1):
    previewer.spent = cost
    previewer.started = time.perf_counter() - elapsed * cost / MAX_TIME_FRACTION
    previewer.show(1, latents, 64)
    print(len(sent))
"""


def test_previews_stay_a_hundredth_of_the_time(comfy_path):
    """The first is sent at once; the next only after a hundred times its cost has passed."""
    assert run_in_comfyui(comfy_path, BUDGET).stdout.split() == ["1", "True", "1", "2"]
