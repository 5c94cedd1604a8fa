"""Where the host's world and the model core meet: AsymmDiT as MODEL, AsymmVAE as VAE, T5 as CLIP."""
