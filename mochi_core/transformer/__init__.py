"""AsymmDiT, the denoiser of Mochi 1: network, attention backends and offloading."""
