"""The bridge between the host (ComfyUI) and the model core: AsymmDiT as MODEL, AsymmVAE as VAE, T5 as CLIP."""
