"""The templates: the single source of both of their forms.

`python dev.py generate templates` writes <title>.json, which the editor opens, and api/<name>.json, which the server runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

WAVES = "A close view of ocean waves rolling onto black sand at sunrise, foam catching warm light, slow camera pan."
LIGHTHOUSE = (
    "A lighthouse on a rocky coast in a storm, waves breaking against the stones, its light sweeping through rain."
)
CAR = (
    "A red car drives to the right along a coast road, waves breaking on the left, seen from a drone in evening light."
)
PAPER = "The same scene made of folded paper, soft studio light, stop-motion look."
TRAIN = "A steam train crosses a stone viaduct in the highlands, seen from the air, smoke drifting over autumn trees."
LIST = (WAVES, LIGHTHOUSE, TRAIN)
WAKES = "The scene comes alive: a light wind moves everything that can move, the camera slowly moves closer."
SHAPE = "a red star moving to the right"
BF16, FP8 = "mochi_preview_bf16.safetensors", "mochi_preview_fp8_scaled.safetensors"
T5, T5_FP8 = "t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors"
VAE = "mochi_vae.safetensors"
YOUR_FILES = YOUR_VIDEO, YOUR_IMAGE, YOUR_LAST_IMAGE = "your_video.mp4", "your_image.png", "your_last_image.png"
"""Files that the user provides: in API form, names to replace; in the editor, nothing is chosen yet."""


class Link(NamedTuple):
    """An output of another node."""

    node: str
    slot: int = 0


@dataclass(frozen=True)
class Node:
    """A node; inputs not named have their defaults."""

    type: str
    inputs: dict[str, Any]
    title: str = ""
    """Only if it says more than the node's own name."""


Nodes = dict[str, Node]
"""Nodes by the names that links use. Their order gives the ids 1, 2, 3 ..."""


class Port(NamedTuple):
    """An input of a node inside a subgraph that the subgraph exposes."""

    node: str
    input: str
    name: str
    label: str = ""


@dataclass(frozen=True)
class Subgraph:
    """Nodes of a template shown as one."""

    name: str
    category: str
    description: str
    ports: tuple[Port, ...]
    outside: tuple[str, ...]
    """Nodes of the template outside the subgraph; the last one saves the video."""
    blueprint: bool = True
    """Whether the editor also lists it among the nodes."""


@dataclass(frozen=True)
class Template:
    name: str
    """Name of the API-form file, made for typing."""
    title: str
    """Name of the file that the editor opens; the editor shows and searches nothing else."""
    note: str
    """Markdown; shown next to the graph, with its first line as the title."""
    nodes: Nodes
    after_run: str = "randomize"
    """What happens to seeds after a run, as a value of the editor's control_after_generate."""
    subgraph: Subgraph | None = None
    """How the editor shows the nodes; the API form is not affected."""


def text_to_video(
    prompt: str, *, transformer: dict | None = None, t5: dict | None = None, vae: dict | None = None, **sampler: Any
) -> Nodes:
    """The common graph; the dictionaries are the loaders' inputs, `sampler` those of Mochi Sampler."""
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
        "load": Node("LoadVideo", {"file": YOUR_VIDEO}, "Your video"),
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


def image_to_video(prompt: str = WAKES, **images: Any) -> Nodes:
    """The sampler takes MODEL and LATENT from Mochi Image to Video, whose inputs are `images`."""
    nodes = text_to_video(prompt, model=Link("given"), latent=Link("given", 1))
    given = {"model": Link("transformer"), "vae": Link("vae"), "start_image": Link("load")} | images
    return nodes | {
        "load": Node("LoadImage", {"image": YOUR_IMAGE}, "Your image"),
        "given": Node("Mochi1ImageToVideo", given),
    }


def first_last_frame() -> Nodes:
    nodes = image_to_video(end_image=Link("last"))
    return nodes | {
        "load": Node("LoadImage", {"image": YOUR_IMAGE}, "First image"),
        "last": Node("LoadImage", {"image": YOUR_LAST_IMAGE}, "Last image"),
    }


