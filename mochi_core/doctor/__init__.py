"""A summary to paste into bug reports: what this machine is, what works on it, and what model files would need."""

from .report import examine
from .text import failures, render

__all__ = ["examine", "failures", "render"]
