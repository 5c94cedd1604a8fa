"""What the templates are: the one source of both of their forms.

`python dev.py generate templates` writes <title>.json, which the editor opens, and api/<name>.json, which the server runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

WAVES = "A close view of ocean waves rolling onto black sand at sunrise, foam catching warm light, slow camera pan."
LIGHTHOUSE = (
    "A lighthouse on a rocky coast in a storm, waves breaking against the stones, its light sweeping through rain."
)
PAPER = "The same scene made of folded paper, soft studio light, stop-motion look."
TRAIN = "A steam train crosses a stone viaduct in the highlands, seen from the air, smoke drifting over autumn trees."
SHAPE = "a red star moving to the right"
BF16, FP8 = "mochi_preview_bf16.safetensors", "mochi_preview_fp8_scaled.safetensors"
T5, T5_FP8 = "t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "mochi_vae.safetensors"


class Link(NamedTuple):
    """An output of another node."""

    node: str
    slot: int = 0


@dataclass(frozen=True)
class Node:
    """A node; inputs that it does not name have their defaults."""

    type: str
    inputs: dict[str, Any]
    title: str = ""
    """If it says more than the node's own name."""


Nodes = dict[str, Node]
"""By a name that links use. The order gives the ids 1, 2, 3 ..."""


@dataclass(frozen=True)
class Template:
    name: str
    """Of the file in API form, for those who type it."""
    title: str
    """Of the file that the editor opens, which shows no other title, and finds no other words."""
    note: str
    """Markdown; stands beside the graph."""
    nodes: Nodes
    after_run: str = "randomize"
    """What becomes of seeds after a run, as the editor calls it."""


def text_to_video(
    prompt: str, *, transformer: dict | None = None, t5: dict | None = None, vae: dict | None = None, **sampler: Any
) -> Nodes:
    """The common graph; the dictionaries are inputs of the loaders, `sampler` those of Mochi Sampler."""
    models = {"model": Link("transformer"), "positive": Link("positive"), "negative": Link("negative")}
    return {
        "transformer": Node("Mochi1LoadTransformer", {"model_name": BF16} | (transformer or {})),
        "t5": Node("Mochi1LoadT5", {"t5_name": T5} | (t5 or {})),
        "vae": Node("Mochi1LoadVAE", {"vae_name": VAE} | (vae or {})),
        "positive": Node("Mochi1T5Encode", {"clip": Link("t5"), "prompt": prompt}, "Prompt"),
        "negative": Node("Mochi1T5Encode", {"clip": Link("t5"), "prompt": ""}, "Negative prompt"),
        "sampler": Node("Mochi1Sampler", models | sampler),
        "decode": Node("Mochi1TiledVAEDecode", {"samples": Link("sampler"), "vae": Link("vae")}),
        **saved("decode"),
    }


def saved(images: str) -> Nodes:
    video = Node("CreateVideo", {"images": Link(images), "fps": 30})
    return {
        "video": video,
        "save": Node("SaveVideo", {"video": Link("video"), "filename_prefix": "video/mochi", "format": "mp4"}),
    }


def video_to_video() -> Nodes:
    nodes = text_to_video(PAPER, latent=Link("encode"), denoise=0.3)
    size = {"upscale_method": "lanczos", "width": 848, "height": 480, "crop": "center"}
    return nodes | {
        "load": Node("LoadVideo", {"file": "mochi_input.mp4"}),
        "frames": Node("GetVideoComponents", {"video": Link("load")}),
        "first": Node(
            "ImageFromBatch", {"image": Link("frames"), "batch_index": 0, "length": 163}, "At most 163 frames"
        ),
        "scale": Node("ImageScale", {"image": Link("first"), **size}, "Scale to Mochi's size"),
        "encode": Node("Mochi1VAEEncode", {"pixels": Link("scale"), "vae": Link("vae")}),
        "video": Node("CreateVideo", {"images": Link("decode"), "fps": Link("frames", 2)}),
    }


def long_video() -> Nodes:
    nodes = text_to_video(
        TRAIN,
        transformer={"model_name": FP8},
        t5={"t5_name": T5_FP8, "device": "cpu"},
        model=Link("windows"),
        num_frames=Link("length"),
    )
    windows = {"context_length": 28, "context_overlap": 8, "fuse_method": "pyramid", "dim": 2, "freenoise": True}
    return nodes | {
        "length": Node("Mochi1Length", {"seconds": 10.2}),
        "windows": Node("ContextWindowsManual", {"model": Link("transformer"), **windows}),
    }


def lora() -> Nodes:
    nodes = text_to_video(WAVES, model=Link("lora"))
    added = {"model": Link("transformer"), "lora_name": "mochi_lora.safetensors", "strength": 1.0}
    return nodes | {"lora": Node("Mochi1LoadLoRA", added)}


