"""Old workflows: graphs made for other Mochi nodes, with ours in their place. Knows ComfyUI's JSON, but imports nothing of it."""

from .migration import Migration, migrate, migrate_prompt

__all__ = ["Migration", "migrate", "migrate_prompt"]
