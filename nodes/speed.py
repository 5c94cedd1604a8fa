"""Mochi Cache and Mochi Guider: faster, with a different result. Mochi Parallel: faster on several GPUs, with the same result."""

from __future__ import annotations

from comfy_api.latest import io

from ..mochi_core.choices import CACHE_METHODS
from ..mochi_core.sampling.block_cache import BlockCache
from .bridge.cache import add_cache
from .bridge.guider import make_guider
from .bridge.parallel import SPLITS, add_devices
from .category import CATEGORY


def share(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(
        name, default=default, min=0.0, max=1.0, step=0.01, display_mode=io.NumberDisplay.slider, tooltip=tooltip
    )


class Cache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1Cache",
            display_name="Mochi Cache",
            category=CATEGORY,
            description="Faster: skips the blocks of the transformer in steps where little changes. The video changes "
            "somewhat. The console says how often blocks were skipped.",
            search_aliases=["teacache", "first block cache", "fbcache", "mochi speed", "MochiFasterCache"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Mochi Transformer."),
                io.Combo.Input(
                    "method",
                    options=list(CACHE_METHODS),
                    tooltip="How change is measured: teacache by the input of the first block, with TeaCache's figures for "
                    "Mochi; first_block by what that block adds, which costs one block per step.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.06,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="The change up to which blocks are skipped: 0 is off and exact. For 64 steps, TeaCache's authors "
                    "give 0.06 for 1.5 times the speed and 0.09 for 2.1 times.",
                ),
                share("start", 0.0, "Share of the steps after which blocks may be skipped; never in the first step."),
                share("end", 1.0, "Share of the steps up to which blocks may be skipped; never in the last step."),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with the cache; the one that came in stays as it was.")],
        )

    @classmethod
    def execute(cls, model, method, threshold, start=0.0, end=1.0):
        return io.NodeOutput(add_cache(model, BlockCache(method, threshold, start, end)))


class Guider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1Guider",
            display_name="Mochi Guider",
            category=CATEGORY,
            description="Guidance in only some of the steps, or with a scale that changes from step to step. A step without "
            "guidance takes half the time.",
            search_aliases=[
                "cfg zero star",
                "guidance interval",
                "cfg schedule",
                "cfg range",
                "CFGGuider",
                "cfg_schedule",
            ],
            inputs=[
                io.Model.Input("model", tooltip="From Load Mochi Transformer, or any other MODEL."),
                io.Conditioning.Input("positive", tooltip="What the video shows."),
                io.Conditioning.Input("negative", tooltip="What it does not show; usually an empty prompt."),
                io.Float.Input(
                    "cfg",
                    default=4.5,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance: how strictly the prompt is followed; 4.5, or 1.5 for FastMochi.",
                ),
                share("start", 0.0, "Share of the steps after which there is guidance; before, cfg is 1."),
                share("end", 1.0, "Share of the steps up to which there is guidance; after, cfg is 1."),
                io.Float.Input(
                    "cfg_end",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip="Guidance in the last guided step, reached from cfg in equal increments; 0 means the same as cfg.",
                ),
                io.Boolean.Input(
                    "cfg_zero",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="CFG-Zero*: the negative prompt counts only as far as it agrees with the positive one, and the "
                    "first 4 % of the steps are skipped.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, start=0.0, end=1.0, cfg_end=0.0, cfg_zero=False):
        return io.NodeOutput(make_guider(model, positive, negative, cfg, cfg_end, start, end, cfg_zero))


class Parallel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1Parallel",
            display_name="Mochi Parallel",
            category=CATEGORY,
            description="Several GPUs make one video, each computing a share of every step; the video is the same. With one "
            "GPU, the MODEL passes through. It has not yet been run on two GPUs.",
            search_aliases=[
                "multigpu",
                "multi gpu",
                "several gpus",
                "MultiGPU CFG Split",
                "sequence parallel",
                "xdit",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="From Load Mochi Transformer; put this node after LoRAs, Mochi Cache and other patches.",
                ),
                io.Int.Input(
                    "gpus",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="How many GPUs to use: 0 is all of them. Each holds the transformer.",
                ),
                io.Combo.Input(
                    "split",
                    options=list(SPLITS),
                    default="auto",
                    tooltip="What is shared out. guidance: the prompt and the negative prompt, to two GPUs, which then "
                    "exchange next to nothing. sequence: the tokens of the video, to any number of GPUs. auto: first "
                    "the prompts, then the tokens.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL on several GPUs; the one that came in stays as it was.")],
        )

    @classmethod
    def execute(cls, model, gpus=0, split="auto"):
        return io.NodeOutput(add_devices(model, gpus, split))
