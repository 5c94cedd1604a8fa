"""The group that all nodes of the pack have in ComfyUI's menu."""

CATEGORY = "Mochi"
