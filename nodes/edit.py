"""Mochi Edit, Mochi Invert and Mochi RF Edit: change a given video."""

from __future__ import annotations

from comfy_api.latest import io

from ..mochi_core.sampling.edit import TRENDS
from .bridge.edit import edit_video, inversion_sampler, rf_edit_sampler
from .category import CATEGORY


def number(name: str, default: float, low: float, high: float, tooltip: str, step: float = 0.01) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip)


def seed(tooltip: str) -> io.Int.Input:
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip=tooltip)


class Edit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1Edit",
            display_name="Mochi Edit",
            category=CATEGORY,
            description="Changes a video by the difference between two prompts (FlowEdit): what both say stays.",
            search_aliases=["flowedit", "edit video", "mochi edit", "video to video", "MochiEdit"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Mochi Transformer, or any other Mochi MODEL."),
                io.Conditioning.Input("source", tooltip="What the video shows, including its motion."),
                io.Conditioning.Input("target", tooltip="What it becomes: the same text, with other words where it changes."),
                io.Conditioning.Input("negative", tooltip="What neither shows; usually an empty prompt."),
                io.Latent.Input("latent", tooltip="The video, from VAE Encode (Mochi). Outside a noise mask, nothing changes."),
                io.Int.Input("steps", default=30, min=1, max=1000, tooltip="Steps from start_noise down, of four forwards each."),
                number("start_noise", 0.9, 0.01, 1.0, "How much may change: the noise level of the first step."),
                number("source_cfg", 1.5, 0.0, 30.0, "Guidance for the source prompt; FlowEdit's authors use 1.5 for FLUX."),
                number("cfg", 5.5, 0.0, 30.0, "Guidance for the target prompt; higher changes more."),
                seed("A different seed makes a different edit."),
            ],
            outputs=[io.Latent.Output(tooltip="The edited video as latents; Tiled VAE Decode (Mochi) turns it into frames.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, source, target, negative, latent, steps, start_noise, source_cfg, cfg, seed):
        return io.NodeOutput(
            edit_video(model, source, target, negative, latent, steps, start_noise, (source_cfg, cfg), seed)
        )


class Invert(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1Invert",
            display_name="Mochi Invert",
            category=CATEGORY,
            description="A SAMPLER that goes from a video back to noise that it could have come from (RF inversion).",
            search_aliases=["unsampler", "MochiUnsampler", "rf inversion", "reverse ode"],
            inputs=[
                number(
                    "gamma",
                    0.0,
                    0.0,
                    1.0,
                    "0 follows the model; 1 goes straight to the seed's noise and forgets the video.",
                ),
                seed("Seed of the noise that gamma leads to; has no effect if gamma is 0."),
            ],
            outputs=[
                io.Sampler.Output(
                    tooltip="For the sampler input of Mochi Sampler or SamplerCustom, with its sigmas reversed by FlipSigmas."
                )
            ],
        )

    @classmethod
    def execute(cls, gamma, seed):
        return io.NodeOutput(inversion_sampler(gamma, seed))


class RFEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1RFEdit",
            display_name="Mochi RF Edit",
            category=CATEGORY,
            description="A SAMPLER that makes a video from inverted noise, and pulls it towards a given one (RF inversion).",
            search_aliases=["resampler", "MochiResampler", "rf inversion", "rf edit"],
            inputs=[
                io.Latent.Input("latent", tooltip="The given video: the LATENT that Mochi Invert started from."),
                number("eta", 0.8, 0.0, 1.0, "The pull: 0 is none, 1 goes straight to the given video."),
                number("start", 1.0, 0.0, 1.0, "Noise level at which the pull begins.", step=0.001),
                number("end", 0.8, 0.0, 1.0, "Noise level at which the pull ends; lower keeps more of the video.", step=0.001),
                io.Combo.Input("trend", options=list(TRENDS), default=TRENDS[0],
                               tooltip="Whether the pull stays constant, falls to 0 or rises from 0."),
                io.Int.Input("start_step", default=0, min=0, max=1000, optional=True, advanced=True,
                             tooltip="From old workflows: the step at which the pull begins; only used with an end_step."),
                io.Int.Input("end_step", default=0, min=0, max=1000, optional=True, advanced=True,
                             tooltip="From old workflows: the step at which the pull ends, in place of start and end; 0 is "
                             "off. The console says which noise levels these steps are."),
            ],
            outputs=[io.Sampler.Output(tooltip="For the sampler input of Mochi Sampler or SamplerCustom.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, latent, eta, start, end, trend, start_step=0, end_step=0):
        return io.NodeOutput(rf_edit_sampler(latent, eta, start, end, trend, (start_step, end_step)))
