"""Mochi Length, Mochi Sigmas and Mochi Sampler."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..mochi_core.geometry import FPS, TEMPORAL_COMPRESSION, VideoSize, seconds_to_frames
from ..mochi_core.sampling.schedule import check_guidance
from .bridge.sampling import empty_latent, make_sigmas, sample
from .category import CATEGORY

DENOISE = io.Float.Input(
    "denoise",
    default=1.0,
    min=0.01,
    max=1.0,
    step=0.01,
    display_mode=io.NumberDisplay.slider,
    optional=True,
    tooltip="How much of the schedule is run, counted from its end: 0.3 starts at 81 % noise, 0.1 at 35 %. Less noise keeps "
    "more of the video that comes in.",
)


class Length(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1Length",
            display_name="Mochi Length",
            category=CATEGORY,
            description="Seconds to frames: the number of frames, always 6k + 1, that Mochi makes for a video of that length.",
            search_aliases=["seconds", "duration", "mochi frames"],
            inputs=[
                io.Float.Input(
                    "seconds",
                    default=5.4,
                    min=0.2,
                    max=20.0,
                    step=TEMPORAL_COMPRESSION / FPS,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Length at 30 frames per second, in steps of 0.2. Mochi was trained for 5.4 seconds (163 frames).",
                ),
            ],
            outputs=[io.Int.Output("num_frames", display_name="num_frames", tooltip="For Mochi Sampler's num_frames.")],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, seconds):
        frames = seconds_to_frames(seconds)
        return io.NodeOutput(frames, ui=ui.PreviewText(f"{seconds:g} s = {frames} frames at {FPS} per second"))


class Sigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1Sigmas",
            display_name="Mochi Sigmas",
            category=CATEGORY,
            description="Genmo's linear-quadratic noise schedule with all its settings.",
            search_aliases=["linear quadratic", "mochi scheduler", "MochiSigmaSchedule"],
            inputs=[
                io.Int.Input(
                    "steps", default=64, min=1, max=1000, tooltip="Number of sampling steps: 64, or 8 for FastMochi."
                ),
                io.Float.Input(
                    "threshold_noise",
                    default=0.025,
                    min=0.001,
                    max=0.999,
                    step=0.001,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Share of the noise that the linear steps remove: 0.025, or 0.1 for FastMochi.",
                ),
                io.Int.Input(
                    "linear_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="How many linear steps come before the quadratic ones: 0 is half of all; 6 (of 8) for FastMochi.",
                ),
                DENOISE,
            ],
            outputs=[io.Sigmas.Output(tooltip="For Mochi Sampler, SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, steps, threshold_noise=0.025, linear_steps=0, denoise=1.0):
        return io.NodeOutput(make_sigmas(steps, denoise, threshold_noise, linear_steps))


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1Sampler",
            display_name="Mochi Sampler",
            category=CATEGORY,
            description="Makes the latents of a video from noise, or from a LATENT (video to video).",
            search_aliases=["genmo", "video", "text to video", "t2v", "mochi text to video", "MochiSampler"],
            inputs=[
                io.Model.Input("model", lazy=True, tooltip="From Load Mochi Transformer, or any other Mochi MODEL."),
                io.Conditioning.Input("positive", lazy=True, tooltip="What the video shows."),
                io.Conditioning.Input("negative", lazy=True, tooltip="What it does not show; usually an empty prompt."),
                io.Int.Input(
                    "width",
                    default=848,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="Pixels, a multiple of 16; Mochi was trained for 848.",
                ),
                io.Int.Input(
                    "height",
                    default=480,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="Pixels, a multiple of 16; Mochi was trained for 480.",
                ),
                io.Int.Input(
                    "num_frames",
                    default=163,
                    min=1,
                    max=6001,
                    step=6,
                    tooltip="Frames at 30 per second, always 6k + 1: 31 is one second, 163 is what Mochi was trained for.",
                ),
                io.Int.Input(
                    "steps", default=64, min=1, max=1000, tooltip="More steps are slower and finer; Genmo uses 64."
                ),
                io.Float.Input(
                    "cfg",
                    default=4.5,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance: how strictly the prompt is followed; 4.5, or 1.5 for FastMochi. 1 is off, and twice as "
                    "fast.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed makes the same video, here and in KSampler.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Videos made at once from one prompt.",
                ),
                DENOISE,
                io.Latent.Input(
                    "latent",
                    optional=True,
                    lazy=True,
                    tooltip="Start from this video; its size replaces width, height and num_frames.",
                ),
                io.Sigmas.Input(
                    "sigmas", optional=True, lazy=True, tooltip="Noise levels that replace steps and denoise."
                ),
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    lazy=True,
                    tooltip="A sampler to use instead of Euler, which is Genmo's: Mochi Invert, Mochi RF Edit, or one from "
                    "KSamplerSelect.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The video as latents; Tiled VAE Decode (Mochi) turns it into frames.")],
        )

    @classmethod
    def check_lazy_status(cls, width, height, num_frames, steps, cfg, denoise=1.0, **inputs):
        """Refuse what the host's ranges let through before anything is loaded; then request all connected inputs.

        Not done in `validate_inputs`: the host no longer checks the type and range of inputs named there, and blames all of them
        if one is wrong.
        """
        check_guidance("cfg", cfg)
        if "latent" not in inputs:
            VideoSize(height, width, num_frames)
        if "sigmas" not in inputs:
            make_sigmas(steps, denoise)
        return [name for name, value in inputs.items() if value is None]

    @classmethod
    def execute(
        cls, model, positive, negative, width, height, num_frames, steps, cfg, seed,
        batch_size=1, denoise=1.0, latent=None, sigmas=None, sampler=None,
    ):  # fmt: skip
        if latent is None:
            latent = empty_latent(width, height, num_frames, batch_size)
        if sigmas is None:
            sigmas = make_sigmas(steps, denoise)
        return io.NodeOutput(sample(model, positive, negative, latent, sigmas, cfg, seed, sampler))
