"""Tensor names: from those in files to the canonical names, which are Genmo's."""
