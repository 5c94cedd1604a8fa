"""T5 Encode (Mochi)."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge.text import encode_prompt
from .category import CATEGORY


class T5Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1T5Encode",
            display_name="T5 Encode (Mochi)",
            category=CATEGORY,
            description="Encodes a prompt exactly as Genmo does: plain text, 256 tokens, nothing at all if it is empty.",
            search_aliases=["mochi prompt", "MochiTextEncode"],
            inputs=[
                io.Clip.Input("clip", tooltip="From Load Mochi T5, or from Load CLIP with type mochi."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="What the video shows, in plain words; brackets are text, not weights. Beyond 256 tokens it is "
                    "cut, and the console says what was lost. An empty prompt means no text.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For positive or negative of a sampler.")],
        )

    @classmethod
    def execute(cls, clip, prompt):
        return io.NodeOutput(encode_prompt(clip, prompt))
