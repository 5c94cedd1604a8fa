"""Tensor names: from what files call tensors to the canonical names, which are Genmo's."""
