"""Weights of 8 bits and fewer: GGML blocks, fp8 products and the layer that uses them. No file formats."""