def extend_video() -> Nodes:
    """The given video at the size of the new one, followed by the new frames after the kept ones."""
    nodes = image_to_video(WAVES, start_image=Link("frames"), keep=19)
    size = {"upscale_method": "lanczos", "width": Link("size"), "height": Link("size", 1), "crop": "center"}
    new = {"image": Link("decode"), "batch_index": Link("given", 2), "length": 4096}
    return nodes | {
        "load": Node("LoadVideo", {"file": YOUR_VIDEO}, "Your video"),
        "frames": Node("GetVideoComponents", {"video": Link("load")}),
        "size": Node("GetImageSize", {"image": Link("decode")}),
        "scale": Node("ImageScale", {"image": Link("frames"), **size}, "To the same size"),
        "new": Node("ImageFromBatch", new, "New frames"),
        "joined": Node("BatchImagesNode", {"images.image0": Link("scale"), "images.image1": Link("new")}, "Both"),
        "video": Node("CreateVideo", {"images": Link("joined"), "fps": 30}),
    }


def lora() -> Nodes:
    nodes = text_to_video(WAVES, model=Link("lora"))
    added = {"model": Link("transformer"), "lora_name": "mochi_lora.safetensors", "strength": 1.0}
    return nodes | {"lora": Node("Mochi1LoadLoRA", added)}


def fastmochi() -> Nodes:
    nodes = text_to_video(
        WAVES, transformer={"model_name": "fastmochi.safetensors"}, model=Link("parallel"), steps=8, cfg=1.5,
        sigmas=Link("sigmas"),
    )  # fmt: skip
    return nodes | {
        "sigmas": Node("Mochi1Sigmas", {"steps": 8, "threshold_noise": 0.1, "linear_steps": 6}),
        "parallel": Node("Mochi1Parallel", {"model": Link("transformer")}),
    }


def faster() -> Nodes:
    """The sampler split into its parts, for the guider."""
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


def second_pass() -> Nodes:
    nodes = text_to_video(WAVES)
    again = nodes["sampler"].inputs | {"latent": Link("larger"), "denoise": 0.3}
    size = {"upscale_method": "bicubic", "width": 1280, "height": 720, "crop": "disabled"}
    return nodes | {
        "decode": Node("Mochi1TiledVAEDecode", {"samples": Link("again"), "vae": Link("vae")}),
        "larger": Node("LatentUpscale", {"samples": Link("sampler"), **size}, "Larger"),
        "again": Node("Mochi1Sampler", again, "Second pass"),
    }


def prompt_list() -> Nodes:
    """T5 Encode, the sampler and everything after them run once for each item of the list."""
    nodes = text_to_video(WAVES)
    prompts = {
        f"prompt{i}": Node("PrimitiveStringMultiline", {"value": text}, f"Prompt {i}") for i, text in enumerate(LIST, 1)
    }
    items = {f"inputs.input{i}": Link(name) for i, name in enumerate(prompts)}
    return nodes | {
        "positive": Node("Mochi1T5Encode", {"clip": Link("t5"), "prompt": Link("list")}, "Each prompt"),
        **prompts,
        "list": Node("CreateList", items),
    }


