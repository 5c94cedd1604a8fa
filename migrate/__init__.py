"""Old workflows: graphs made for other Mochi nodes, converted to ours. Knows ComfyUI's JSON but imports nothing from ComfyUI."""

from .migration import Migration, migrate, migrate_prompt

__all__ = ["Migration", "migrate", "migrate_prompt"]