def fastmochi() -> Nodes:
    nodes = text_to_video(
        WAVES, transformer={"model_name": "fastmochi.safetensors"}, steps=8, cfg=1.5, sigmas=Link("sigmas")
    )
    return nodes | {"sigmas": Node("Mochi1Sigmas", {"steps": 8, "threshold_noise": 0.1, "linear_steps": 6})}


def faster() -> Nodes:
    """The sampler in parts, for the guider."""
    nodes = text_to_video(WAVES)
    guided = {"model": Link("cache"), "positive": Link("positive"), "negative": Link("negative")}
    sampler = {
        "noise": Link("noise"), "guider": Link("guider"), "sampler": Link("euler"), "sigmas": Link("sigmas"),
        "latent_image": Link("empty"),
    }  # fmt: skip
    return nodes | {
        "sampler": Node("SamplerCustomAdvanced", sampler),
        "cache": Node("Mochi1Cache", {"model": Link("transformer"), "method": "teacache", "threshold": 0.06}),
        "guider": Node("Mochi1Guider", guided | {"cfg": 4.5, "start": 0.1, "end": 1.0}),
        "sigmas": Node("Mochi1Sigmas", {"steps": 64}),
        "noise": Node("RandomNoise", {"noise_seed": 0}),
        "euler": Node("KSamplerSelect", {"sampler_name": "euler"}),
        "empty": Node("EmptyMochiLatentVideo", {"width": 848, "height": 480, "length": 163}, "Size and length"),
    }


def stock_nodes() -> Nodes:
    """Only the loaders are ours."""
    nodes = text_to_video(WAVES)
    sampler = {
        "model": Link("transformer"), "positive": Link("positive"), "negative": Link("negative"),
        "latent_image": Link("empty"), "seed": 0, "steps": 64, "cfg": 4.5, "sampler_name": "euler",
        "scheduler": "linear_quadratic",
    }  # fmt: skip
    return nodes | {
        "positive": Node("CLIPTextEncode", {"clip": Link("t5"), "text": WAVES}, "Prompt"),
        "negative": Node("CLIPTextEncode", {"clip": Link("t5"), "text": ""}, "Negative prompt"),
        "sampler": Node("KSampler", sampler),
        "decode": Node("VAEDecode", {"samples": Link("sampler"), "vae": Link("vae")}),
        "empty": Node("EmptyMochiLatentVideo", {"width": 848, "height": 480, "length": 163}, "Size and length"),
    }


def tiny() -> Nodes:
    return text_to_video(
        SHAPE,
        transformer={"model_name": "mochi_tiny.safetensors"},
        t5={"t5_name": "t5_tiny.safetensors"},
        vae={"vae_name": "mochi_tiny_vae.safetensors"},
        width=64, height=64, num_frames=25, steps=32,
    )  # fmt: skip


FILES = """
| folder in **models/** | file |
|---|---|
| **diffusion_models** | **mochi_preview_bf16.safetensors** |
| **text_encoders** | **t5xxl_fp16.safetensors** |
| **vae** | **mochi_vae.safetensors** |

Any other Mochi file works as well: Genmo's own, diffusers', fp8, int8, GGUF.
"""