def sharper() -> Nodes:
    nodes = text_to_video(WAVES, model=Link("guidance"))
    skipped = {"double_layers": "34", "single_layers": "", "scale": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    return nodes | {"guidance": Node("SkipLayerGuidanceDiT", {"model": Link("transformer"), **skipped})}


def masked() -> Nodes:
    """A rectangle of the video is regenerated, the rest stays."""
    nodes = video_to_video()
    area = {"source": Link("area"), "destination": Link("frame"), "x": 424, "y": 0, "operation": "add"}
    return nodes | {
        "sampler": Node("Mochi1Sampler", nodes["sampler"].inputs | {"denoise": 0.6}),
        "encode": Node("Mochi1VAEEncode", nodes["encode"].inputs | {"mask": Link("mask")}),
        "frame": Node("SolidMask", {"value": 0.0, "width": 848, "height": 480}, "Stays"),
        "area": Node("SolidMask", {"value": 1.0, "width": 424, "height": 480}, "Made anew"),
        "mask": Node("MaskComposite", area, "Where"),
    }


def edit_prompts() -> Nodes:
    """Two prompts that differ only in the colour, and the negative one."""
    t5 = {"clip": Link("t5")}
    return {
        "source": Node("Mochi1T5Encode", t5 | {"prompt": CAR}, "Source prompt"),
        "target": Node("Mochi1T5Encode", t5 | {"prompt": CAR.replace("red", "yellow")}, "Prompt of the edit"),
        "negative": Node("Mochi1T5Encode", t5 | {"prompt": ""}, "Negative prompt"),
    }


def edit_video() -> Nodes:
    nodes = {name: node for name, node in video_to_video().items() if name not in ("positive", "negative")}
    edited = {name: Link(name) for name in ("source", "target", "negative")} | {"latent": Link("encode")}
    sampler = Node("Mochi1Edit", {"model": Link("transformer")} | edited)
    return nodes | edit_prompts() | {"sampler": sampler}


def edit_inverted() -> Nodes:
    """MochiEdit's example: 50 steps, and a pull of 0.8 that falls from step 5 to step 20, which is noise 0.992 to 0.956."""
    nodes = {name: node for name, node in video_to_video().items() if name not in ("positive", "negative")}
    common = {"model": Link("transformer"), "negative": Link("negative")}
    upwards = {
        "positive": Link("source"),
        "latent": Link("encode"),
        "sigmas": Link("rising"),
        "sampler": Link("invert"),
    }
    downwards = {"positive": Link("target"), "latent": Link("noise"), "sigmas": Link("sigmas"), "sampler": Link("pull")}
    pull = {"eta": 0.8, "start": 0.992, "end": 0.95, "trend": "linear_decrease"}
    return (
        nodes
        | edit_prompts()
        | {
            "sigmas": Node("Mochi1Sigmas", {"steps": 50, "linear_steps": 15}),
            "rising": Node("FlipSigmas", {"sigmas": Link("sigmas")}),
            "invert": Node("Mochi1Invert", {}),
            "noise": Node("Mochi1Sampler", common | upwards | {"cfg": 1.0}, "To noise"),
            "pull": Node("Mochi1RFEdit", {"latent": Link("encode")} | pull),
            "sampler": Node("Mochi1Sampler", common | downwards, "And back, edited"),
        }
    )


FILE_PORTS = (
    Port("transformer", "model_name", "model_name", "transformer"),
    Port("t5", "t5_name", "t5_name", "text encoder"),
    Port("vae", "vae_name", "vae_name", "VAE"),
)
TEXT_TO_VIDEO = Subgraph(
    "Text to Video (Mochi 1)",
    "Video generation and editing/Text to video",
    "Makes a video from a prompt with Genmo's Mochi 1: 848 x 480 pixels, up to 5.4 seconds at 30 frames per second.",
    (
        Port("positive", "prompt", "prompt"),
        Port("sampler", "width", "width"),
        Port("sampler", "height", "height"),
        Port("sampler", "num_frames", "num_frames", "frames (30 a second)"),
        Port("sampler", "steps", "steps", "steps (few are fast)"),
        Port("sampler", "cfg", "cfg"),
        Port("sampler", "seed", "seed"),
        *FILE_PORTS,
    ),
    ("save",),
)
SECOND_PASS = Subgraph(
    "Text to Video, larger (Mochi 1)",
    TEXT_TO_VIDEO.category,
    "Makes a video from a prompt with Genmo's Mochi 1, then runs the last steps again at a larger size.",
    (
        *TEXT_TO_VIDEO.ports[:-3],
        Port("larger", "width", "larger_width"),
        Port("larger", "height", "larger_height"),
        Port("again", "denoise", "denoise", "second denoise"),
        *FILE_PORTS,
    ),
    ("save",),
    blueprint=False,
)
PROMPT_LIST = Subgraph(
    "Text to Video, each prompt (Mochi 1)",
    TEXT_TO_VIDEO.category,
    "Makes a video of each prompt of a list with Genmo's Mochi 1.",
    TEXT_TO_VIDEO.ports,
    ("prompt1", "prompt2", "prompt3", "list", "save"),
    blueprint=False,
)
FROM_IMAGES = (
    Port("positive", "prompt", "prompt"),
    Port("given", "width", "width"),
    Port("given", "height", "height"),
    Port("given", "num_frames", "num_frames", "frames (30 a second)"),
    Port("given", "start_noise", "start_noise", "first frames' noise"),
    Port("sampler", "steps", "steps", "steps (few are fast)"),
    Port("sampler", "cfg", "cfg"),
    Port("sampler", "seed", "seed"),
)
IMAGE_TO_VIDEO = Subgraph(
    "Image to Video (Mochi 1)",
    "Video generation and editing/Image to video",
    "Makes a video that begins with an image: with Mochi weights that were trained for it, such as Pusa's, or by inpainting in "
    "time with Genmo's.",
    (Port("given", "start_image", "image"), *FROM_IMAGES, *FILE_PORTS),
    ("load", "save"),
)
FIRST_LAST_FRAME = Subgraph(
    "First and Last Frame to Video (Mochi 1)",
    "Video generation and editing/FLF2V",
    "Makes a video between two images: with Mochi weights that were trained for it, such as Pusa's, or by inpainting in time "
    "with Genmo's.",
    (
        Port("given", "start_image", "first_image", "first image"),
        Port("given", "end_image", "last_image", "last image"),
        *FROM_IMAGES[:5],
        Port("given", "end_noise", "end_noise", "last frames' noise"),
        *FROM_IMAGES[5:],
        *FILE_PORTS,
    ),
    ("load", "last", "save"),
)
EXTEND_VIDEO = Subgraph(
    "Extend Video (Mochi 1)",
    "Video generation and editing/Image to video",
    "Continues a video from its last frames: with Mochi weights that were trained for it, such as Pusa's, or by inpainting in "
    "time with Genmo's.",
    (
        Port("frames", "video", "video"),
        *FROM_IMAGES[:1],
        *FROM_IMAGES[1:4],
        Port("given", "keep", "keep", "frames to keep"),
        *FROM_IMAGES[4:],
        *FILE_PORTS,
    ),
    ("load", "save"),
)
EDITING = (
    Port("frames", "video", "video"),
    Port("positive", "prompt", "prompt"),
    Port("sampler", "denoise", "denoise", "denoise (change)"),
    Port("first", "length", "length", "most frames"),
    Port("scale", "width", "width"),
    Port("scale", "height", "height"),
    Port("sampler", "steps", "steps", "steps (few are fast)"),
    Port("sampler", "seed", "seed"),
)
VIDEO_TO_VIDEO = Subgraph(
    "Video to Video (Mochi 1)",
    "Video generation and editing/Video to video",
    "Makes another video from one and a prompt with Genmo's Mochi 1; less noise keeps more of it, above all its motion.",
    (*EDITING, *FILE_PORTS),
    ("load", "save"),
)
EDIT_PROMPTS = (
    Port("source", "prompt", "source_prompt", "what it shows"),
    Port("target", "prompt", "prompt", "what it becomes"),
)
EDIT_VIDEO = Subgraph(
    "Edit Video (Mochi 1)",
    "Video generation and editing/Video to video",
    "Changes what differs between two prompts in a video, with Genmo's Mochi 1.",
    (
        EDITING[0],
        *EDIT_PROMPTS,
        Port("sampler", "start_noise", "start_noise", "start_noise (change)"),
        Port("sampler", "cfg", "cfg", "cfg (how strongly)"),
        *EDITING[3:],
        *FILE_PORTS,
    ),
    ("load", "save"),
)
EDIT_INVERTED = Subgraph(
    "Edit Video by inversion (Mochi 1)",
    EDIT_VIDEO.category,
    "Brings a video back to noise and remakes it from there under another prompt, with Genmo's Mochi 1.",
    (
        EDITING[0],
        *EDIT_PROMPTS,
        Port("pull", "eta", "eta", "eta (pull)"),
        Port("pull", "end", "end", "end (of the pull)"),
        Port("sampler", "cfg", "cfg", "cfg (how strongly)"),
        *EDITING[3:-2],
        Port("sigmas", "steps", "steps", "steps, each way"),
        EDITING[-1],
        *FILE_PORTS,
    ),
    ("load", "save"),
    blueprint=False,
)
MASKED = Subgraph(
    "Masked Video to Video (Mochi 1)",
    "Video generation and editing/Video to video",
    "Regenerates a rectangle of a video with Genmo's Mochi 1; the rest stays.",
    (
        *EDITING,
        Port("mask", "x", "x", "area's left edge"),
        Port("mask", "y", "y", "area's top edge"),
        Port("area", "width", "area_width"),
        Port("area", "height", "area_height"),
        *FILE_PORTS,
    ),
    ("load", "save"),
    blueprint=False,
)

TEMPLATES = [
    Template(
        "text_to_video",
        "Mochi 1 - Text to Video",
        """# Text to video

Describe in **prompt** what the video shows, and press Run. Every run uses a new seed and makes a different video.

**Worth changing:** the prompt, the seed, and **frames** (6k + 1; 163 make 5.4 seconds, and 85 take about half the time).
Mochi likes one scene, described in plain words, with what the camera does. Sensible values of **cfg** are 3 to 6.

The node holds the whole graph: its button at the top right opens it, and everything inside can be changed. In the node search
it is **Text to Video (Mochi 1)**. **App** (top left, next to *Graph*) shows only prompt, length, seed and video.
""",
        text_to_video(WAVES),
        subgraph=TEXT_TO_VIDEO,
    ),
    Template(
        "tiny_mochi",
        "Mochi 1 - Tiny demo, no download",
        """# Tiny Mochi

A Mochi of 22 MB that comes with this pack: nothing to download, a video in seconds, even without a GPU. It was trained on
drawn shapes, and they are all it knows.

Try *“a blue square growing larger”* or *“A yellow circle falling over a gray background.”*: red, green, blue, yellow, white;
circles, squares, triangles, stars; moving left, right, up, down or in a circle, growing, standing still.

The files have the form of the real ones, and the nodes are the same: what works here works with Mochi.
""",
        tiny(),
    ),
    Template(
        "fast_preview",
        "Mochi 1 - Quick draft",
        """# Quick draft

A small, short, coarse video for trying out prompts: 1.2 seconds of 432 x 240 in 16 steps, about a sixtieth of the work of the
full video.

The full video from the same seed is a **different** video, because noise of another size is different noise. Prompts and
**cfg** carry over.
""",
        text_to_video(WAVES, width=432, height=240, steps=16, num_frames=Link("length"))
        | {"length": Node("Mochi1Length", {"seconds": 1.2})},
    ),
    Template(
        "image_to_video",
        "Mochi 1 - Image to Video",
        """# Image to video

Choose an image in **Your image**: the video begins with it. Describe in **prompt** what is seen and how it moves. The image is
cropped in the middle and resized.

**Genmo's weights were not trained for this.** With them it is inpainting in time: the first frame is kept, and its neighbours
are released late. With the tiny model that comes with this pack, this keeps place, colour and motion; with the released
weights it is **untested**, and the video may stand still or drift.

**Weights that were trained for it:** [Pusa V0.5](https://huggingface.co/RaphaelLiu/Pusa-V0.5), Mochi with a noise level for
each frame; see there for its licence. Choose the file as **transformer**; *pusa* in its name tells the node. **Untested**
here as well; colours of new frames may differ from the image's. Its authors use 0 to 0.4 for **first frames' noise**, and 30
steps.
""",
        image_to_video(),
        subgraph=IMAGE_TO_VIDEO,
    ),
    Template(
        "first_last_frame",
        "Mochi 1 - First and last frame",
        """# First and last frame

A video that begins with one image and ends with another. It works best if both show the same scene; the prompt says how one
becomes the other.

**The last image stands still for 6 frames**, a fifth of a second: every latent but the first holds 6 frames.

**Untested** with released weights. Genmo's were not trained for this: inpainting in time, see *Image to Video*. The authors
of [Pusa V0.5](https://huggingface.co/RaphaelLiu/Pusa-V0.5) use 0.3 for the noise of the first frames, and 0.7 for the last.
""",
        first_last_frame(),
        subgraph=FIRST_LAST_FRAME,
    ),
    Template(
        "extend_video",
        "Mochi 1 - Extend a video",
        """# Extend a video

Choose a video of 30 frames per second in **Your video**: its last 19 frames (4 latents) begin a new one, whose other frames
are appended to it. Both get **width** and **height**.

**Worth changing:** **frames to keep** (6k + 1): more frames carry over more of the motion, and leave room for fewer new ones.
For a longer video, extend the result again.

**Untested** with released weights. Genmo's were not trained for this: inpainting in time, see *Image to Video*. Each round
loses a little: kept frames go through the autoencoder, and colours may drift. Sound is left out.
""",
        extend_video(),
        subgraph=EXTEND_VIDEO,
    ),
    Template(
        "video_to_video",
        "Mochi 1 - Video to Video",
        """# Video to video

Choose your video in **Your video**, and describe in **prompt** what it should become.

The autoencoder file must also hold the **encoder** (**mochi_vae.safetensors** does).

**Worth changing:** **denoise**. 0.3 starts at 81 % noise, 0.2 at 62 %, 0.1 at 35 %, 0.5 at 97 %: less noise keeps more of
your video, above all its motion. The first 163 frames are used (of a shorter video, 6k + 1), scaled to 848 x 480.
""",
        video_to_video(),
        subgraph=VIDEO_TO_VIDEO,
    ),
    Template(
        "masked",
        "Mochi 1 - Video to Video, masked",
        """# Video to video, masked

Choose your video in **Your video**. A rectangle of it is regenerated as the prompt says; the rest stays. Left edge, top edge,
width and height of the area are in pixels of the scaled video.

**What it costs:** as much as the whole video: all of it is sampled, and the rest is put back at each step.

**A mask that moves:** connect any mask with as many frames as the video to **mask** of *VAE Encode (Mochi)*, inside. A latent
is regenerated if any of its 8 x 8 pixels, in any of its 6 frames, is in the mask.

**Untested** with the released weights. The autoencoder mixes neighbours: at the edges of the area a few pixels of the rest
change. **denoise** 0.6 starts at nearly pure noise inside the area.
""",
        masked(),
        subgraph=MASKED,
    ),
    Template(
        "edit_video",
        "Mochi 1 - Edit video",
        """# Edit video

Choose your video in **Your video**. Describe it in **what it shows**, including its motion, and copy that text to **what it
becomes** with other words where it should change: the video moves by the difference between the two (FlowEdit).

**Worth changing:** **start_noise** (how much may change) and **cfg** (how strongly). FlowEdit's authors use 1.5 and 5.5 for
another model.

**What it costs:** four forwards a step: 30 steps take as long as 60 of *Text to Video*.

**Untested** with the released weights. With the tiny model it was no better than *Video to Video* with less noise, which is
cheaper. What the prompts do not say may be lost: without words for the motion, shapes stood still.
""",
        edit_video(),
        subgraph=EDIT_VIDEO,
    ),
    Template(
        "edit_inverted",
        "Mochi 1 - Edit video by inversion",
        """# Edit video by inversion

Choose your video in **Your video**. **Mochi Invert** brings it back to noise that it could have come from, under **what it
shows** and without guidance; **Mochi RF Edit** makes a video from that noise under **what it becomes**, pulled towards yours
while there is much noise. The settings are those of MochiEdit's example, with its window of steps given in noise levels.

**Worth changing:** **end** (lower keeps more of your video) and **eta** (1 pulls fully).

**What it costs:** one forward a step up, two a step down: 50 steps take as long as 75 of *Text to Video*.

**Untested** with the released weights, and *Edit video* is simpler. With the tiny model it was no better than *Video to Video*
with less noise. Users of MochiEdit have reported blur.
""",
        edit_inverted(),
        subgraph=EDIT_INVERTED,
    ),
    Template(
        "long_video_low_memory",
        "Mochi 1 - Long video, 8 to 12 GB",
        """# Long video on 8 to 12 GB

10 seconds with 8-bit weights, the text encoder on the CPU, and the denoiser in overlapping windows of the length that Mochi
was trained for.

ComfyUI streams the weights that do not fit. If memory still runs out, make **context_length** smaller (22 or 16 latents; 6
frames each), then width and height. The decode needs the same memory however long the video is.

**What to expect:** the windows share their overlaps, not a plot; describe one continuing motion. The other way is *Extend a
video*, round after round: with the tiny model, both kept colour and motion, and kept one shape in about half of the videos.
""",
        long_video(),
    ),
    Template(
        "prompt_list",
        "Mochi 1 - List of prompts",
        """# List of prompts

One run makes a video of each prompt; the models are loaded once. *Create List* takes up to ten: a new input appears when
the last one is linked.

**What it costs:** the time of one video for each. All have the same seed; they are saved one after the other, at the end of
the run.
""",
        prompt_list(),
        subgraph=PROMPT_LIST,
    ),
    Template(
        "lora",
        "Mochi 1 - LoRA",
        """# LoRA

Put a LoRA into **models/loras** and choose it in **Load Mochi LoRA**. Every kind works: from Genmo's trainer with its alphas,
diffusers, PEFT, kohya, DoRA. The one linked here was made for video game landscapes; a browser saves it as
*pytorch_lora_weights.safetensors*, the name most of them have: rename it. Or make your own with this pack's
[trainer](https://github.com/mochi-nodes/mochi-nodes/blob/main/docs/train.md).

**Worth changing:** **strength** (1 is as trained, 0 is off). Several LoRAs: one node after the other.
""",
        lora(),
    ),
    Template(
        "second_pass",
        "Mochi 1 - Second pass, larger",
        """# Second pass, larger

The video of *Text to Video* with its latents scaled to 1280 x 720, and the last 30 % of the steps run again at that size.

**What it costs:** each of the 19 steps of the second pass has 2.3 times the tokens, and attention costs more than that. It
also needs the memory of 1280 x 720: make **num_frames** smaller first.

**Untested:** Mochi was trained for 848 x 480, nobody has published settings for this, and it has
only been run with the tiny model.

**Hand-off:** for an upscaler, put ComfyUI's *Load Upscale Model* and *Upscale Image (using Model)* between **Tiled VAE Decode**
and **Create Video**.
""",
        second_pass(),
        subgraph=SECOND_PASS,
    ),
    Template(
        "sharper",
        "Mochi 1 - Sharper",
        """# Sharper: skip-layer guidance

Each step is computed once more without block 34, and the video is pushed away from that worse result. Block **34**, scale
**1.0** and the whole schedule are what the authors of spatiotemporal skip guidance (STG) publish for Mochi; the node's own
defaults are for another model.

**What it costs:** three forwards a step where there were two: it takes 50 % longer.

**Untested** with the released weights. If it looks burnt, it is too strong: lower **scale**.
""",
        sharper(),
    ),
    Template(
        "faster",
        "Mochi 1 - Faster",
        """# Faster, with a different result

**Mochi Cache** skips the blocks of the transformer where little changes; **Mochi Guider** starts guidance after the first
tenth of the steps, and a step without guidance takes half the time. The console says how much was skipped.

The video is **not** the one that *Text to Video* makes from the same seed, only similar to it. For the same one, set
**threshold** to 0 and **start** to 0.

**Worth changing:** **threshold** 0 is exact; more is faster and further from exact.
""",
        faster(),
    ),
    Template(
        "fastmochi",
        "Mochi 1 - FastMochi, 8 steps",
        """# FastMochi: 8 steps

Distilled weights: **dit.safetensors** from FastVideo's FastMochi; rename it to **fastmochi.safetensors**. It is 40 GB in
fp32: **python -m mochi_core convert** makes 20 GB of it, or 10. Text encoder and VAE are the usual ones.

Its settings belong together: **8 steps, threshold noise 0.1, 6 linear steps, cfg 1.5.** Ordinary Mochi weights need the
64 steps and cfg 4.5 of the template *Text to Video*.

**Mochi Parallel** has all GPUs of the computer make the video together; with one GPU, it does nothing.
""",
        fastmochi(),
    ),
    Template(
        "genmo_exact",
        "Mochi 1 - Genmo exact",
        """# Genmo-exact reproduction

The precision and the settings of Genmo's own code: T5 and autoencoder in fp32, denoiser in bf16, 163 frames of 848 x 480 in
64 steps, guidance 6.0 (4.5 in Genmo's first release). Genmo's own **dit.safetensors** and **decoder.safetensors** work as well.

Noise comes from a generator on the CPU, so a seed means the same video on every machine. Genmo's code draws it on the GPU, so
its seeds give different noise, but the same noise gives the same video.
""",
        text_to_video(
            WAVES, transformer={"weight_dtype": "bf16"}, t5={"dtype": "fp32"}, vae={"dtype": "fp32"}, cfg=6.0
        ),
        after_run="fixed",
    ),
    Template(
        "stock_nodes",
        "Mochi 1 - KSampler and stock nodes",
        """# With ComfyUI's own nodes

Only the loaders are from this pack; prompt, sampler, decoder and everything else are ComfyUI's. All types are native: put any
other sampler, LoRA loader, guider, cache or model patch in between.

What differs from *Text to Video*: ComfyUI's text encoder node gives an empty prompt one token, Genmo gives it none. With the
prompts encoded by **T5 Encode (Mochi)**, KSampler makes the same video as **Mochi Sampler**.
""",
        stock_nodes(),
    ),
]
