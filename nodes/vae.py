"""Tiled VAE Decode (Mochi) and VAE Encode (Mochi)."""

from __future__ import annotations

import math

from comfy_api.latest import io

from ..mochi_core.autoencoder.plan import GIB
from .bridge.image_to_video import latent_mask
from .bridge.vae import decode_video, encode_frames
from .category import CATEGORY


class TiledVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1TiledVAEDecode",
            display_name="Tiled VAE Decode (Mochi)",
            category=CATEGORY,
            description="Latents to frames. With a VAE from Load Mochi VAE the video streams through frame by frame, "
            "in strips where memory is short, and comes out as if decoded in one piece: no seams, no lost frames, any length.",
            search_aliases=["mochi decode", "MochiDecode", "MochiDecodeSpatialTiling"],
            inputs=[
                io.Latent.Input("samples", tooltip="From Mochi Sampler or any other sampler."),
                io.Vae.Input("vae", tooltip="From Load Mochi VAE (exact), or from Load VAE (ComfyUI's own tiles)."),
                io.Float.Input(
                    "memory",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="GiB to use besides the weights and the finished frames; 0 takes what is free. Less is slower; "
                    "the video is the same. Has no effect on a VAE from Load VAE.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="Frames at 30 per second.")],
        )

    @classmethod
    def execute(cls, samples, vae, memory=0.0):
        if not 0 <= memory < math.inf:
            raise ValueError(
                f"memory is {memory}, but it is an amount in GiB; use 0 for what is free, or a number such as 8."
            )
        return io.NodeOutput(decode_video(vae, samples["samples"], round(memory * GIB) or None))


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1VAEEncode",
            display_name="VAE Encode (Mochi)",
            category=CATEGORY,
            description="Frames to latents, for video to video; with a mask, only what it covers is regenerated.",
            search_aliases=["mochi encode", "MochiImageEncode"],
            inputs=[
                io.Image.Input(
                    "pixels",
                    tooltip="Frames at 30 per second. Frames beyond 6k + 1 are left out, and so are pixels beyond multiples "
                    "of 8.",
                ),
                io.Vae.Input("vae", tooltip="From Load Mochi VAE, with an encoder."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What is regenerated: one mask for all frames, or one for each. It becomes the noise mask of the "
                    "latents, each of which takes the largest value of its 8 x 8 pixels and 6 frames.",
                ),
            ],
            outputs=[io.Latent.Output(tooltip="For the latent input of Mochi Sampler, with denoise below 1.")],
        )

    @classmethod
    def execute(cls, pixels, vae, mask=None):
        masked = {} if mask is None else {"noise_mask": latent_mask(mask, pixels)}
        return io.NodeOutput({"samples": encode_frames(vae, pixels), **masked})
