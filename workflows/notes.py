"""The note about files next to a template's graph."""

from __future__ import annotations

from migrate.downloads import PUBLIC_FILES

from .source import BF16, FP8, Template

PAGE = "https://github.com/mochi-nodes/mochi-nodes/blob/main/docs"
CARDS = f"""
| graphics card | weight_dtype of Load Mochi Transformer |
|---|---|
| 24 GB and more | **auto** |
| 16 GB | **int8** |
| 12 GB | **int8** up to 85 frames, **q4_0** above; Load Mochi T5 with **device** = cpu |
| 8 GB | **q4_0** up to 85 frames; Load Mochi T5 with **device** = cpu |

Computed, not yet tried on such cards: [speed and memory]({PAGE}/performance.md#what-to-choose). For longer
videos on 8 or 12 GB, use the template *Long video*.
"""

TEXT_TO_VIDEO = ("Text to video", "text_to_video.md")
IMAGES = ("Images and video", "image_to_video.md")
PAGES = {
    "text_to_video": TEXT_TO_VIDEO,
    "fast_preview": TEXT_TO_VIDEO,
    "tiny_mochi": TEXT_TO_VIDEO,
    "image_to_video": IMAGES,
    "first_last_frame": IMAGES,
    "extend_video": IMAGES,
    "masked": IMAGES,
    "video_to_video": IMAGES,
    "long_video_low_memory": ("Long video", "long_video.md"),
    "lora": ("LoRA training", "train.md"),
    "prompt_list": ("Many prompts through the API", "api.md"),
}
"""Template name -> title and file of the documentation page about its task."""


def task_note(template: Template) -> str:
    """The template's note, with a link to the page about its task if there is one."""
    if template.name not in PAGES:
        return template.note
    title, page = PAGES[template.name]
    return f"{template.note}\nMore: [{title}]({PAGE}/{page}).\n"


def files_note(template: Template) -> str:
    """Files that the template needs: where from, where to, and what suits which card; "" if it needs none."""
    named = [value for node in template.nodes.values() for value in node.inputs.values() if isinstance(value, str)]
    wanted = [name for name in dict.fromkeys(named) if name in PUBLIC_FILES]
    if not wanted:
        return ""
    half = f"[{FP8}]({PUBLIC_FILES[FP8].url}) is half the size ({PUBLIC_FILES[FP8].size}) and less precise. "
    return f"""# Files: where from, where to
{folder_tree(wanted)}

{half if BF16 in wanted else ""}Any other Mochi file works as well: Genmo's own, diffusers', fp8, int8, GGUF.
After a download press **R**.
{CARDS if BF16 in wanted else ""}"""


def folder_tree(files: list[str]) -> str:
    """The model folders and their files, as a nested list; each file is a link with its size."""
    lines = ["**ComfyUI/models/**", ""]
    for folder in sorted({PUBLIC_FILES[name].folder for name in files}):
        inside = (name for name in files if PUBLIC_FILES[name].folder == folder)
        links = [f"  - [{name}]({PUBLIC_FILES[name].url}), {PUBLIC_FILES[name].size}" for name in inside]
        lines += [f"- **{folder}/**", *links]
    return "\n".join(lines)
