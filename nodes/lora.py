"""Load Mochi LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from .bridge.lora import add_lora
from .category import CATEGORY
from .loaders import files, full_path


class LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mochi1LoadLoRA",
            display_name="Load Mochi LoRA",
            category=CATEGORY,
            description="Adds a LoRA of any kind: from Genmo's trainer with its alphas, diffusers and PEFT, kohya, DoRA. "
            "Several can be chained. ComfyUI's own LoRA loaders know only Mochi's own names, and ignore Genmo's "
            "alphas.",
            search_aliases=["mochi lora", "lora loader", "LoraLoaderModelOnly", "dora"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Mochi Transformer, or any other Mochi MODEL."),
                io.Combo.Input("lora_name", options=files("loras"), tooltip="A file in models/loras."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="1 is as trained, 0 is off; negative values push the other way.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The MODEL with the LoRA; the one that came in stays as it was.")],
        )

    @classmethod
    def execute(cls, model, lora_name, strength=1.0):
        if strength == 0:
            return io.NodeOutput(model)
        return io.NodeOutput(add_lora(model, full_path(lora_name, "loras"), strength))