TEMPLATES = [
    Template(
        "text_to_video",
        "Mochi 1 - Text to Video",
        f"""# Text to video

Write what the video shows into **Prompt** and press Run.
{FILES}
**Worth changing:** the prompt, the seed, and **num_frames** (6k + 1; 163 are 5.4 seconds, and 85 take about half the time).
Mochi likes one scene, described in plain words, with what the camera does. Sensible values
of **cfg** are 3 to 6.
""",
        text_to_video(WAVES),
    ),
    Template(
        "fast_preview",
        "Mochi 1 - Quick draft",
        f"""# Fast preview

A small, short, coarse video to try prompts with: 1.2 seconds of 432 x 240 in 16 steps, about a sixtieth of the work of the
full video.
{FILES}
The full video from the same seed is **another** video: noise of another size is other noise. Prompts and **cfg** carry over.
""",
        text_to_video(WAVES, width=432, height=240, steps=16, num_frames=Link("length"))
        | {"length": Node("Mochi1Length", {"seconds": 1.2})},
    ),
    Template(
        "video_to_video",
        "Mochi 1 - Video to Video",
        f"""# Video to video

Choose your video in **Load Video**, and describe what it shall become.
{FILES}
The autoencoder file must hold the **encoder**, too (**mochi_vae.safetensors** does).

**Worth changing:** **denoise**. 0.3 starts at 81 % noise, 0.2 at 62 %, 0.1 at 35 %, 0.5 at 97 %: less noise keeps more of
your video, first of all its motion. The first 163 frames are taken, of those 6k + 1, and scaled to 848 x 480.
""",
        video_to_video(),
    ),
    Template(
        "long_video_low_memory",
        "Mochi 1 - Long video, 8 to 12 GB",
        """# Long video on 8 to 12 GB

10 seconds with 8-bit weights, the text encoder on the CPU, and the denoiser in overlapping windows of the length that Mochi
was trained for.

| folder in **models/** | file |
|---|---|
| **diffusion_models** | **mochi_preview_fp8_scaled.safetensors** |
| **text_encoders** | **t5xxl_fp8_e4m3fn_scaled.safetensors** |
| **vae** | **mochi_vae.safetensors** |

ComfyUI streams the weights that do not fit. If memory runs out all the same: make **context_length** smaller (22 or 16
latents; 6 frames each), then width and height. The decode needs the same memory however long the video is.

**What to expect:** the windows share their overlaps, not a plot; describe one continuing motion.
""",
        long_video(),
    ),
    Template(
        "fastmochi",
        "Mochi 1 - FastMochi, 8 steps",
        """# FastMochi: 8 steps

Distilled weights: **dit.safetensors** from FastVideo's FastMochi, saved as
**models/diffusion_models/fastmochi.safetensors**. Text encoder and VAE as always.

Its settings belong together: **8 steps, threshold noise 0.1, 6 linear steps, cfg 1.5.** Ordinary Mochi weights need the
64 steps and cfg 4.5 of the template *Text to Video*.
""",
        fastmochi(),
    ),
    Template(
        "faster",
        "Mochi 1 - Faster",
        f"""# Faster, with another result

**Mochi Cache** leaves out the blocks of the transformer where little changes; **Mochi Guider** guides from the tenth part of
the steps on, and a step without guidance takes half the time. The console says how much was left out.
{FILES}
The video is **not** the one that *Text to Video* makes from the same seed, only one like it. For that one, set **threshold**
to 0 and **start** to 0.

**Worth changing:** **threshold** 0 is exact, more is faster and further from that.
""",
        faster(),
    ),
    Template(
        "genmo_exact",
        "Mochi 1 - Genmo exact",
        """# Genmo-exact reproduction

The precision and the settings of Genmo's own code: T5 and autoencoder in fp32, denoiser in bf16, 163 frames of 848 x 480 in
64 steps, guidance 6.0 (4.5 in Genmo's first release).

| folder in **models/** | file |
|---|---|
| **diffusion_models** | **mochi_preview_bf16.safetensors**, or Genmo's **dit.safetensors** |
| **text_encoders** | a T5 v1.1 XXL in fp32 or fp16 |
| **vae** | **mochi_vae.safetensors** in fp32, or Genmo's **decoder.safetensors** |

Noise comes from a generator on the CPU, so that a seed means the same video on every machine. Genmo's code draws it on the
GPU: its seeds are other noise, but the same noise gives the same video.
""",
        text_to_video(
            WAVES, transformer={"weight_dtype": "bf16"}, t5={"dtype": "fp32"}, vae={"dtype": "fp32"}, cfg=6.0
        ),
        after_run="fixed",
    ),
    Template(
        "lora",
        "Mochi 1 - LoRA",
        f"""# LoRA

Put the LoRA into **models/loras** and choose it in **Load Mochi LoRA**. Every kind works: Genmo's trainer with its alphas,
diffusers, PEFT, kohya, DoRA.
{FILES}
**Worth changing:** **strength** (1 is as trained, 0 is off). Several LoRAs: one node after the other.
""",
        lora(),
    ),
    Template(
        "tiny_mochi",
        "Mochi 1 - Tiny demo, no download",
        """# Tiny Mochi

A Mochi of 22 MB that comes with this pack: nothing to download, a video in seconds, also without a GPU. It was trained on
drawn shapes, and they are all that it knows.

Try *“a blue square growing larger”* or *“A yellow circle falling over a gray background.”*: red, green, blue, yellow, white;
circles, squares, triangles, stars; moving left, right, up, down or in a circle, growing, standing still.

The files have the form of the real ones, and the nodes are the same: what works here works with Mochi.
""",
        tiny(),
    ),
    Template(
        "stock_nodes",
        "Mochi 1 - KSampler and stock nodes",
        f"""# With ComfyUI's own nodes

Only the loaders are from this pack; prompt, sampler, decoder and everything else are ComfyUI's. All types are native: put
any other sampler, LoRA loader, guider, cache or patch for models in between.
{FILES}
What differs from *Text to Video*: ComfyUI's text encode gives an empty prompt one token, Genmo gives it none. With the
prompts encoded by **T5 Encode (Mochi)**, KSampler makes the same video as **Mochi Sampler**.
""",
        stock_nodes(),
    ),
]
