"""Mochi Image to Video."""

from __future__ import annotations

from comfy_api.latest import io

from ..mochi_core.geometry import KEEP_FRAMES, VideoSize
from .bridge.image_to_video import image_to_video
from .category import CATEGORY


def noise_input(name: str, what: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        display_mode=io.NumberDisplay.slider,
        optional=True,
        tooltip=f"How much noise the frames at the {what} get: 0 keeps them as they are, 1 regenerates them. Pusa's authors use "
        "0 to 0.4 for a first image, 0.3 and 0.7 for a first and a last one.",
    )


class ImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1ImageToVideo",
            display_name="Mochi Image to Video",
            category=CATEGORY,
            description="Starts a video from a first image, a last one, or the end of a clip. Weights with a noise level for "
            "each frame, such as Pusa's, were trained for this; with Genmo's it is inpainting in time.",
            search_aliases=["i2v", "image to video", "first frame", "last frame", "extend video", "pusa", "flf2v"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Mochi Transformer, or any other Mochi MODEL."),
                io.Vae.Input("vae", tooltip="From Load Mochi VAE, with an encoder."),
                io.Int.Input("width", default=848, min=16, max=4096, step=16, tooltip="Pixels, a multiple of 16."),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Pixels, a multiple of 16."),
                io.Int.Input(
                    "num_frames",
                    default=163,
                    min=7,
                    max=6001,
                    step=6,
                    tooltip="Frames of the whole video at 30 per second, always 6k + 1; kept frames are included.",
                ),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="The first image, or a clip at 30 frames per second to continue: its last frames are kept. Cropped "
                    "in the middle and resized.",
                ),
                io.Image.Input(
                    "end_image",
                    optional=True,
                    tooltip="The last image, which stands still for 6 frames, because a latent holds 6; or a clip that leads to "
                    "it.",
                ),
                noise_input("start_noise", "start"),
                noise_input("end_noise", "end"),
                io.Int.Input(
                    "keep",
                    default=KEEP_FRAMES,
                    min=1,
                    max=6001,
                    step=6,
                    optional=True,
                    advanced=True,
                    tooltip="The most frames of a clip to keep, 6k + 1; an image is one frame.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="For the sampler; with Genmo's weights, it releases the given frames as the mask says."
                ),
                io.Latent.Output(tooltip="For the latent input of Mochi Sampler, KSampler or SamplerCustomAdvanced."),
                io.Int.Output(
                    "kept_frames",
                    display_name="kept_frames",
                    tooltip="Number of given frames at the beginning; everything after them is new.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, vae, width, height, num_frames,
        start_image=None, end_image=None, start_noise=0.0, end_noise=0.0, keep=KEEP_FRAMES,
    ):  # fmt: skip
        size = VideoSize(height, width, num_frames)
        noise = {"start_noise": start_noise, "end_noise": end_noise}
        return io.NodeOutput(*image_to_video(model, vae, size, start_image, end_image, keep, **noise))
