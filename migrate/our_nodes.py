"""The nodes of this pack that replace old ones: names, order and defaults of their inputs.

A file in the editor's form stores values by position, so the order matters. A test compares this table with what a server reports
about the nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

AFTER_SEED = "control_after_generate"
"""The widget that the editor adds after every seed: a value in the editor's form, not an input of the node."""


@dataclass(frozen=True)
class NewNode:
    """A node of Mochi Nodes, as far as a workflow file describes it."""

    slots: dict[str, str]
    """Inputs that only take links, with their types, in the editor's order."""
    widgets: dict[str, object]
    """Inputs with a value, in the editor's order, with their defaults ("" for the name of a file)."""
    output: str
    """Type of the only output."""
    optional: tuple[str, ...] = ()
    """Optional inputs in `slots`."""


NEW_NODES = {
    "Mochi1LoadTransformer": NewNode({}, {"model_name": "", "weight_dtype": "auto"}, "MODEL"),
    "Mochi1LoadVAE": NewNode({}, {"vae_name": "", "dtype": "auto", "second_file": "none"}, "VAE"),
    "Mochi1LoadT5": NewNode({}, {"t5_name": "", "dtype": "auto", "device": "default"}, "CLIP"),
    "Mochi1T5Encode": NewNode({"clip": "CLIP"}, {"prompt": ""}, "CONDITIONING"),
    "Mochi1Sigmas": NewNode({}, {"steps": 64, "threshold_noise": 0.025, "linear_steps": 0, "denoise": 1.0}, "SIGMAS"),
    "Mochi1Sampler": NewNode(
        {
            "model": "MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent": "LATENT",
            "sigmas": "SIGMAS",
            "sampler": "SAMPLER",
        },
        {
            "width": 848,
            "height": 480,
            "num_frames": 163,
            "steps": 64,
            "cfg": 4.5,
            "seed": 0,
            AFTER_SEED: "fixed",
            "batch_size": 1,
            "denoise": 1.0,
        },
        "LATENT",
        ("latent", "sigmas", "sampler"),
    ),
    "Mochi1Invert": NewNode({}, {"gamma": 0.0, "seed": 0, AFTER_SEED: "fixed"}, "SAMPLER"),
    "Mochi1RFEdit": NewNode(
        {"latent": "LATENT"},
        {"eta": 0.8, "start": 1.0, "end": 0.8, "trend": "constant", "start_step": 0, "end_step": 0},
        "SAMPLER",
    ),
    "Mochi1TiledVAEDecode": NewNode({"samples": "LATENT", "vae": "VAE"}, {"memory": 0.0}, "IMAGE"),
    "Mochi1VAEEncode": NewNode({"pixels": "IMAGE", "vae": "VAE", "mask": "MASK"}, {}, "LATENT", ("mask",)),
}
