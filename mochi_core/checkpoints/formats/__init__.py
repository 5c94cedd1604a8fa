"""File formats: bytes of a weights file to lazy tensors, and back."""
