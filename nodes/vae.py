"""Tiled VAE Decode (Mochi) and VAE Encode (Mochi)."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..mochi_core.geometry import frames_to_latents, latents_to_frames, size_problem
from .bridge.vae import FRAMES_AT_ONCE, decode_video, require_mochi_vae

CATEGORY = "Mochi"


class TiledVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1TiledVAEDecode",
            display_name="Tiled VAE Decode (Mochi)",
            category=CATEGORY,
            description="Latents to frames. With a VAE from Load Mochi VAE the video streams through in slices of time and "
            "comes out exactly as if decoded in one piece: no seams, no lost frames, memory that does not grow with length.",
            search_aliases=["mochi decode", "MochiDecode", "MochiDecodeSpatialTiling"],
            inputs=[
                io.Latent.Input("samples", tooltip="From Mochi Sampler or any other sampler."),
                io.Vae.Input("vae", tooltip="From Load Mochi VAE (exact), or from Load VAE (ComfyUI's own tiles)."),
                io.Int.Input(
                    "frames_at_once",
                    default=FRAMES_AT_ONCE,
                    min=1,
                    max=96,
                    optional=True,
                    advanced=True,
                    tooltip="Frames that each layer holds at once. Fewer need less memory, more are a little faster; the "
                    "video is the same. Has no effect on a VAE from Load VAE.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="Frames at 30 per second.")],
        )

    @classmethod
    def execute(cls, samples, vae, frames_at_once=FRAMES_AT_ONCE):
        return io.NodeOutput(decode_video(vae, samples["samples"], frames_at_once))


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1VAEEncode",
            display_name="VAE Encode (Mochi)",
            category=CATEGORY,
            description="Frames to latents, for video to video.",
            search_aliases=["mochi encode", "MochiImageEncode"],
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip="Frames at 30 per second; width and height multiples of 16. Frames beyond 6k + 1 are left out.",
                ),
                io.Vae.Input("vae", tooltip="From Load Mochi VAE, with an encoder."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, pixels, vae):
        require_mochi_vae(vae)
        frames, height, width = pixels.shape[:3]
        if problem := size_problem("height", height) or size_problem("width", width):
            raise ValueError(problem)
        kept = latents_to_frames(frames_to_latents(frames))
        if kept < frames:
            logging.info("VAE Encode (Mochi): %d frames given, %d (6k + 1) encoded.", frames, kept)
        return io.NodeOutput({"samples": vae.encode(pixels[:kept])})
